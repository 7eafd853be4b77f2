"""Read legacy caches: folders with encodings.pt, lune.pt and sol.pt, the format before shards."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyflux.shards.manifest import check_name
from tinyflux.shards.schema import DTYPES, SCHEMA, Field, fields_of
from tinyflux.util.buckets import BUCKETS
from tinyflux.util.plain import load_plain

FILES = {  # file -> its fields
    "encodings": ("latents", "t5_embeds", "clip_pooled"),
    "lune": ("lune",),
    "sol": ("sol_stats", "sol_spatial"),
}
NAMES = {  # what a field is called in those files; a file of one tensor needs no name
    "latents": ("latents", "latent"),
    "t5_embeds": ("t5_embeds", "t5", "t5_embeddings"),
    "clip_pooled": ("clip_pooled", "clip", "pooled"),
    "lune": ("features", "lune", "lune_features"),
    "sol_stats": ("stats", "sol_stats"),
    "sol_spatial": ("spatial", "sol_spatial"),
}
SHAPES = {
    "latents": "[N, C, H, W]",
    "t5_embeds": "[N, L, D]",
    "clip_pooled": "[N, D]",
    "lune": "[N, K, D]",
    "sol_stats": "[N, K, 3]",
    "sol_spatial": "[N, K, h, w]",
}
PRODUCER = {"producer": "unknown: converted from a legacy cache"}


class LegacyError(ValueError):
    """A file of a legacy cache that cannot be used; the message names it and the key."""


def is_legacy(folder: str | Path) -> bool:
    """Whether a folder has a legacy cache and no shards."""
    folder = Path(folder)
    return (folder / "encodings.pt").is_file() and not (folder / "manifest.json").exists()


class LegacyCache:
    """The rows of a legacy cache, memory-mapped: `read` reads only the requested rows.

    Raises FileNotFoundError without encodings.pt; LegacyError if a file is damaged, has more than plain data, or does
    not match the other files.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.prompts = Path(folder), None
        self.grids = dict.fromkeys(("lune", "sol"), BUCKETS)
        self.tensors: dict[str, Tensor] = {}
        if not (self.folder / "encodings.pt").is_file():
            raise FileNotFoundError(f"{self.folder}: no encodings.pt here, so this is not a legacy cache")
        for file in FILES:
            if (self.folder / f"{file}.pt").is_file():
                self._add(file, self.folder / f"{file}.pt")
        self.name = self._name()
        self.count = len(self.tensors["latents"])
        for name, tensor in self.tensors.items():
            if len(tensor) != self.count:
                raise LegacyError(f"{self.folder}: {name} has {len(tensor)} rows, latents have {self.count}")
        if not self.count:
            raise LegacyError(f"{self.folder}: the cache is empty")
        if self.prompts is not None and len(self.prompts) != self.count:
            raise LegacyError(f"{self.folder}: {len(self.prompts)} prompts for {self.count} samples")

    def _add(self, file: str, path: Path) -> None:
        content = _load(path)
        if isinstance(content, Tensor) and len(FILES[file]) == 1:
            content = {file: content}
        if not isinstance(content, dict):
            raise LegacyError(f"{path}: contains a {type(content).__name__}, must be a dictionary of tensors")
        for name in FILES[file]:
            key = next((key for key in NAMES[name] if key in content), None)
            if key is None:
                found = ", ".join(map(str, content)) or "nothing"
                raise LegacyError(f"{path}: no {name}, which may be called {', '.join(NAMES[name])}; it has {found}")
            self.tensors[name] = _checked(content[key], name, f"{path}: {key}")
        grid = content.get("t_buckets", content.get("buckets"))
        if file != "encodings" and grid is not None:
            grid = [round(float(t), 4) for t in torch.as_tensor(grid).float()]
            if grid != list(BUCKETS):
                raise LegacyError(f"{path}: its timesteps are {grid}, must be {list(BUCKETS)}")
        if file == "encodings" and isinstance(content.get("prompts"), list):
            self.prompts = [str(prompt) for prompt in content["prompts"]]

    def _name(self) -> str:
        """The cache's name from meta.pt, else from its folder, reduced to characters allowed in shard names."""
        meta = _load(self.folder / "meta.pt") if (self.folder / "meta.pt").is_file() else {}
        name = meta.get("name") if isinstance(meta, dict) else None
        for candidate in (name, self.folder.resolve().name):
            try:
                return check_name(candidate)
            except ValueError:
                continue
        return "cache"

    @property
    def fields(self) -> dict[str, Field]:
        """The fields of its samples."""
        return fields_of(self.row(0))

    @property
    def shapes(self) -> np.ndarray:
        """The latent (h, w) of each sample, int64 [N, 2]."""
        return np.tile(np.array(self.tensors["latents"].shape[-2:]), (self.count, 1))

    def read(self, group: str, indices: np.ndarray) -> dict[str, Tensor]:
        """The fields of a group at rows `indices` int64 [B]: [B, ...] each, in the stored dtype."""
        rows = torch.from_numpy(indices)
        return {name: self.tensors[name][rows] for name in SCHEMA[group].fields}

    def row(self, i: int) -> dict[str, Tensor]:
        """All tensors of a sample."""
        return {name: tensor[i].clone() for name, tensor in self.tensors.items()}

    def prompt(self, i: int) -> str:
        """The caption of a sample."""
        return self.prompts[i] if self.prompts else ""

    def null(self) -> dict[str, Tensor]:
        """Zeros for the empty prompt, as in the original trainer's text dropout."""
        return {name: torch.zeros_like(self.tensors[name][0]) for name in ("t5_embeds", "clip_pooled")}


def _load(path: Path) -> Any:
    try:
        return load_plain(path, mmap=True)
    except ValueError as error:
        raise LegacyError(str(error)) from error


def _checked(tensor, name: str, where: str) -> Tensor:
    wanted = SHAPES[name]
    if not isinstance(tensor, Tensor):
        raise LegacyError(f"{where} is a {type(tensor).__name__}, must be a tensor {wanted}")
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise LegacyError(f"{where} is {tensor.dtype}, must be one of {', '.join(DTYPES)}")
    buckets = name in ("lune", "sol_stats", "sol_spatial")
    if tensor.ndim != wanted.count(",") + 1 or buckets and tensor.shape[1] != len(BUCKETS):
        with_buckets = f" with K = {len(BUCKETS)} timestep buckets" if buckets else ""
        raise LegacyError(f"{where} has shape {list(tensor.shape)}, must be {wanted}{with_buckets}")
    return tensor
