"""One optimizer step. The host launches it and does not wait; its metrics are read while the next step runs."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from tinyflux.model.model import flops_per_sample
from tinyflux.trainer import parallel
from tinyflux.trainer.batches import Batch, to_device
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.guard import Guard
from tinyflux.trainer.objective import Objective
from tinyflux.trainer.optim.optimizer import set_learning_rate, take_step

T_BINS = 10  # equal parts of t for which the main loss is recorded


@dataclass
class Pending:
    """A launched step.

    samples: of all ranks; keys: of this rank; tokens, flops: means per sample's forward; waited: seconds spent waiting
    for batches; seconds: from the end of the previous step to the end of this one; extra: more entries of its record.
    """

    step: int
    lr: float
    weights: dict[str, float]
    samples: int
    keys: list[str]
    tokens: float
    flops: float
    waited: float
    numbers: Tensor
    copied: torch.cuda.Event | None
    seconds: float | None = None
    extra: dict = field(default_factory=dict)


def by_timestep(main: Tensor, t: Tensor) -> Tensor:
    """Sums of the main loss in T_BINS equal parts of t, then the sample counts of the parts, [2 * T_BINS]."""
    part = (t * T_BINS).long().clamp(max=T_BINS - 1)
    sums = torch.zeros(2 * T_BINS, device=main.device)
    return sums.index_add_(0, part, main).index_add_(0, part + T_BINS, torch.ones_like(main))


class Stepper:
    """Takes the optimizer steps of a run.

    Everything that ranks exchange in a step is one vector, summed by one all-reduce: the losses, the main loss by
    timestep, the squared gradient norm, whether a rank was told to stop, whether rank 0 wants a save, and for each rank
    how late it started and how long it waited for data.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        guard: Guard,
        device: torch.device,
        *,
        keep_gathered: bool,
    ):
        self.objective, self.optimizer, self.ema, self.guard = objective, optimizer, ema, guard
        self.model, self.config, self.device = objective.model, objective.config, device
        self.keep_gathered = keep_gathered
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.parts = [len(objective.names), 2 * T_BINS, 1, 1, 1, self.world, self.world]
        self.read_at = time.perf_counter()  # when the previous step was read: about the same time on all ranks

    def __call__(
        self, batches: Iterator[Batch], step: int, accumulation: int, *, lr: float, told: bool, save: bool
    ) -> Pending:
        """Launch a step; steps count from 0. told: whether this rank was told to stop; save: whether it wants a save.
        Must be called on all ranks."""
        packed = torch.zeros(sum(self.parts), device=self.device)
        losses, by_t, squared_norm, stop, wanted, late, wait = packed.split(self.parts)
        keys, tokens, flops, waited, began = [], 0.0, 0.0, 0.0, None
        for i in range(accumulation):
            now = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - now
            began = began or time.perf_counter()
            keys += batch["keys"]
            B, image, text = len(batch["keys"]), batch["latents"][0, 0].numel(), batch["t5_embeds"].shape[1]
            tokens += B * (image + text)
            flops += B * flops_per_sample(self.model.config, image, text)
            parallel.set_last_micro_batch(self.model, i == accumulation - 1, keep_gathered=self.keep_gathered)
            batch = to_device(batch, self.device)
            found = self.objective(batch, step)
            # FSDP averages over ranks, and all ranks have the same number of samples: the mean over the global batch
            found["loss"].mean().div(accumulation).backward()
            losses += torch.stack([x.detach().sum() for x in found.values()])
            by_t += by_timestep(found["main"].detach(), batch["t"])
        gradients = parallel.local_gradients(self.model)
        squared_norm += parallel.squared_norm(self.model, gradients)
        # pass numbers as kernel arguments: a new tensor would be copied from pageable memory, and the host would wait
        stop.fill_(float(told))
        wanted.fill_(float(save))
        late[self.rank].fill_(began - self.read_at)
        wait[self.rank].fill_(waited)
        dist.all_reduce(packed)
        norm = squared_norm.sqrt()
        parallel.scale(gradients, norm, self.config.grad_clip)
        samples = len(keys) * self.world
        skip = self.guard.judge(losses[0] / samples, norm[0])
        set_learning_rate(self.optimizer, lr)
        take_step(self.optimizer, skip)
        self.ema.update(skip)
        self.optimizer.zero_grad(set_to_none=True)
        numbers, copied = self._to_host(torch.cat((packed, norm, skip.view(1), self.guard.median.view(1))))
        work = tokens / len(keys), flops / len(keys)
        pending = Pending(step + 1, lr, self.objective.weights(step), samples, keys, *work, waited, numbers, copied)
        if copied is None:  # on a CPU the step is already done
            self.wait(pending)
        return pending

    def _to_host(self, numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if self.device.type != "cuda":
            return numbers, None
        host = torch.empty(numbers.shape, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def wait(self, pending: Pending) -> float:
        """Wait until the device has finished a step. Returns the step's seconds."""
        if pending.seconds is None:
            if pending.copied is not None:
                pending.copied.synchronize()
            before, self.read_at = self.read_at, time.perf_counter()
            pending.seconds = self.read_at - before
        return pending.seconds

    def read(self, pending: Pending) -> tuple[dict, bool, bool]:
        """A step's record, whether a rank was told to stop, and whether one wants a save. Waits for the device."""
        seconds = self.wait(pending)
        numbers = iter(pending.numbers.tolist())
        losses, by_t, _, stop, wanted, late, wait, rest = ([*islice(numbers, n)] for n in (*self.parts, 3))
        norm, skipped, median = rest
        record = {"step": pending.step}
        record |= {name: x / pending.samples for name, x in zip(self.objective.names, losses, strict=True)}
        record |= {"weights": pending.weights, "lr": pending.lr, "grad_norm": norm, "skipped": skipped > 0}
        means = zip(by_t[:T_BINS], by_t[T_BINS:], strict=True)
        record["main_by_t"] = [round(total / count, 5) if count else None for total, count in means]
        record |= {"samples_per_s": pending.samples / seconds, "step_s": seconds, "data_wait": pending.waited / seconds}
        slowest = max(range(self.world), key=late.__getitem__)
        record["slowest"] = {"rank": slowest, "late_s": late[slowest], "data_wait_s": wait[slowest]}
        if skipped:
            record["fault"] = self.guard.fault(record["loss"], norm, median)
        return record | pending.extra, stop[0] > 0, wanted[0] > 0

    def restart_clock(self) -> None:
        """Do not count the time since the last step as part of the next one."""
        self.read_at = time.perf_counter()
