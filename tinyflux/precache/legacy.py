"""Old caches: folders of encodings.pt, lune.pt and sol.pt, which the package kept before it had shards."""

import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinyflux.shards.format import encode_sample, sample_key
from tinyflux.shards.manifest import check_name
from tinyflux.shards.schema import DTYPES, SCHEMA, Field, fields_of
from tinyflux.util.buckets import BUCKETS

FILES = {  # and the groups that each holds
    "encodings.pt": ("latents", "text"),
    "lune.pt": ("lune",),
    "sol.pt": ("sol",),
}
NAMES = {  # what a field is called in those files; a file of one tensor needs no name
    "latents": ("latents", "latent"),
    "t5_embeds": ("t5_embeds", "t5", "t5_embeddings"),
    "clip_pooled": ("clip_pooled", "clip", "pooled"),
    "lune": ("features", "lune", "lune_features"),
    "sol_stats": ("stats", "sol_stats"),
    "sol_spatial": ("spatial", "sol_spatial"),
}
FINGERPRINT = {"producer": "unknown: converted from an old cache"}


class OldCacheError(ValueError):
    """A file of an old cache that cannot be used; the message names it and the key."""


def is_old_cache(folder: str | Path) -> bool:
    """Whether a folder holds an old cache and no shards."""
    folder = Path(folder)
    return (folder / "encodings.pt").is_file() and not (folder / "manifest.json").exists()


class OldCache:
    """The rows of an old cache, read through a memory map: `read` touches what it is asked for and no more.

    Raises FileNotFoundError without encodings.pt, OldCacheError where a file is damaged, holds more than plain data,
    or does not fit the others.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.timesteps, self.prompts = Path(folder), BUCKETS, None
        self.tensors: dict[str, Tensor] = {}
        if not (self.folder / "encodings.pt").is_file():
            raise FileNotFoundError(f"{self.folder}: no encodings.pt here, so this is no old cache")
        for file, groups in FILES.items():
            if (self.folder / file).is_file():
                self._add(groups, self.folder / file)
        self.name = self._name()
        self.count = len(self.tensors["latents"])
        for name, tensor in self.tensors.items():
            if len(tensor) != self.count:
                raise OldCacheError(f"{self.folder}: {name} has {len(tensor)} rows, latents have {self.count}")
        if not self.count:
            raise OldCacheError(f"{self.folder}: the cache is empty")
        if self.prompts is not None and len(self.prompts) != self.count:
            raise OldCacheError(f"{self.folder}: {len(self.prompts)} prompts for {self.count} samples")

    def _add(self, groups: tuple[str, ...], path: Path) -> None:
        content, names = _load(path), [name for group in groups for name in SCHEMA[group].fields]
        if isinstance(content, Tensor) and len(names) == 1:
            content = {names[0]: content}
        if not isinstance(content, dict):
            raise OldCacheError(f"{path}: holds a {type(content).__name__}, must be a dictionary of tensors")
        for name in names:
            key = next((key for key in NAMES[name] if key in content), None)
            if key is None:
                found = ", ".join(map(str, content)) or "nothing"
                raise OldCacheError(f"{path}: no {name}, which may be called {', '.join(NAMES[name])}; it has {found}")
            self.tensors[name] = _checked(content[key], name, f"{path}: {key}")
        grid = content.get("t_buckets", content.get("buckets"))
        if grid is not None and any(SCHEMA[group].on_grid for group in groups):
            grid = [round(float(t), 4) for t in torch.as_tensor(grid).float()]
            if grid != list(self.timesteps):
                raise OldCacheError(f"{path}: its timestep buckets are {grid}, must be {list(self.timesteps)}")
        if "text" in groups and isinstance(content.get("prompts"), list):
            self.prompts = [str(prompt) for prompt in content["prompts"]]

    def _name(self) -> str:
        """The cache's name: of its meta.pt, else its folder's, as far as it can be that of shards."""
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

    def read(self, group: str, indices: np.ndarray) -> dict[str, Tensor]:
        """The fields of a group at rows `indices` int64 [B]: [B, ...] each, in the stored dtype."""
        rows = torch.from_numpy(indices)
        return {name: self.tensors[name][rows] for name in SCHEMA[group].fields}

    def row(self, i: int) -> dict[str, Tensor]:
        """All tensors of a sample."""
        return {name: tensor[i].clone() for name, tensor in self.tensors.items()}

    def meta(self, i: int, source: str, dataset_id: int) -> dict:
        """What is known of a sample, for its json."""
        prompt = self.prompts[i] if self.prompts else ""
        return {"prompts": [prompt], "source": source, "dataset_id": dataset_id, "index": i, "origin": f"{source}/{i}"}

    def sample(self, i: int, source: str, dataset_id: int) -> dict:
        """A sample as tar members. Raises ValueError where it has NaN or infinity."""
        return encode_sample(sample_key(dataset_id, i), self.row(i), self.meta(i, source, dataset_id))

    def null(self) -> dict[str, Tensor]:
        """Zeros for the empty prompt, which is what the old trainer's text dropout put in its place."""
        return {name: torch.zeros_like(self.tensors[name][0]) for name in ("t5_embeds", "clip_pooled")}


def _load(path: Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise OldCacheError(
            f"{path}: refused, it holds more than tensors and plain values, which could run code when read "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise OldCacheError(f"{path}: damaged, cut short or not written by torch.save: {error}") from error


def _checked(tensor, name: str, where: str) -> Tensor:
    group = next(entry for entry in SCHEMA.values() if name in entry.fields)
    wanted = f"[N, {', '.join(map(str, group.fields[name]))}]"
    if not isinstance(tensor, Tensor):
        raise OldCacheError(f"{where} is a {type(tensor).__name__}, must be a tensor {wanted}")
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise OldCacheError(f"{where} is {tensor.dtype}, must be one of {', '.join(DTYPES)}")
    if tensor.ndim != len(group.fields[name]) + 1 or group.on_grid and tensor.shape[1] != len(BUCKETS):
        grid = f" with {len(BUCKETS)} timesteps" if group.on_grid else ""
        raise OldCacheError(f"{where} has shape {list(tensor.shape)}, must be {wanted}{grid}")
    return tensor
