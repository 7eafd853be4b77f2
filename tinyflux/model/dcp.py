"""Read a run's checkpoint folders (torch.distributed.checkpoint) in one process, without a process group.

`metadata.json` is written last: a folder without it is not valid. It has the sizes and checksums of all files, and its
own checksum. DCP's `.metadata` is a pickle; only the few types that DCP needs are unpickled, so a folder cannot run
code.
"""

import json
import os
import pickle
import re
import stat
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from tinyflux.model.lora import Lora, detach, merged
from tinyflux.util.files import atomic_write

METADATA = "metadata.json"
TYPES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"Path", "PosixPath"},
    "pathlib._local": {"Path", "PosixPath"},  # their module in Python 3.13
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name not in TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module.removesuffix("._local"), name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args, **kwargs) -> Metadata:
        path = Path(self.path, ".metadata")
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is refused or damaged: {error}") from error
        for entry in metadata.storage_data.values():
            _check_name(path, entry.relative_path)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _check_name(source: Path, name: str) -> None:
    if Path(name).name != name:
        raise ValueError(f"{source} is refused: it names {name!r}, which is not a file of its folder")


class Damaged(ValueError):
    """A checkpoint is damaged: a file is missing, or its size or checksum is wrong.

    A file that cannot be read (EIO, ESTALE) raises OSError instead: it may be intact.
    """


def step_in(name: str) -> int | None:
    """N of a name that starts with step_N: a checkpoint or a file exported from it; None for any other name."""
    match = re.match(r"step_(\d+)", name)
    return int(match[1]) if match else None


def step_of(folder: Path) -> int:
    """N of a folder named exactly step_N, -1 for any other."""
    step = step_in(folder.name)
    return step if folder.name == f"step_{step}" else -1


def _checksum(metadata: dict) -> int:
    return zlib.crc32(json.dumps(metadata, sort_keys=True).encode())


def write_metadata(folder: Path, metadata: dict) -> None:
    """Write a checkpoint's metadata, which makes it complete."""
    metadata = json.loads(json.dumps(metadata))  # as it will be read
    atomic_write(folder / METADATA, json.dumps({**metadata, "crc32": _checksum(metadata)}, indent=2))


def read_metadata(folder: Path) -> dict:
    """The metadata of a complete checkpoint. Raises Damaged."""
    path = folder / METADATA
    try:
        metadata = json.loads(path.read_bytes())
        crc = metadata.pop("crc32")
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing: the save was interrupted") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"{path} is damaged: {error}") from error
    if crc != _checksum(metadata):
        raise Damaged(f"{path} is damaged: its checksum differs from the one at its end")
    return metadata


def crc32(path: Path) -> int:
    """The checksum of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def check_files(folder: Path) -> dict:
    """The metadata of a checkpoint, after checking all its files. Raises Damaged with the bad file."""
    metadata = read_metadata(folder)
    for name, (size, crc) in metadata["files"].items():
        _check_name(folder / METADATA, name)
        path = folder / name
        try:
            found = os.stat(path)
            sound = stat.S_ISREG(found.st_mode) and found.st_size == size
            if sound and crc32(path) != crc:
                raise Damaged(f"{path} is damaged: its checksum differs from the one in {METADATA}")
        except FileNotFoundError:
            sound = False
        if not sound:
            raise Damaged(f"{path} is missing or not {size} bytes long")
    return metadata


def flat_planner() -> dcp.DefaultLoadPlanner:
    """To load a state without nested dicts. The default one changes, for the whole process and for a moment, how any
    thread flattens a state: a save beside it would not know its own tensors."""
    return dcp.DefaultLoadPlanner(flatten_state_dict=False)


def read_tensors(folder: Path, *kinds: str) -> dict[str, Tensor]:
    """The full tensors of a checkpoint folder whose names start with `model.`, `ema.` or `optimizer.`, on the CPU.

    Reads in one process, without using a process group.
    """
    reader = _Reader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.partition(".")[0] in kinds
    }
    # true and intended
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    dcp.load(state, storage_reader=reader, planner=flat_planner(), no_dist=True)
    return state


def of_kind(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors `kind.NAME`, by NAME."""
    return {name.removeprefix(f"{kind}."): x for name, x in state.items() if name.startswith(f"{kind}.")}


def lora_alpha(metadata: dict) -> float | None:
    """Alpha of the adapters of a checkpoint's run, None if it has no adapters."""
    trainer = (metadata.get("config") or {}).get("trainer") or {}
    return trainer["lora_alpha"] if trainer.get("lora_rank") else None


def read_adapters(folder: Path, kind: str) -> Lora | None:
    """The adapters of a checkpoint folder, trained ("model") or averaged ("ema"); None if it has none."""
    alpha = lora_alpha(read_metadata(folder))
    return None if alpha is None else detach(of_kind(read_tensors(folder, kind), kind), alpha)[1]


def read_checkpoint(folder: Path, *kinds: str) -> dict:
    """The content of this folder's `step_N.pt`, with weights in the layout in memory: `model`, `ema`, `optimizer` (by
    parameter name), if requested, and `scheduler`, `step`, `epoch`, `best_loss`, `trainer_config`.

    Adapters are merged into the weights.
    """
    state, metadata = read_tensors(folder, *kinds), read_metadata(folder)
    content: dict = {kind: of_kind(state, kind) for kind in kinds if kind != "optimizer"}
    if (alpha := lora_alpha(metadata)) is not None:
        content = {kind: merged(weights, alpha) for kind, weights in content.items()}
    if "optimizer" in kinds:
        optimizer: dict[str, dict[str, Tensor]] = {}
        for name, tensor in of_kind(state, "optimizer").items():
            parameter, _, entry = name.rpartition(".")
            optimizer.setdefault(parameter, {})[entry] = tensor
        content["optimizer"] = {"state": optimizer}
    config = metadata.get("config") or {}
    return content | {
        "scheduler": {"last_epoch": metadata["step"]},  # every schedule is a function of the step
        **{key: metadata[key] for key in ("step", "epoch", "best_loss")},
        "trainer_config": config.get("trainer"),
    }
