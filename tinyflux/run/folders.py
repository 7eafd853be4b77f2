"""A run's folder: its lock, its checkpoints by name, and folders that are set aside.

.saved                      step of the newest checkpoint that was ever complete here
checkpoints/step_N/         a checkpoint; complete if it has a metadata.json
checkpoints/step_N.cut      an interrupted save; deleted when a later checkpoint is complete
checkpoints/step_N.damaged  a checkpoint with a wrong file size or checksum
"""

import os
import re
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from tinyflux.model.dcp import METADATA, Damaged, read_metadata, step_of
from tinyflux.util.cli import Failed
from tinyflux.util.files import NoLocks, atomic_write, locked
from tinyflux.util.log import say

CUT, DAMAGED = "cut", "damaged"
MARK = ".saved"
PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between retries after an I/O error."""
LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)

T = TypeVar("T")


def patiently(read: Callable[[], T]) -> T:
    """The result of `read`, with retries after an OSError: cluster file systems have temporary failures."""
    for pause in (*PAUSES, None):
        try:
            return read()
        except LASTING:
            raise
        except OSError as error:
            if pause is None:
                raise
            say(f"WARNING: {error}; trying again in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("unreachable")


def lock(run_dir: Path, patience: float = 120) -> ExitStack:
    """Lock a run folder until the result is closed. Waits for another training that is just stopping.

    Raises RuntimeError if the other training continues. Warns if the file system has no locks.
    """
    held, path = ExitStack(), run_dir / ".lock"
    try:
        try:
            held.enter_context(locked(path, timeout=0))
        except TimeoutError:
            say(f"waiting for another training to leave {run_dir}")
            held.enter_context(locked(path, timeout=patience))
    except TimeoutError:
        raise Failed(f"another training runs in {run_dir}: stop it, or choose another folder") from None
    except NoLocks as error:
        say(f"WARNING: {run_dir} cannot be locked ({error}): run only one training there at a time")
    return held


def _names(root: Path) -> list[str]:
    try:
        return os.listdir(root)  # pathlib's glob treats an unreadable folder as empty
    except FileNotFoundError:
        return []


def _is_complete(folder: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(folder / METADATA).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def list_checkpoints(root: str | Path) -> list[Path]:
    """The complete checkpoints in a folder, newest first. Raises OSError if the folder cannot be read."""
    folders = [Path(root, name) for name in _names(Path(root))]
    found = [folder for folder in folders if step_of(folder) >= 0 and _is_complete(folder)]
    return sorted(found, key=step_of, reverse=True)


def list_cut(root: Path) -> list[Path]:
    """Folders of interrupted saves of earlier processes."""
    folders = [root / name for name in _names(root)]
    return [folder for folder in folders if step_of(folder) >= 0 and folder.is_dir() and not _is_complete(folder)]


def delete_unfinished(root: Path) -> None:
    """Delete what killed exports left: hidden temporary files and folders."""
    for path in root.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def set_aside(folder: Path, word: str) -> Path:
    """Rename a checkpoint's folder so that it is ignored. Returns its new path."""
    count = 1
    while (target := folder.with_name(f"{folder.name}.{word}{count if count > 1 else ''}")).exists():
        count += 1
    return folder.rename(target)


def cut_before(root: Path, step: int) -> list[Path]:
    """Folders of interrupted saves at or before a step."""
    pattern = re.compile(rf"step_(\d+)\.{CUT}\d*")
    found = [(match, root / name) for name in _names(root) if (match := pattern.fullmatch(name))]
    return [path for match, path in found if int(match[1]) <= step]


def mark_saved(root: Path, step: int) -> None:
    """Record that this run has had a complete checkpoint: from now on it restarts at step 0 only if asked to."""
    atomic_write(root.parent / MARK, f"{step}\n")


def leftovers(root: Path) -> list[str]:
    """Signs that a run folder without a checkpoint had one: weights, damaged folders, metrics of saved steps."""
    pattern = re.compile(rf"step_\d+(\.{DAMAGED}\d*|(_ema)?\.safetensors|\.pt)|best_ema\.safetensors")
    found = [f"{root.name}/{name}" for name in sorted(_names(root)) if pattern.fullmatch(name)]
    if (root.parent / MARK).exists() and (root.parent / "metrics.jsonl").exists():
        found.append("metrics.jsonl")
    return found


def newest_identity(root: str | Path) -> dict:
    """The data identity of the newest checkpoint in a folder, {} if there is none."""
    for folder in patiently(lambda: list_checkpoints(root)):
        try:
            return patiently(lambda folder=folder: read_metadata(folder)).get("identity", {})
        except Damaged:  # resuming reports it, and also falls back to the one before it
            continue
    return {}
