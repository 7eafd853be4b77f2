"""Checkpoints: sharded and asynchronous (torch.distributed.checkpoint), complete or invisible, resumed by themselves.

    step_N/                     one .distcp file a rank (weights, optimizer, EMA), and
    step_N/metadata.json        written last: without it the folder does not count. Step, data identity, checksums.
    step_N[_ema].safetensors    the same weights in the published layout
    step_N.pt                   all of it in one file, on request
    best_ema.safetensors        of the lowest validation loss
    config.json, training_config.json

    python -m tinyflux.run.checkpoint export RUN_DIR/checkpoints/step_N [--out FILE.safetensors|FILE.pt] [--no-ema]

DCP's own .metadata file is a pickle: resume step_N folders only where you wrote them, and never from a hub.
"""

import fcntl
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException

from tinyflux.model.dcp import METADATA, check_files, crc32, of_kind, read_checkpoint, read_metadata, read_tensors
from tinyflux.model.loader import load_model, save_published, to_published
from tinyflux.model.model import TinyFluxConfig
from tinyflux.run.staging import Staging
from tinyflux.shards.writer import atomic_write
from tinyflux.util.log import say

FAILURES = (CheckpointException, OSError, RuntimeError, ValueError)  # what a full disk or a damaged file raises


def lock(run_dir: Path, patience: float = 120) -> IO | None:
    """Hold a run folder until the file returned is closed. Waits for a training that is just stopping in it.

    Raises RuntimeError where the other one goes on. None on a file system without locks.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file, deadline, waiting = open(run_dir / ".lock", "a+"), time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"another training runs in {run_dir}: stop it, or choose another folder") from None
            if not waiting:
                say(f"waiting for another training to leave {run_dir}")
            waiting = True
            time.sleep(0.5)
        except OSError as error:
            say(f"WARNING: {run_dir} cannot be locked ({error}): start one training there at a time")
            file.close()
            return None


def _step(folder: Path) -> int:
    match = re.fullmatch(r"step_(\d+)", folder.name)
    return int(match[1]) if match else -1


def list_checkpoints(root: str | Path) -> list[Path]:
    """The complete checkpoints of a folder, newest first."""
    folders = [path for path in Path(root).glob("step_*") if _step(path) >= 0 and (path / METADATA).is_file()]
    return sorted(folders, key=_step, reverse=True)


def newest_identity(root: str | Path) -> dict:
    """What the data of the newest checkpoint of a folder depended on, {} where there is none."""
    for folder in list_checkpoints(root):
        try:
            return read_metadata(folder).get("identity", {})
        except FAILURES:  # resuming says what is wrong with it, and takes the one before it too
            continue
    return {}


def _check_names(folder: Path, state: dict) -> None:
    """Raises ValueError where a checkpoint lacks tensors of a run's state."""
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    names, _ = flatten_state_dict(state)
    if missing := [name for name in names if name not in stored]:
        raise ValueError(
            f"{folder} has no {missing[0]} (and lacks {len(missing)} tensors in all): it is of a run with another"
            " trainer.optimizer or trainer.freeze; keep those of the training_config.json beside it, or start a new"
            f" run from its weights with --run-dir OTHER --trainer.init-from {folder.parent.parent}"
        )


def export(folder: Path, config: TinyFluxConfig, out: Path, *, ema: bool = True) -> Path:
    """Write a checkpoint folder's weights in the published layout. Returns `out`.

    A `.safetensors` file has the averaged weights, or the trained ones with `ema=False`; a `.pt` file has both, the
    optimizer's state by parameter name, step, epoch, best_loss and the configs, and loads with `weights_only=True`.
    """
    if out.suffix == ".safetensors":
        kind = "ema" if ema else "model"
        save_published(of_kind(read_tensors(folder, kind), kind), out, config)
        return out
    if out.suffix != ".pt":
        raise ValueError(f"{out}: a checkpoint is exported to .safetensors or .pt")
    content = read_checkpoint(folder, "model", "ema", "optimizer") | {"model_config": config.to_dict()}
    content |= {kind: to_published(content[kind], config) for kind in ("model", "ema")}
    temporary = out.with_name(f".{out.name}.tmp")
    torch.save(content, temporary)
    os.replace(temporary, out)
    return out


def starting_weights(source: str, root: Path) -> tuple[TinyFluxConfig, dict[str, Tensor] | None]:
    """Config and weights (on rank 0, {} elsewhere) to fine-tune from: a file, a folder or user/repo[:sub/folder].

    Where `root` has checkpoints already the run is resumed instead: their config, and None. A collective.
    """
    found: list = [None, False]
    state: dict[str, Tensor] = {}
    if dist.get_rank() == 0:
        if list_checkpoints(root):
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

    A save copies the shards into buffers that are kept, and returns; a thread writes them, then checksums, exports and
    prunes on rank 0. It has a process group of its own, so that its collectives never meet those of the training step.
    upload: called on rank 0, in that thread, with the folder of a checkpoint whose weights are to be uploaded.
    """

    def __init__(
        self,
        root: Path,
        config: TinyFluxConfig,
        *,
        keep_steps: int = 3,
        keep_epochs: int = 3,
        save_pt: bool = False,
        upload: Callable[[Path], None] | None = None,
    ):
        self.root, self.config, self.save_pt, self.upload = root, config, save_pt, upload
        self.keep = {"step": keep_steps, "epoch": keep_epochs, "best": 1}
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
        self.executor = ThreadPoolExecutor(1, "checkpoint")
        self.staging: Staging | None = None
        self.pending: Future | None = None
        self.newest = -1  # step of the newest complete checkpoint of this process
        self.leads = dist.get_rank() == 0
        if self.leads:
            root.mkdir(parents=True, exist_ok=True)
            for path in root.glob("step_*"):
                if _step(path) >= 0 and path.is_dir() and not (path / METADATA).is_file():
                    shutil.rmtree(path)  # a save that was cut off
        dist.barrier(self.group)

    def write_configs(self, training_config: dict) -> None:
        """Write config.json and training_config.json beside the checkpoints.

        Raises ValueError on every rank where the folder holds checkpoints of another network.
        """
        path = self.root / "config.json"
        if path.exists() and TinyFluxConfig.from_json(path) != self.config:
            raise ValueError(f"{path} is another network than the one configured: choose another run folder")
        dist.barrier(self.group)
        if self.leads:
            atomic_write(path, json.dumps(self.config.to_dict(), indent=2).encode())
            atomic_write(self.root / "training_config.json", json.dumps(training_config, indent=2).encode())

    def prepare(self, state: dict) -> None:
        """Get the memory that saves of `state` (nested dict of tensors) need, in the background."""
        self.staging = Staging(flatten_state_dict(state)[0], self.executor)

    def save(self, step: int, state: dict, metadata: dict, reasons: set[str]) -> None:
        """Begin to save `state` (nested dict of tensors) as step_N, after the save before it. A collective.

        reasons: which of "step", "epoch" and "best" it is kept for, and "upload". A failure is reported, not raised.
        """
        self.wait()
        if self.staging is None:
            self.prepare(state)
        copied = self.staging.copy(flatten_state_dict(state)[0])
        metadata = {**metadata, "step": step, "reasons": sorted(reasons)}
        self.pending = self.executor.submit(self._write, *copied, self.root / f"step_{step}", metadata)

    def _write(self, state: dict[str, Tensor], wait: Callable[[], None], folder: Path, metadata: dict) -> None:
        try:
            wait()
            dcp.save(state, checkpoint_id=folder, process_group=self.group)
            if not self.leads:
                return
            files = [path for path in sorted(folder.iterdir()) if path.name != METADATA]
            metadata["files"] = {path.name: [path.stat().st_size, crc32(path)] for path in files}
            atomic_write(folder / METADATA, json.dumps(metadata, indent=2).encode())
            weights = export(folder, self.config, folder.with_name(f"{folder.name}_ema.safetensors"))
            export(folder, self.config, folder.with_name(f"{folder.name}.safetensors"), ema=False)
            if self.save_pt:
                export(folder, self.config, folder.with_name(f"{folder.name}.pt"))
            if "best" in metadata["reasons"]:
                shutil.copyfile(weights, self.root / ".best.tmp")
                os.replace(self.root / ".best.tmp", self.root / "best_ema.safetensors")
            if self.upload and "upload" in metadata["reasons"]:
                self.upload(folder)
            self._prune()
        except FAILURES as error:
            say(f"WARNING: saving {folder} failed: {error}\n  training goes on; the checkpoints before it are intact")
            if self.leads and not (folder / METADATA).is_file():
                shutil.rmtree(folder, ignore_errors=True)

    def _prune(self) -> None:
        """Delete what no reason keeps: of each reason the newest few stay, and the newest of all."""
        folders = list_checkpoints(self.root)
        reasons = {folder: read_metadata(folder)["reasons"] for folder in folders}
        kept = set(folders[:1])
        for reason, count in self.keep.items():
            having = [folder for folder in folders if reason in reasons[folder]]
            kept.update(having[:count] if count else having)
        for folder in set(folders) - kept:
            (folder / METADATA).unlink()  # invisible first, then gone
            shutil.rmtree(folder)
            for suffix in (".safetensors", "_ema.safetensors", ".pt"):
                folder.with_name(folder.name + suffix).unlink(missing_ok=True)

    def wait(self) -> None:
        """Wait for the save in flight; afterwards every rank knows what is saved. A collective."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None
            found = [_step(list_checkpoints(self.root)[0]) if self.leads and list_checkpoints(self.root) else -1]
            dist.broadcast_object_list(found, src=0, group=self.group)
            self.newest = found[0]

    def load_newest(self, state: dict) -> dict | None:
        """Load the newest sound checkpoint into the tensors of `state`; a damaged one is set aside, loudly.

        Returns its metadata, or None where there is no checkpoint. Raises RuntimeError where none can be read.
        """
        found = [list_checkpoints(self.root)]
        dist.broadcast_object_list(found, src=0, group=self.group)
        for folder in found[0]:
            fault = [None]
            if self.leads:
                try:
                    check_files(folder)
                except FAILURES as error:
                    fault = [str(error)]
            dist.broadcast_object_list(fault, src=0, group=self.group)
            if fault[0] is None:
                metadata = read_metadata(folder)
                _check_names(folder, state)
                dcp.load(state, checkpoint_id=folder, process_group=self.group)
                return metadata
            say(f"WARNING: {folder} cannot be used: {fault[0]}\n  falling back to the checkpoint before it")
            if self.leads:
                folder.rename(folder.with_name(f"{folder.name}.damaged"))
        if found[0]:
            raise RuntimeError(f"none of the checkpoints in {self.root} can be read: move it away to start anew")
        return None

    def close(self) -> None:
        """Wait for the save in flight and stop the thread."""
        self.wait()
        self.executor.shutdown()


def main(argv: list[str]) -> int:
    """The command of this module."""

    def command(folder: tyro.conf.Positional[Path], out: Path | None = None, ema: bool = True) -> None:
        """Write a checkpoint folder's weights in the published layout.

        Args:
            folder: RUN_DIR/checkpoints/step_N, or RUN_DIR for its newest checkpoint.
            out: a .safetensors or .pt file; by default step_N_ema.safetensors or step_N.safetensors, beside the folder.
            ema: the averaged weights, or those that were trained. A .pt file has both.
        """
        if not (folder / METADATA).is_file():
            found = list_checkpoints(folder) or list_checkpoints(folder / "checkpoints")
            if not found:
                raise FileNotFoundError(f"{folder}: no complete checkpoint here")
            folder = found[0]
        check_files(folder)
        config = TinyFluxConfig.from_json(folder.parent / "config.json")
        out = out or folder.with_name(f"{folder.name}{'_ema' if ema else ''}.safetensors")
        print(export(folder, config, out, ema=ema))

    try:
        tyro.extras.subcommand_cli_from_dict({"export": command}, args=argv, description=__doc__)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
