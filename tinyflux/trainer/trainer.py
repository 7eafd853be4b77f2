"""The training loop: one state, the step; everything random or ordered follows from it."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tinyflux.model.model import flops_per_sample
from tinyflux.run.checkpoint import Checkpointer
from tinyflux.run.folders import lock
from tinyflux.run.metrics import Metrics, data_lines, data_report, scalars
from tinyflux.run.report import write_report
from tinyflux.run.upload import Uploader
from tinyflux.shards.stream import Stream
from tinyflux.trainer import parallel
from tinyflux.trainer.cache_experts import DatasetCache, MultiSourceCache
from tinyflux.trainer.cache_loader import CacheLoader
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.guard import Guard
from tinyflux.trainer.objective import Losses, Objective
from tinyflux.trainer.optim.registry import make_optimizer, optimizer_state, set_learning_rate
from tinyflux.trainer.parallel import ParallelConfig
from tinyflux.trainer.preview import Preview
from tinyflux.trainer.sampling import Sampler, evaluating
from tinyflux.trainer.schedules import learning_rate
from tinyflux.util import devices
from tinyflux.util.log import say

PREEMPTED = 75  # exit status (EX_TEMPFAIL) of a run that was told to stop, saved itself and can be requeued
T_BINS = 10  # parts of t that the main loss is recorded for
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def _by_timestep(main: Tensor, batch: dict) -> Tensor:
    """Sums of the main loss in T_BINS equal parts of t, then the numbers of samples there, [2 * T_BINS]."""
    part = (batch["t"] * T_BINS).long().clamp(max=T_BINS - 1)
    sums = torch.zeros(2 * T_BINS, device=main.device)
    return sums.index_add_(0, part, main.detach()).index_add_(0, part + T_BINS, torch.ones_like(main))


class Trainer:
    """Trains a TinyFluxDeep on one device or, under torchrun, on all ranks together.

    model: with weights, or on the meta device: then it gets `weights`, a full state dict on rank 0 and {} elsewhere,
    or, with None, an initialisation keyed by `seed`. It is sharded in place.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainerConfig,
        *,
        device: torch.device | str | None = None,
        parallel_config: ParallelConfig | None = None,
        run_dir: str | Path = ".",
        seed: int = 0,
        weights: dict[str, Tensor] | None = None,
    ):
        self.config, self.seed, self.run_dir = config, seed, Path(run_dir)
        self.device = parallel.usable_device(device)
        devices.configure(self.device)
        parallel_config = parallel_config or ParallelConfig()
        parallel.join_process_group(self.device, parallel_config.timeout)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.model, self.model_config = model, model.config
        fresh = any(p.is_meta for p in model.parameters())
        parallel.freeze(model, config.freeze)
        parallel.distribute(
            model,
            self.device,
            parallel_config,
            dtype=config.dtype,
            gradient_checkpointing=config.gradient_checkpointing,
            compile_mode=config.compile_mode,
        )
        if weights is not None:
            parallel.load_full(model, weights)
        elif fresh:  # drawn on the CPU and keyed by the seed: the same weights on any number of ranks
            model.init_weights(torch.Generator().manual_seed(seed))
        self.objective = Objective(model, config)
        self.optimizer = make_optimizer(model, config)
        self.ema = EMA(model, config.ema_decay)
        self.step, self.best_loss, self.guard = 0, float("inf"), Guard(config, self.run_dir)
        self.signal = 0  # the stop signal that this rank has seen
        self.stopping = False  # what all ranks agreed on
        # a torchrun that is killed leaves its workers behind: they notice by their parent, save and stop
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.checkpointer: Checkpointer | None = None
        self.profiler: torch.profiler.profile | None = None

    def setup(
        self,
        train_loader: Stream | DataLoader,
        cache: DatasetCache | MultiSourceCache | None = None,
        sampler: Sampler | None = None,
        tensorboard_dir: str | Path | None = None,
        *,
        val_loader: Iterable[dict] | None = None,
        identity: dict | None = None,
        training_config: dict | None = None,
    ) -> None:
        """Give the trainer its data, and resume the newest checkpoint of the run folder if there is one.

        train_loader: a shard `Stream` whose collate is a `StreamCollate`, or, on one device, a DataLoader of a
        `CachedDataset` with `cache`, where the teachers' features are (see `CacheLoader`). sampler: draws
        `config.sample_prompts`. tensorboard_dir: instead of the config's. val_loader: batches of `HeldOut`, the same
        number on every rank; the best checkpoint is by their main loss.
        identity: what the data order depends on; a run resumed with another one goes on, and says what changed.
        training_config: written beside the checkpoints.
        """
        c = self.config
        if isinstance(train_loader, DataLoader):
            if self.world > 1:
                raise ValueError("a DataLoader feeds one device: train on several with shards, by launch/train.py")
            train_loader = CacheLoader(train_loader, cache, c, seed=self.seed)
            identity = identity or train_loader.identity
        self.loader, self.identity = train_loader, identity or {}
        self.tensorboard_dir = self.run_dir / (tensorboard_dir or c.tensorboard_dir)
        self.val_loader = val_loader if c.validate_every else None
        self.accumulation = train_loader.accumulation
        if c.gradient_accumulation not in (1, self.accumulation):
            data = train_loader.config
            raise ValueError(
                f"trainer.gradient_accumulation is {c.gradient_accumulation}, but it follows from"
                f" data.global_batch_size / (ranks x data.micro_batch_size) = {data.global_batch_size} /"
                f" ({self.world} x {data.micro_batch_size}) = {self.accumulation}: leave it out, or change those"
            )
        fields = train_loader.fields
        (_, height, width), (text_tokens, _) = fields["latents"].shape, fields["t5_embeds"].shape
        self.sample_tokens = height * width + text_tokens
        self.sample_flops = flops_per_sample(self.model_config, height * width, text_tokens)
        self.lock = lock(self.run_dir) if self.rank == 0 else None
        options = {"keep_steps": c.keep_last_n_steps, "keep_epochs": c.keep_last_n_epochs, "save_pt": c.save_pt}
        root, self.uploader = self.run_dir / c.checkpoint_dir, None
        if c.hf_repo_id and self.rank == 0:
            self.uploader = Uploader(root, c.hf_repo_id, c.hf_run_name or self.run_dir.resolve().name)
            options["upload"] = self.uploader.add
        self.checkpointer = Checkpointer(root, self.model_config, **options)
        self.training_config = training_config or {"trainer": asdict(c), "model": self.model_config.to_dict()}
        self.checkpointer.write_configs(self.training_config)
        self.load_checkpoint()
        self.checkpointer.prepare(self.state_dict())
        self.preview = None
        if sampler and c.sample_prompts and c.sample_every:
            folder = self.run_dir / c.sample_dir
            self.preview = Preview(sampler, c.sample_prompts, folder, self.device, self.seed)
            width, expected = self.preview.prompts.t5.shape[-1], self.model_config.joint_attention_dim
            if width != expected:
                raise ValueError(f"trainer.zoo = {c.zoo} encodes prompts in width {width}, the shards have {expected}")

    # State

    def state_dict(self) -> dict:
        """Weights, optimizer state and EMA, sharded; with the step all that a run is. It is the memory that is trained:
        what is loaded into it is loaded."""
        optimizer = optimizer_state(self.model, self.optimizer)
        return {"model": self.model.state_dict(), "optimizer": optimizer, "ema": self.ema.shadow}

    def load_checkpoint(self) -> bool:
        """Resume the newest sound checkpoint of the run folder; `setup` does so. Returns whether there was one."""
        if self.checkpointer is None:
            raise RuntimeError("call setup() first: it opens the run folder, and resumes what is there")
        state = self.state_dict()
        metadata = self.checkpointer.load_newest(state)
        if metadata is None:
            return False
        self.ema.updates = metadata["ema_updates"]
        self.guard.losses.extend(metadata.get("losses", ()))
        self.step, self.best_loss = metadata["step"], metadata["best_loss"] or float("inf")
        say(f"resuming at step {self.step} from {self.checkpointer.root}")
        for key, value in self.identity.items():
            if (before := metadata["identity"].get(key)) != json.loads(json.dumps(value)):
                say(f"WARNING: {key} was {before}, is now {value}: the data order from here on is the new plan's")
        return True

    def save_checkpoint(self, reasons: set[str]) -> None:
        """Begin to save the state of this step; training may go on at once."""
        best = self.best_loss if self.best_loss < float("inf") else None
        metadata = {"seed": self.seed, "identity": self.identity, "best_loss": best, "world": self.world}
        metadata |= {"ema_updates": self.ema.updates, "epoch": self._epoch(self.step)}
        metadata["losses"] = list(self.guard.losses)
        self.checkpointer.save(self.step, self.state_dict(), metadata, reasons)

    def _epoch(self, step: int) -> int:
        return self.loader.plan.epoch(step)

    # The loop

    @property
    def finished(self) -> bool:
        """Whether all steps or all epochs are done."""
        c = self.config
        epochs_done = c.max_epochs is not None and self._epoch(self.step) >= c.max_epochs
        return self.step >= c.total_steps or epochs_done

    def train(self) -> int:
        """Train to the end, or until a signal asks to stop. Returns the exit status: 0, or 75 for a requeue."""
        c = self.config
        if self.finished:
            say(f"finished: step {self.step} of {c.total_steps} was saved in {self.checkpointer.root}")
            self.close()
            if self.uploader:
                self.uploader.finish(c.upload_wait)
            return 0
        self.metrics = Metrics(self.run_dir, self.tensorboard_dir, self.step, c.total_steps)
        self.metrics.text("config", f"```json\n{json.dumps(self.training_config, indent=2)}\n```", self.step)
        self.loader.load_state_dict({"step": self.step})
        batches = iter(self.loader)
        self.model.train()
        with self._signals():
            say(f"training from step {self.step} to {c.total_steps}")
            while not self.finished and not self.stopping:
                self._profile()
                record = self.train_step(batches)
                if self.val_loader and self.step % c.validate_every == 0:
                    record |= self.validate()
                self._log(record)
                self._after_step(record)
            self.checkpointer.wait()
            if self.checkpointer.newest != self.step:
                self.save_checkpoint({"step"})
            if self.preview:
                self.preview.wait()
            say(*data_lines(self.shown["data"]), sep="\n")
            self.metrics.close()
            self.close()
        if self.rank == 0:
            say(f"report: {write_report(self.run_dir, self.training_config, c.sample_dir)}")
        if self.checkpointer.newest != self.step:
            say(f"error: step {self.step} could not be saved; run the same command again once that is put right")
            return 1
        if self.uploader:
            if self.finished:
                self.uploader.add(self.checkpointer.root / f"step_{self.step}")
            self.uploader.finish(c.upload_wait if self.finished else 0)
        if self.finished:
            return 0
        say(f"stopped by a signal at step {self.step} of {c.total_steps}: saved, and the same command goes on")
        return PREEMPTED

    def close(self) -> None:
        """Finish the checkpoint in flight and let go of the run folder."""
        self.checkpointer.close()
        if self.lock:
            self.lock.close()

    def train_step(self, batches: Iterator[dict]) -> dict:
        """One optimizer step over one global batch. Returns the record of the step."""
        c, started, waited, keys = self.config, time.perf_counter(), 0.0, []
        totals = torch.zeros(len(Losses._fields) + 2 * T_BINS, device=self.device)  # sums over samples
        samples = 0
        for i in range(self.accumulation):
            now = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - now
            keys += batch["keys"]
            samples += len(batch["keys"])
            self.model.set_requires_gradient_sync(i == self.accumulation - 1)
            batch = self._to_device(batch)
            losses = self.objective(batch, self.step)
            # FSDP averages over ranks and every rank has as many samples: this makes it the global batch's mean
            losses.total.mean().div(self.accumulation).backward()
            totals += torch.cat([torch.stack([x.detach().sum() for x in losses]), _by_timestep(losses.main, batch)])
        grad_norm = parallel.clip_grad_norm(self.model, c.grad_clip)
        told = self.signal > 0 or self.parent not in (None, os.getppid())
        shared = torch.cat((totals, torch.tensor([float(told)], device=self.device)))
        dist.all_reduce(shared, dist.ReduceOp.SUM)
        (loss, main, lune, sol), by_t, stop = (x.tolist() for x in shared.split([len(Losses._fields), 2 * T_BINS, 1]))
        self.stopping = stop[0] > 0  # as soon as one rank has seen a signal, all stop at this step
        loss, main, lune, sol = (x / (samples * self.world) for x in (loss, main, lune, sol))
        lr = self._learning_rate()
        fault = self.guard.fault(loss, grad_norm.item())
        if fault is None:
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
            self.ema.update()
        elif reason := self.guard.skip(self.step + 1, fault, keys):
            self.close()
            raise RuntimeError(reason)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - started
        record = {"step": self.step, "loss": loss, "main": main}
        record |= {"lune": lune} if self.objective.lune else {}
        record |= {"sol": sol} if self.objective.sol else {}
        record |= {"lr": lr, "grad_norm": grad_norm.item(), "skipped": fault is not None}
        means = zip(by_t[:T_BINS], by_t[T_BINS:], strict=True)
        record["main_by_t"] = [round(total / count, 5) if count else None for total, count in means]
        record |= {"samples_per_s": samples * self.world / seconds, "step_s": seconds, "data_wait": waited / seconds}
        return record

    def _to_device(self, batch: dict) -> dict:
        return {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _learning_rate(self) -> float:
        c = self.config
        return learning_rate(
            self.step,
            base=c.learning_rate,
            total_steps=c.total_steps,
            warmup_steps=c.warmup_steps,
            min_lr=c.min_lr,
            schedule=c.lr_scheduler,
            warmup=c.warmup_type,
        )

    def validate(self) -> dict:
        """Losses of the held-out samples with the averaged weights, at fixed timesteps and with fixed noise."""
        say(f"validating at step {self.step}")
        sums = torch.zeros(len(Losses._fields) + 1, device=self.device)
        with self.ema.average_parameters(), evaluating(self.model):
            for batch in self.val_loader:
                batch = self._to_device(batch)
                losses = self.objective.validate(batch, self.step)
                counted = (*losses, torch.ones_like(losses.main))
                sums += torch.stack([x[batch["valid"]].sum() for x in counted])
        dist.all_reduce(sums)
        _, main, lune, sol, count = sums.tolist()
        parts = {"val_loss": main, "val_lune": lune, "val_sol": sol}
        return {name: value / max(1, count) for name, value in parts.items()}

    def _after_step(self, record: dict) -> None:
        """What happens between steps: checkpoints and samples."""
        c = self.config
        reasons = set()
        if record.get("val_loss", self.best_loss) < self.best_loss:
            self.best_loss = record["val_loss"]
            reasons.add("best")
        epoch = self._epoch(self.step)
        begun = epoch > self._epoch(self.step - 1)  # with this step

        def due(steps: int, epochs: int) -> tuple[bool, bool]:
            return steps > 0 and self.step % steps == 0, begun and epochs > 0 and epoch % epochs == 0

        saves = zip(("step", "epoch"), due(c.save_every_steps, c.save_every_epochs), strict=True)
        reasons |= {reason for reason, is_due in saves if is_due}
        if c.hf_repo_id and any(due(c.upload_every_steps, c.upload_every_epochs)):
            reasons.add("upload")
        if reasons:
            self.save_checkpoint(reasons)
        if self.preview and self.step % c.sample_every == 0:
            say(f"drawing samples at step {self.step}")
            with self.ema.average_parameters():
                self.preview.draw(self.model, self.step, self.metrics)

    def _profile(self) -> None:
        """Start and end the profiler's window on rank 0; a trace for chrome://tracing or Perfetto."""
        c = self.config
        if self.rank == 0 and c.profile_at and self.step + 1 == c.profile_at:
            self.profiler = torch.profiler.profile()  # whatever this device has: CPU, and CUDA where there is one
            self.profiler.start()
        if self.profiler and self.step + 1 == c.profile_at + c.profile_steps:
            self.profiler.stop()
            path = self.run_dir / f"profile_step_{c.profile_at}.json.gz"
            self.profiler.export_chrome_trace(str(path))
            self.profiler = None
            say(f"profile of {c.profile_steps} steps: {path}")

    # Signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note a stop signal instead of dying from it, for the length of the loop."""

        def note(number: int, _frame) -> None:
            self.signal = number

        main = threading.current_thread() is threading.main_thread()  # no other may take signals
        before = {number: signal.signal(number, note) for number in STOP_SIGNALS if main}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # What is shown

    def _log(self, record: dict) -> None:
        c = self.config
        shown = self.step % c.log_every == 0 or self.finished or self.stopping
        if shown:
            record["data"] = data_report(self.loader, self.step, self.device)
        self.metrics.record(record)
        if shown:
            self.metrics.progress(record)
            per_sample = {"flops": self.sample_flops, "tokens": self.sample_tokens}
            self.metrics.scalars(scalars(record, c, self.world, self.device, **per_sample), self.step)
            self.shown = record
