"""Checkpoints: sharded and asynchronous (torch.distributed.checkpoint), atomic, resumed automatically.

    step_N/                     one .distcp file per rank (weights, optimizer, EMA), and
    step_N/metadata.json        step, configs, data, checksums; written last: a folder without it is not valid
    step_N/published            its exports are written, copied and queued for upload
    step_N[_ema].safetensors    the same weights in the published layout, written later (see export.py)
    step_N.pt                   everything in one file, on request
    best_ema.safetensors        averaged weights with the lowest validation loss
    config.json, training_config.json

DCP's own .metadata file is a pickle: resume only from step_N folders that you wrote yourself, never from a hub.
"""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDone
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.dcp import (
    METADATA,
    Damaged,
    check_files,
    crc32,
    flat_planner,
    read_metadata,
    step_of,
    write_metadata,
)
from tinyflux.model.loader import load_model
from tinyflux.run import folders, identity
from tinyflux.run.export import KINDS, LORA, Exporter, beside, export_missing
from tinyflux.run.folders import list_checkpoints, patiently
from tinyflux.run.staging import Staging
from tinyflux.util.cli import Failed
from tinyflux.util.files import atomic_write, replaced
from tinyflux.util.log import say

# errors of a full disk or a damaged file
FAILURES = (CheckpointException, OSError, RuntimeError, ValueError, SafetensorError)
PUBLISHED = "published"
RETRY = 60.0
"""Seconds after which a failed save is retried."""
APART = 2**28
"""State size in bytes from which exports run in a separate process: a thread would block the interpreter for seconds,
while a process takes seconds to start."""


class Planner(DefaultSavePlanner):
    """Plans a state once: later saves with the same names, shapes and placements send nothing to rank 0.

    torch caches plans per class; here each start of a run has its own, by `key`.
    """

    def __init__(self, key: str):
        super().__init__(enable_plan_caching=True)
        self._cached_plans_key = key

    @classmethod
    def forget(cls, key: str) -> None:
        """Drop the plans of a key."""
        for kept in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata"):
            getattr(cls, f"_cached_{kept}").pop(key, None)


def first_replica(state: dict[str, Tensor]) -> list[int]:
    """The ranks that hold one complete copy of a sharded state, including rank 0. The others hold the same shards."""
    mesh = next((x.device_mesh for x in state.values() if isinstance(x, DTensor)), None)
    return [0] if mesh is None else mesh.mesh.reshape(-1, mesh.size(mesh.ndim - 1))[0].tolist()


def _check_names(folder: Path, state: dict) -> None:
    """Raises ValueError if a checkpoint lacks tensors of a run's state, or has them with other shapes."""
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    flat, _ = flatten_state_dict(state)
    if missing := [name for name, x in flat.items() if name not in stored or stored[name].size != x.shape]:
        raise ValueError(
            f"{folder} has no {missing[0]} of shape {list(flat[missing[0]].shape)} (and lacks {len(missing)} tensors in"
            " total): its run had another network, trainer.optimizer, trainer.freeze or trainer.lora_*; use those of"
            " the training_config.json beside it, or start a new run from its weights with --run-dir OTHER"
            f" --trainer.init-from {folder.parent.parent}"
        )


def starting_weights(source: str, root: Path) -> tuple[TinyFluxConfig, dict[str, Tensor] | None]:
    """Config and weights (on rank 0, {} elsewhere) to fine-tune from: a file, a folder or user/repo[:sub/folder].

    If `root` already has checkpoints, the run is resumed instead: returns their config, and None. Must be called on all
    ranks.
    """
    found: list = [None, False]
    state: dict[str, Tensor] = {}
    if dist.get_rank() == 0:
        if patiently(lambda: list_checkpoints(root)):
            found = [TinyFluxConfig.from_json(root / "config.json"), True]
        else:
            model = load_model(source, use_ema=True)
            found, state = [model.config, False], model.state_dict()
            say(f"starting from the weights of {source}")
    dist.broadcast_object_list(found, src=0)
    config, resuming = found
    return config, None if resuming else state


class Checkpointer:
    """Saves and finds the checkpoints of a run.

    A save copies the shards into persistent buffers and returns; a thread writes them. If several replicas hold the
    same shards, only the first writes. A second thread on rank 0 then exports, uploads and prunes. Writing uses its own
    process groups, so that its collectives do not mix with those of the training step.
    training_config: the run's settings, recorded in and beside its checkpoints.
    upload: called on rank 0, in that thread, with the folder of a checkpoint whose weights are to be uploaded.
    every: seconds after which another save is due (0: never).
    """

    def __init__(
        self,
        root: Path,
        config: TinyFluxConfig,
        training_config: dict,
        *,
        keep_steps: int = 3,
        keep_epochs: int = 3,
        save_pt: bool = False,
        upload: Callable[[Path], None] | None = None,
        every: float = 0.0,
    ):
        self.root, self.config, self.save_pt, self.upload, self.every = root, config, save_pt, upload, every
        self.training_config = training_config
        self.keep = {"step": keep_steps, "epoch": keep_epochs, "best": 1}
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
        self.savers: dist.ProcessGroup | None = None  # ranks of the first replica
        self.saves = False
        self.writing, self.publishing = ThreadPoolExecutor(1, "checkpoint"), ThreadPoolExecutor(1, "exports")
        self.exporter: Exporter | None = None  # for a large state
        self.staging: Staging | None = None
        self.pending: Future | None = None
        self.published: Future | None = None
        self.newest = -1  # step of the newest complete checkpoint of this process
        self.written = -1  # the same, as rank 0's writing thread knows it
        self.saved_at, self.failed_at = time.monotonic(), None
        self.owed: set[str] = set()  # reasons of failed saves
        self.plan_key = f"{root.resolve()} {time.monotonic_ns()}"
        self.leads = dist.get_rank() == 0
        if self.leads:
            root.mkdir(parents=True, exist_ok=True)
            folders.delete_unfinished(root)
            for folder in patiently(lambda: folders.list_cut(root)):
                say(f"{folder} was not saved completely: renamed to {folders.set_aside(folder, folders.CUT).name}")
        dist.barrier(self.group)

    def write_configs(self) -> None:
        """Write config.json and training_config.json beside the checkpoints, on rank 0."""
        if self.leads:
            atomic_write(self.root / "config.json", json.dumps(self.config.to_dict(), indent=2))
            atomic_write(self.root / "training_config.json", json.dumps(self.training_config, indent=2))

    def prepare(self, state: dict) -> None:
        """Allocate the buffers for saves of `state` (nested dict of tensors), in the background. Must be called on all
        ranks."""
        flat, _ = flatten_state_dict(state)
        ranks = first_replica(flat)
        self.savers = dist.new_group(ranks, backend="gloo", timeout=timedelta(hours=1))
        self.saves = dist.get_rank() in ranks
        if self.saves:
            self.staging = Staging(flat, self.writing)
        if self.leads and sum(x.numel() * x.element_size() for x in flat.values()) >= APART:
            self.exporter = Exporter()

    @property
    def overdue(self) -> bool:
        """Whether a save is due by time, or a failed one is to be retried. Only rank 0's answer is used."""
        now = time.monotonic()
        if self.failed_at is not None:
            return now >= self.failed_at + RETRY
        return self.every > 0 and now >= self.saved_at + self.every

    def save(self, step: int, state: dict, metadata: dict, reasons: set[str]) -> None:
        """Start to save `state` (nested dict of tensors) as step_N, after the previous save. Must be called on all
        ranks.

        reasons: which of "step", "epoch" and "best" it is kept for, and "upload". A failure is reported, not raised.
        """
        self.wait()
        if self.savers is None:
            self.prepare(state)
        self.saved_at, self.failed_at = time.monotonic(), None
        folder = self.root / f"step_{step}"
        if self.saves:
            copied = self.staging.copy(flatten_state_dict(state)[0])
            metadata = {**metadata, "step": step, "reasons": sorted(reasons | self.owed)}
            self.pending = self.writing.submit(self._write, *copied, folder, metadata)
        else:
            self.pending = Future()
            self.pending.set_result(None)

    def _write(self, state: dict[str, Tensor], wait: Callable[[], None], folder: Path, metadata: dict) -> None:
        try:
            began = time.monotonic()
            wait()
            dcp.save(state, checkpoint_id=folder, planner=Planner(self.plan_key), process_group=self.savers)
            files = self._checksums(folder)
            if not self.leads:
                return
            write_metadata(folder, {**metadata, "config": self.training_config, "files": files})
            folders.mark_saved(self.root, metadata["step"])
            self.written = metadata["step"]
            say(f"saved {folder.name} in {time.monotonic() - began:.1f} s")
            self.owed = set()
            self.published = self.publishing.submit(self._publish, folder)
        except FAILURES as error:
            self.failed_at, self.owed = time.monotonic(), self.owed | set(metadata["reasons"])
            say(
                f"WARNING: saving {folder} failed: {error}\n  training continues and retries within {RETRY:g} s;"
                " earlier checkpoints are intact"
            )
            if self.leads and not (folder / METADATA).is_file():
                shutil.rmtree(folder, ignore_errors=True)  # free the disk space for the next save

    def _checksums(self, folder: Path) -> dict[str, tuple[int, int]]:
        """Size and CRC of each file of a checkpoint, on rank 0; each rank reads its own."""
        found: dict[str, tuple[int, int]] | str
        try:
            names = [*folder.glob(f"__{dist.get_rank(self.savers)}_*"), *([folder / ".metadata"] if self.leads else [])]
            found = {path.name: (path.stat().st_size, crc32(path)) for path in names}
        except OSError as error:
            found = str(error)
        everyone = [None] * dist.get_world_size(self.savers) if self.leads else None
        dist.gather_object(found, everyone, dst=0, group=self.savers)
        if faults := [files for files in everyone or () if isinstance(files, str)]:
            raise RuntimeError(faults[0])
        return {name: sizes for files in everyone or () for name, sizes in sorted(files.items())}

    def _publish(self, folder: Path) -> None:
        """Export, upload and prune, after a checkpoint is complete. On rank 0, in a thread."""
        try:
            reasons = read_metadata(folder)["reasons"]
            (self.exporter or export_missing)(folder, save_pt=self.save_pt)
            if self.exporter and self.exporter.stopped:
                return
            best = next((path for path, kept_for in self._reasons().items() if "best" in kept_for), None)
            if folder == best:  # an older one may be exported late
                with replaced(self.root / "best_ema.safetensors") as temporary:
                    shutil.copyfile(beside(folder, KINDS[0]), temporary)
            if self.upload and "upload" in reasons:
                self.upload(folder)
            (folder / PUBLISHED).touch()
        except FAILURES as error:
            say(f"WARNING: exporting {folder} failed: {error}\n  the checkpoint itself is complete")
        try:
            self._prune()
        except FAILURES as error:
            say(f"WARNING: old checkpoints could not be deleted: {error}")

    def _reasons(self) -> dict[Path, list[str]]:
        """Why each checkpoint is kept, newest first. One with damaged metadata is set aside with a warning."""
        found = {}
        for folder in list_checkpoints(self.root):
            try:
                found[folder] = read_metadata(folder)["reasons"]
            except Damaged as error:
                say(f"WARNING: {error}\n  renamed to {folders.set_aside(folder, folders.DAMAGED).name}")
        return found

    def _is_published(self, folder: Path) -> bool:
        return (folder / PUBLISHED).exists() and all(beside(folder, kind).exists() for kind in KINDS)

    def _prune(self) -> None:
        """Delete old checkpoints: the newest few of each reason are kept, and the newest of all."""
        reasons = self._reasons()
        found = [*reasons]
        kept = set(found[:1])
        for reason, count in self.keep.items():
            having = [folder for folder in found if reason in reasons[folder]]
            kept.update(having[:count] if count else having)
        for folder in set(found) - kept:
            for kind in (*KINDS, ".pt"):  # while the folder is valid: if this is interrupted, the next start repeats it
                beside(folder, kind).unlink(missing_ok=True)
            shutil.rmtree(beside(folder, LORA), ignore_errors=True)
            (folder / METADATA).unlink()  # first make it invalid, then delete it
            shutil.rmtree(folder)
        for path in folders.cut_before(self.root, max(map(step_of, found), default=-1)):
            shutil.rmtree(path)

    def wait(self) -> None:
        """Wait until the save in flight is complete; then every rank knows what is saved. Must be called on all
        ranks."""
        if self.pending is None:
            return
        self.pending.result()
        self.pending = None
        found = [None]
        if self.leads:
            found = [self.written if self.failed_at is None else None]
        dist.broadcast_object_list(found, src=0, group=self.group)
        if found[0] is None:  # plans are useless unless all ranks have them
            Planner.forget(self.plan_key)
            self.plan_key += "+"
        else:
            self.newest = found[0]

    def load_newest(self, state: dict, *, start_over: bool = False) -> dict | None:
        """Load the newest valid checkpoint into the tensors of `state`; a damaged one is set aside with a warning. Then
        write the configs. Must be called on all ranks.

        Returns its metadata, or None if there is no checkpoint and a run may start. Raises RuntimeError if all are
        damaged, OSError if the folder or a file cannot be read (then nothing is set aside), ValueError if they are of
        another network or another kind of training, or if there are remains of a run but no checkpoint, unless
        `start_over`.
        """
        found: list = [None, None]
        if self.leads:
            try:
                found = [self._newest_sound(start_over), None]
            except (OSError, RuntimeError, ValueError) as error:
                found = [None, error]
        dist.broadcast_object_list(found, src=0, group=self.group)
        if found[1] is not None:
            raise found[1]
        if found[0] is None:
            self.write_configs()
            return None
        folder, metadata = found[0]
        _check_names(folder, state)
        dcp.load(flatten_state_dict(state)[0], checkpoint_id=folder, planner=flat_planner(), process_group=self.group)
        for change in identity.changes(metadata.get("config") or {}, self.training_config):
            say(f"WARNING: since this checkpoint {change}")
        self.write_configs()
        if self.leads:  # exports that a stop or a kill left out, including the best weights
            for kept in reversed(patiently(lambda: list_checkpoints(self.root))):
                if not self._is_published(kept):
                    self.published = self.publishing.submit(self._publish, kept)
        return metadata

    def _newest_sound(self, start_over: bool) -> tuple[Path, dict] | None:
        path = self.root / "config.json"
        if path.exists() and TinyFluxConfig.from_json(path) != self.config:
            raise ValueError(f"{path} describes another network than the configured one: choose another run folder")
        found = patiently(lambda: list_checkpoints(self.root))
        for folder in found:
            try:
                return folder, patiently(lambda folder=folder: check_files(folder))
            except Damaged as error:
                aside = folders.set_aside(folder, folders.DAMAGED)
                say(f"WARNING: {error}\n  renamed to {aside.name}; falling back to the checkpoint before it")
        if found:
            raise Failed(f"all checkpoints in {self.root} are damaged, see above")
        left = folders.leftovers(self.root)
        if left and not start_over:
            raise ValueError(
                f"{self.root.parent} has remains of a run but no checkpoint: {', '.join(left[:5])}"
                f"{', ...' if len(left) > 5 else ''}. Restore a checkpoint (a .damaged folder may be repairable),"
                " choose another --run-dir, or start at step 0 here with --start-over"
            )
        return None

    def close(self, patience: float | None = None) -> None:
        """Wait for the save in flight and, at most `patience` seconds, for exports; stop the threads. Missing exports
        are written at the next start. Must be called on all ranks."""
        self.wait()
        if self.published is not None:
            try:
                self.published.result(patience)
            except NotDone:
                say("the newest checkpoint is saved; its .safetensors files are written at the next start")
                if self.exporter:
                    self.exporter.stop()
        self.writing.shutdown()
        self.publishing.shutdown()
        Planner.forget(self.plan_key)
