"""The training loop. Its only position is the step: data order and random draws are functions of it."""

import json
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tinyflux.model.lora import attach
from tinyflux.run.checkpoint import Checkpointer
from tinyflux.run.folders import lock
from tinyflux.run.identity import agree
from tinyflux.run.metrics import Metrics, data_report, scalars
from tinyflux.run.records import data_lines
from tinyflux.run.report import write_report
from tinyflux.run.upload import Uploader
from tinyflux.trainer import parallel
from tinyflux.trainer.batches import Batch, Batches
from tinyflux.trainer.cache_experts import DatasetCache, MultiSourceCache
from tinyflux.trainer.cache_loader import CacheLoader
from tinyflux.trainer.config import ParallelConfig, TrainerConfig
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.guard import Guard
from tinyflux.trainer.objective import Objective
from tinyflux.trainer.optim.optimizer import make_optimizer, optimizer_state
from tinyflux.trainer.preview import Preview
from tinyflux.trainer.profile import Profiler
from tinyflux.trainer.sampling import Sampler
from tinyflux.trainer.schedules import learning_rate
from tinyflux.trainer.scoreboard import Scoreboard
from tinyflux.trainer.step import Pending, Stepper
from tinyflux.trainer.validation import validate
from tinyflux.util import cli, devices
from tinyflux.util.garbage import collected_by_steps
from tinyflux.util.log import say
from tinyflux.util.signals import StopSignals

STOP_PATIENCE = 20.0
"""Seconds that a stopped run waits, after its save, for pictures, scores and exports together."""


class Trainer:
    """Trains a TinyFluxDeep on one device or, under torchrun, on all ranks together.

    model: with weights, or on the meta device. Then it gets `weights` (a full state dict on rank 0, {} on other ranks)
    or, if None, an initialisation keyed by `seed`. It is sharded in place.
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
        devices.configure(self.device, deterministic=config.deterministic)
        parallel_config = parallel_config or ParallelConfig()
        parallel.join_process_group(self.device, parallel_config.timeout)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.model, self.model_config = model, model.config
        fresh = any(p.is_meta for p in model.parameters())
        if config.lora_rank:
            weights = attach(model, config.lora_rank, config.lora_alpha, config.lora_targets, seed, weights)
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
        self.guard = Guard(config, self.run_dir, self.device)
        self.stepper = Stepper(
            self.objective,
            self.optimizer,
            self.ema,
            self.guard,
            self.device,
            keep_gathered=not parallel_config.reshard_after_forward,
        )
        self.step, self.last_step, self.best_loss = 0, config.total_steps, float("inf")
        self.pending: Pending | None = None  # the step that was launched but not read yet
        # all ranks agree on these
        self.stopping = self.save_wanted = False
        self.owed: set[str] = set()  # reasons to save that wait for the next checkpoint
        self.saved_step = -1  # step of the last save that was started
        self.signals = StopSignals()
        self.profiler = Profiler(config.profile_at if self.rank == 0 else 0, config.profile_steps, self.run_dir)
        # set by `setup`
        self.loader: Batches | None = None
        self.val_loader: Iterable[Batch] | None = None
        self.identity: dict = {}
        self.training_config = {"trainer": asdict(config), "model": self.model_config.to_dict()}
        self.tensorboard_dir = self.run_dir / config.tensorboard_dir
        self.lock: IO | None = None
        self.checkpointer: Checkpointer | None = None
        self.uploader: Uploader | None = None
        self.preview: Preview | None = None
        self.scoreboard: Scoreboard | None = None
        self.metrics: Metrics | None = None

    def setup(
        self,
        train_loader: Batches | DataLoader,
        cache: DatasetCache | MultiSourceCache | None = None,
        sampler: Sampler | None = None,
        tensorboard_dir: str | Path | None = None,
        *,
        val_loader: Iterable[Batch] | None = None,
        identity: dict | None = None,
        training_config: dict | None = None,
        start_over: bool = False,
        scoreboard: Scoreboard | None = None,
    ) -> None:
        """Set the data, and resume from the newest checkpoint of the run folder if there is one.

        train_loader: a shard `Stream` with a `StreamCollate`, or, on one device, a DataLoader of a `CachedDataset`
        with `cache`, which has the teachers' features (see `CacheLoader`). sampler: draws `config.sample_prompts`.
        tensorboard_dir: overrides the config's. val_loader: batches of `HeldOut`, the same number on every rank; their
        main loss selects the best checkpoint.
        identity: what the data order depends on; if a resumed run has another one, the changes are logged.
        training_config: written beside the checkpoints. start_over: start at step 0 in a folder that has remains of a
        run but no checkpoint. scoreboard: evaluates every `config.evaluate_every` steps.
        Raises ValueError if ranks have different data, or the folder has such remains without start_over.
        """
        c = self.config
        if isinstance(train_loader, DataLoader):
            if self.world > 1:
                raise ValueError("a DataLoader feeds one device: to train on several, use shards and launch/train.py")
            train_loader = CacheLoader(train_loader, cache, c, seed=self.seed)
            identity = identity or train_loader.identity
        self.loader, self.identity = train_loader, identity or {}
        agree({"data": self.identity})
        self.tensorboard_dir = self.run_dir / (tensorboard_dir or c.tensorboard_dir)
        self.val_loader = val_loader if c.validate_every else None
        self.scoreboard = scoreboard if c.evaluate_every else None
        self.training_config = training_config or self.training_config
        if c.max_epochs is not None:  # the schedule ends there too
            self.last_step = bisect_left(range(c.total_steps), c.max_epochs, key=train_loader.epoch)
        text_width = train_loader.fields["t5_embeds"].shape[-1]
        self.lock = lock(self.run_dir) if self.rank == 0 else None
        root = self.run_dir / c.checkpoint_dir
        if c.hf_repo_id and self.rank == 0:
            self.uploader = Uploader(root, c.hf_repo_id, c.hf_run_name or self.run_dir.resolve().name)
        self.checkpointer = Checkpointer(
            root,
            self.model_config,
            self.training_config,
            keep_steps=c.keep_last_n_steps,
            keep_epochs=c.keep_last_n_epochs,
            save_pt=c.save_pt,
            upload=self.uploader.add if self.uploader else None,
            every=60 * c.save_every_minutes,
        )
        self.load_checkpoint(start_over)
        self.checkpointer.prepare(self.state_dict())
        if sampler and c.sample_prompts and c.sample_every:
            folder = self.run_dir / c.sample_dir
            self.preview = Preview(sampler, c.sample_prompts, folder, self.device, self.seed, raw=c.sample_raw)
            found = self.preview.prompts.t5.shape[-1]
            if found != text_width:
                raise ValueError(
                    f"trainer.zoo = {c.zoo} gives T5 states of width {found}, but the shards have width {text_width}:"
                    " set trainer.zoo to the zoo that built the shards"
                )

    def state_dict(self) -> dict:
        """Weights, optimizer state and EMA, sharded; with the step, the run's complete state. Tensors are live: loading
        into them updates the run."""
        optimizer = optimizer_state(self.model, self.optimizer)
        return {"model": self.model.state_dict(), "optimizer": optimizer, "ema": self.ema.shadow}

    def load_checkpoint(self, start_over: bool = False) -> bool:
        """Resume from the newest valid checkpoint of the run folder; called by `setup`. Returns whether there was one.
        Raises as `Checkpointer.load_newest`."""
        if self.checkpointer is None:
            raise RuntimeError("call setup() first: it opens the run folder and resumes the run")
        metadata = self.checkpointer.load_newest(self.state_dict(), start_over=start_over)
        if metadata is None:
            return False
        self.ema.updates = metadata["ema_updates"]
        self.guard.losses = metadata.get("losses", [])
        self.step, self.best_loss = metadata["step"], metadata["best_loss"] or float("inf")
        say(f"resuming at step {self.step} from {self.checkpointer.root}")
        for key, value in self.identity.items():
            if (before := metadata["identity"].get(key)) != json.loads(json.dumps(value)):
                say(f"WARNING: {key} was {before}, is now {value}: the new plan gives the data order from here on")
        return True

    def save_checkpoint(self, reasons: set[str]) -> None:
        """Start to save the state of this step; training may continue at once."""
        self._read()  # so that a run resumed from here has the records of all earlier steps
        metadata = {
            "seed": self.seed,
            "identity": self.identity,
            "best_loss": self.best_loss if self.best_loss < float("inf") else None,
            "world": self.world,
            "ema_updates": self.ema.updates,
            "epoch": self.loader.epoch(self.step),
            "losses": self.guard.losses,
        }
        self.checkpointer.save(self.step, self.state_dict(), metadata, reasons | self.owed)
        self.owed, self.save_wanted, self.saved_step = set(), False, self.step

    @property
    def finished(self) -> bool:
        """Whether all steps or all epochs are done."""
        return self.step >= self.last_step

    def train(self) -> int:
        """Train to the end, or until a signal asks to stop. Returns the exit status: 0 when finished, 75 to requeue."""
        c = self.config
        if self.finished:
            say(f"finished already: step {self.step} of {self.last_step} is saved in {self.checkpointer.root}")
            self.close()
            if self.uploader:
                self.uploader.finish(c.upload_wait)
            return cli.DONE
        self.metrics = Metrics(self.run_dir, self.tensorboard_dir, self.step, self.last_step)
        self.metrics.text("config", f"```json\n{json.dumps(self.training_config, indent=2)}\n```", self.step)
        self.loader.load_state_dict({"step": self.step})
        batches = iter(self.loader)
        self.model.train()
        with self.signals.noted(), collected_by_steps() as collect_garbage:
            say(f"training from step {self.step} to {self.last_step}")
            self.stepper.restart_clock()
            while not self.finished and not self.stopping:
                self.profiler.before(self.step + 1)
                self.train_step(batches)
                self._after_step()
                collect_garbage(self.step)
            self._read(last=True)
            self.profiler.finish()
            self._save_the_end()
        return self._conclude()

    def train_step(self, batches: Iterator[Batch]) -> None:
        """Launch an optimizer step over one global batch, then record the previous one."""
        launched = self.stepper(
            batches,
            self.step,
            self.loader.accumulation,
            lr=self._learning_rate(),
            told=self.signals.told,
            save=self.rank == 0 and self.checkpointer.overdue,
        )
        self.step += 1
        self._read()
        self.pending = launched

    def _learning_rate(self) -> float:
        c = self.config
        return learning_rate(
            self.step,
            base=c.learning_rate,
            total_steps=self.last_step,
            warmup_steps=c.warmup_steps,
            min_lr=c.min_lr,
            schedule=c.lr_scheduler,
            warmup=c.warmup_type,
        )

    def _read(self, last: bool = False) -> None:
        """Record the last launched step when the device has finished it. last: no step follows it."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        record, told, wanted = self.stepper.read(pending)
        self.save_wanted |= wanted and pending.step > self.saved_step  # rank 0 repeats its request until the save
        self.stopping = self.stopping or told  # if one rank was told to stop, all stop at the same step
        reason = self.guard.count(pending.step, record.get("fault"), pending.keys)
        # a save or samples of the last step may read it before the loop ends
        ends = last or (self.finished and pending.step == self.step)
        shown = pending.step % self.config.log_every == 0 or ends
        if shown:
            record["data"] = data_report(self.loader, pending.step, self.device)
        self.metrics.record(record)
        if shown:
            self.metrics.progress(record)
            self.metrics.scalars(
                scalars(record, self.world, self.device, flops=pending.flops, tokens=pending.tokens), pending.step
            )
        if reason:
            self.metrics.close()
            self.close()
            raise cli.Failed(reason)

    def _after_step(self) -> None:
        """Between steps: validation, checkpoints and samples."""
        c, reasons = self.config, set()
        epoch = self.loader.epoch(self.step)
        begun = epoch > self.loader.epoch(self.step - 1)  # whether an epoch starts with this step

        def due(steps: int, epochs: int = 0) -> tuple[bool, bool]:
            return steps > 0 and self.step % steps == 0, begun and epochs > 0 and epoch % epochs == 0

        if self.val_loader and any(due(c.validate_every)):
            say(f"validating at step {self.step}")
            self.stepper.wait(self.pending)
            losses = validate(self.objective, self.ema, self.val_loader, self.device, self.step)
            self.pending.extra.update(losses)
            if losses["val_loss"] < self.best_loss:
                self.best_loss = losses["val_loss"]
                reasons.add("best")
        by_step, by_epoch = due(c.save_every_steps, c.save_every_epochs)
        upload_by_step, upload_by_epoch = due(c.upload_every_steps, c.upload_every_epochs) if c.hf_repo_id else (0, 0)
        reasons |= {name for name, is_due in (("step", by_step), ("upload", upload_by_step)) if is_due}
        self.owed |= {name for name, is_due in (("epoch", by_epoch), ("upload", upload_by_epoch)) if is_due}
        if self.save_wanted:
            reasons.add("step")
        if self.finished and c.hf_repo_id:  # recorded in the checkpoint: after a kill, the next start uploads it
            reasons.add("upload")
        if reasons or (self.owed and not c.save_every_minutes):
            self.save_checkpoint(reasons)
        drawings = ((self.preview, c.sample_every, "samples"), (self.scoreboard, c.evaluate_every, "scores"))
        for drawing, every, name in drawings:
            if drawing is None or not any(due(every)):
                continue
            self._read()
            if self.stopping and not self.finished:  # save first: there may be little time
                say(f"no {name} of step {self.step}: the training stops")
                continue
            say(f"drawing {name} at step {self.step}")
            drawing.draw(self.model, self.ema, self.step, self.metrics, last=self.finished)
        if self.pending is None or self.pending.seconds is not None:
            self.stepper.restart_clock()

    def _save_the_end(self) -> None:
        """Save the last step if it is not saved yet, then wait for background threads: only briefly if the run was
        told to stop, because it may be killed soon."""
        self.checkpointer.wait()
        if self.checkpointer.newest != self.step:
            self.save_checkpoint({"step"})
            self.checkpointer.wait()
        # the last exchange between ranks: from here on, other ranks need not wait for rank 0
        say(*data_lines(data_report(self.loader, self.step, self.device)), sep="\n")
        until = time.monotonic() + STOP_PATIENCE

        def patience() -> float | None:
            return None if self.finished else max(0.0, until - time.monotonic())

        for drawn in filter(None, (self.preview, self.scoreboard)):
            drawn.wait(patience())
        self.metrics.close()
        self.close(patience())

    def _conclude(self) -> int:
        """Report and upload. Returns the exit status."""
        c = self.config
        if self.rank == 0:
            try:
                say(f"report: {write_report(self.run_dir, self.training_config, c.sample_dir)}")
            except (OSError, ValueError) as error:
                say(f"WARNING: no report: {error}")
        if self.checkpointer.newest != self.step:
            say(f"error: step {self.step} could not be saved; fix the cause and run the same command again")
            return cli.FAILED
        if self.uploader:
            self.uploader.finish(c.upload_wait if self.finished else 0)
        if self.finished:
            return cli.DONE
        say(f"stopped by a signal at step {self.step} of {self.last_step}, saved: run the same command to resume")
        return cli.SAVED

    def close(self, patience: float | None = None) -> None:
        """Finish the checkpoint in flight, wait at most `patience` seconds for exports, and release the run folder's
        lock."""
        self.checkpointer.close(patience)
        if self.lock:
            self.lock.close()
