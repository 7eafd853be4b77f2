"""Caches of encodings and teacher features for notebooks: views of shards, read on access.

    cache = DatasetCache.build(zoo, images, prompts, name="portraits")
    cache.save("cache/portraits")                  # a source, also for launch/train.py and sharding.verify
    cache = DatasetCache.load("cache/portraits")   # or a URL, or the folder of a legacy cache (encodings.pt, ...)
    lune = cache.get_lune(indices, t)

Random access has to open and scan many shards. For large sources use launch/train.py, which reads shards in order.

If a sample has several captions, the first one is read. In a source of several shapes, each batch must have one shape:
see `tinyflux.trainer.data.ShapeBatches`.
"""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tinyflux.precache.legacy import LegacyCache, is_legacy
from tinyflux.shards.format import bits
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.merge import merge
from tinyflux.shards.opened import OpenShards
from tinyflux.shards.schema import DTYPES, SPATIAL, fields_at, sizes
from tinyflux.shards.source import Source, open_source
from tinyflux.shards.sources import differing_grid
from tinyflux.util.buckets import interpolate
from tinyflux.util.files import atomic_write

if TYPE_CHECKING:  # the zoo's libraries take seconds to import, and reading a cache does not need them
    from tinyflux.model.zoo import ModelZoo


class ShardRows:
    """The rows of a shard source. Safe to read from several threads and from forked or spawned processes."""

    def __init__(self, source: Source):
        self.source, self.shards = source, OpenShards([source])
        self.name, self.count = source.name, source.manifest.count
        self.fields, self.grids = source.fields, source.grids

    @property
    def shapes(self) -> np.ndarray:
        """The latent (h, w) of each sample, int64 [N, 2]."""
        index = self.source.manifest.index
        return np.array(self.source.shapes)[np.repeat(index.shape, index.samples)]

    def __reduce__(self):
        return _reopen, (self.source.url, self.source.revision)

    def read(self, group: str, indices: np.ndarray) -> dict[str, Tensor]:
        """The fields of a group at rows `indices` int64 [B]: [B, ...] each, in the stored dtype.

        Raises ShardError with shard and key for a damaged sample, ValueError if the latent shapes differ.
        """
        fields, manifest = self.source.groups[group].fields, self.source.manifest
        shards, places = manifest.locate(indices)
        shapes = [manifest.shapes[k] for k in np.unique(manifest.index.shape[shards])]
        if len(shapes) > 1 and any(isinstance(n, str) for field in fields.values() for n in field.shape):
            found = ", ".join("x".join(map(str, shape)) for shape in shapes)
            raise ValueError(
                f"cache {self.name!r}: these samples have latents of the shapes {found}, but a batch must have one: use"
                " batch_sampler=tinyflux.trainer.data.ShapeBatches(dataset, batch_size) or group them by cache.shapes"
            )
        fields = fields_at(fields, shapes[0])
        tensors = {name: torch.empty(len(indices), *f.shape, dtype=DTYPES[f.dtype]) for name, f in fields.items()}
        rows = {name: bits(tensor) for name, tensor in tensors.items()}
        for i, (shard, row) in enumerate(zip(shards.tolist(), places.tolist(), strict=True)):
            out = {name: values[i] for name, values in rows.items()}
            self.shards.get(0, shard).decode(row, out, groups=(group,))
        return tensors

    def null(self) -> dict[str, Tensor]:
        """The empty prompt's `t5_embeds` [L, D] and `clip_pooled` [D]."""
        return self.source.null


def _reopen(url: str, revision: str) -> ShardRows:
    return ShardRows(open_source(url, revision=revision))


Rows = ShardRows | LegacyCache


class _View:
    """Some groups of the rows' tensors."""

    groups: tuple[str, ...] = ()

    def __init__(self, rows: Rows):
        self.rows = rows

    def __len__(self) -> int:
        return self.rows.count

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rows.name!r}, {len(self)} samples)"

    def _read(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, ...]:
        array = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices).reshape(-1)
        if not len(array):
            raise ValueError(f"cache {self.rows.name!r}: no indices were given")
        if array.dtype.kind not in "iu":  # a mask would be read as rows 0 and 1, fractions would be truncated
            raise TypeError(f"cache {self.rows.name!r}: indices must be integers, not {array.dtype}")
        array = array.astype(np.int64)
        if len(wrong := array[(array < 0) | (array >= len(self))]):
            raise IndexError(f"index {wrong[0]} is out of range: cache {self.rows.name!r} has {len(self)} samples")
        return tuple(tensor for group in self.groups for tensor in self.rows.read(group, array).values())

    def _at(self, indices: Tensor | Sequence[int], t: Tensor | float) -> tuple[Tensor, ...]:
        t = torch.as_tensor(t, dtype=torch.float32)
        if t.isnan().any():
            raise ValueError(f"cache {self.rows.name!r}: t is NaN")
        features = self._read(indices)
        if t.ndim > 1 or t.ndim == 1 and len(t) != len(features[0]):
            raise ValueError(f"t has shape {list(t.shape)} for {len(features[0])} indices: give one t or one per index")
        t = t.expand(len(features[0]))
        (group,) = self.groups
        return tuple(interpolate(values.to(t.device), t, self.rows.grids[group]) for values in features)


class EncodingCache(_View):
    """Latents, T5 states and pooled CLIP vectors, in the stored dtype."""

    groups = ("latents", "text")

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [C, H, W], T5 states [L, D], CLIP vector [D]. Raises IndexError."""
        latents, t5, clip = self._read([i])
        return latents[0], t5[0], clip[0]

    def get_batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, C, H, W], T5 states [B, L, D], CLIP vectors [B, D]. Raises IndexError."""
        return self._read(indices)


class LuneFeatureCache(_View):
    """Lune's features on the grid of timestep buckets."""

    groups = ("lune",)

    def get(self, indices: Tensor | Sequence[int], t: Tensor | float) -> Tensor:
        """Features float32 [B, D] at t [B] in [0, 1], on t's device. Raises IndexError."""
        return self._at(indices, t)[0]


class SolFeatureCache(_View):
    """Sol's attention statistics on the grid of timestep buckets."""

    groups = ("sol",)

    def get(self, indices: Tensor | Sequence[int], t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Statistics [B, 3] and maps [B, h, w], float32, at t [B] in [0, 1], on t's device. Raises IndexError."""
        return self._at(indices, t)


class DatasetCache:
    """A source's samples: `encodings`, `lune` and `sol` (None if the source has no such features).

    fields: dtype and shape of a sample's tensors; "h" and "w" stand for the latent's height and width, see `shapes`.
    """

    def __init__(self, rows: Rows):
        self.rows, self.name, self.fields = rows, rows.name, rows.fields
        self.encodings = EncodingCache(rows)
        self.lune = LuneFeatureCache(rows) if "lune" in rows.fields else None
        self.sol = SolFeatureCache(rows) if "sol_stats" in rows.fields else None

    def __len__(self) -> int:
        return self.rows.count

    @property
    def shapes(self) -> np.ndarray:
        """The latent (h, w) of each sample, int64 [N, 2]."""
        return self.rows.shapes

    def __repr__(self) -> str:
        has = {"lune": self.lune is not None, "sol": self.sol is not None}
        return f"DatasetCache({self.name!r}, {len(self)} samples, lune={has['lune']}, sol={has['sol']})"

    @classmethod
    def build(
        cls,
        zoo: "ModelZoo",
        images: Sequence,
        prompts: Sequence[str],
        name: str = "dataset",
        build_lune: bool = True,
        build_sol: bool = True,
        batch_size: int = 16,
        dtype: torch.dtype = torch.float16,
        checkpoint_dir: str | Path | None = None,
        *,
        dataset_id: int = 0,
        teacher_input: str = "image",
        seed: int = 0,
        shard_size: int = 256,
    ) -> "DatasetCache":
        """Compute all encodings and features from images and prompts; the zoo loads missing models.

        images: PIL images, paths, uint8 arrays [H, W, 3] or tensors [3, H, W]. checkpoint_dir: the folder for the
        shards; after an interruption, the same call resumes there. Without it, shards go to a temporary folder that is
        deleted with the cache: call `save`. dataset_id: prefix of the sample keys.
        The samples are the same as those of `sharding.build` for the same images, prompts, id and seed.
        Raises ValueError with the image that cannot be read, or with the differences between this call and the build in
        checkpoint_dir.
        """
        from tinyflux.precache.cache_build import build_cache  # its libraries take seconds to import
        from tinyflux.precache.config import BuildConfig

        folder = Path(checkpoint_dir or tempfile.mkdtemp(prefix=f"tinyflux-{name}-".replace(os.sep, "_")))
        config = BuildConfig(
            source=name,
            dataset_id=dataset_id,
            zoo="",
            lune=build_lune,
            sol=build_sol,
            batch_size=batch_size,
            dtype=str(dtype).removeprefix("torch."),
            teacher_input=teacher_input,
            seed=seed,
            shard_size=shard_size,
        )
        rows = None
        try:
            build_cache(folder, zoo, images, prompts, config)
            rows = ShardRows(open_source(folder))
        finally:
            if checkpoint_dir is None and rows is None:
                shutil.rmtree(folder, ignore_errors=True)
        if checkpoint_dir is None:
            weakref.finalize(rows, _remove, folder, os.getpid())
        return cls(rows)

    @classmethod
    def load(cls, location: str | Path) -> "DatasetCache":
        """Open a source's folder or URL, or the folder of a legacy cache. Samples are read later, on access.

        Raises FileNotFoundError; ValueError with the bad file and its fault.
        """
        if is_legacy(location):
            return cls(LegacyCache(location))
        return cls(ShardRows(open_source(location)))

    def save(self, folder: str | Path, *, dataset_id: int = 0) -> Path:
        """Write the cache as a source. Returns the folder.

        Shards are hard-linked if possible, else copied; a base and its overlays are merged into new shards.
        dataset_id: for a legacy cache, whose samples have none. Raises FileExistsError if the folder has another
        source, or any source if this one is a legacy cache or has overlays.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.rows, LegacyCache):
            from tinyflux.precache.cache_build import convert

            _refuse_other(folder, None)
            convert(self.rows.folder, folder, self.name, dataset_id)
            return folder
        source = self.rows.source
        if len(source.layers) > 1:
            _refuse_other(folder, None)
            merge(source, folder)
            return folder
        _refuse_other(folder, source.manifest)
        for shard in source.manifest.shards:
            (folder / shard.path).parent.mkdir(exist_ok=True)
            _place(source.store.fetch(shard.path, shard.bytes, shard.sha256), folder / shard.path)
        atomic_write(folder / "null.safetensors", source.store.fetch("null.safetensors").read_bytes())
        if source.store.cache is None and (rejected := source.store.path("rejected.jsonl")).is_file():
            atomic_write(folder / "rejected.jsonl", rejected.read_bytes())
        source.manifest.save(folder)
        return folder

    def null(self) -> dict[str, Tensor]:
        """The empty prompt's `t5_embeds` [L, D] and `clip_pooled` [D]; zeros in a legacy cache."""
        return self.rows.null()

    def get_encodings(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [C, H, W], T5 states [L, D], CLIP vector [D] of a sample."""
        return self.encodings[i]

    def get_encodings_batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, C, H, W], T5 states [B, L, D], CLIP vectors [B, D]."""
        return self.encodings.get_batch(indices)

    def get_lune(self, indices: Tensor | Sequence[int], t: Tensor | float) -> Tensor:
        """Lune's features float32 [B, D] at t [B]. Raises ValueError if the cache has none, IndexError."""
        if self.lune is None:
            raise ValueError(f"cache {self.name!r} has no Lune features: build it with build_lune=True")
        return self.lune.get(indices, t)

    def get_sol(self, indices: Tensor | Sequence[int], t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Sol's statistics [B, 3] and maps [B, h, w] at t [B]. Raises as `get_lune`."""
        if self.sol is None:
            raise ValueError(f"cache {self.name!r} has no Sol statistics: build it with build_sol=True")
        return self.sol.get(indices, t)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not when a forked worker drops its copy of the cache
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_other(folder: Path, manifest: Manifest | None) -> None:
    found = folder / "manifest.json"
    if found.exists() and (manifest is None or found.read_bytes() != manifest.to_json().encode()):
        raise FileExistsError(f"{folder}: contains another source; remove it, or save to another folder")


def _place(file: Path, target: Path) -> None:
    if target.exists() and target.samefile(file):
        return
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(file, temporary)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(file, temporary)
    os.replace(temporary, target)


class MultiSourceCache:
    """Several caches, identified by dataset id. Batch lookups take [B] local indices and [B] dataset ids."""

    def __init__(self):
        self.caches: dict[int, DatasetCache] = {}

    def __len__(self) -> int:
        return sum(map(len, self.caches.values()))

    def __repr__(self) -> str:
        return f"MultiSourceCache({', '.join(f'{i}: {cache!r}' for i, cache in self.caches.items())})"

    def add(self, cache: DatasetCache, dataset_id: int) -> None:
        """Add a cache. Raises ValueError if the id is taken, or its tensors or timesteps differ from the others'."""
        if dataset_id in self.caches:
            raise ValueError(f"dataset id {dataset_id} is taken by {self.caches[dataset_id].name!r}")
        for other in self.caches.values():
            if group := differing_grid(other.rows.grids, cache.rows.grids):
                raise ValueError(f"caches {other.name!r} and {cache.name!r} differ in the timesteps of {group}")
            a, b = sizes(other.fields), sizes(cache.fields)
            for axis in sorted(a.keys() & b.keys() - set(SPATIAL)):
                if a[axis] != b[axis]:
                    raise ValueError(f"caches {other.name!r} and {cache.name!r} differ in {axis}: {a[axis]}, {b[axis]}")
        self.caches[dataset_id] = cache

    def get_encodings(self, local_indices: Tensor, dataset_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, C, H, W], T5 states [B, L, D], CLIP vectors [B, D]."""
        return self._gather(local_indices, dataset_ids, lambda cache, rows, _: cache.get_encodings_batch(rows))

    def get_lune(self, local_indices: Tensor, dataset_ids: Tensor, t: Tensor | float) -> Tensor:
        """Lune's features float32 [B, D] at t [B], on t's device. Raises ValueError, IndexError."""
        t = _of_each(t, local_indices)
        get = lambda cache, rows, where: (cache.get_lune(rows, t[where]),)  # noqa: E731
        return self._gather(local_indices, dataset_ids, get)[0]

    def get_sol(self, local_indices: Tensor, dataset_ids: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Sol's statistics [B, 3] and maps [B, h, w] at t [B], on t's device. Raises ValueError, IndexError."""
        t = _of_each(t, local_indices)
        return self._gather(local_indices, dataset_ids, lambda cache, rows, where: cache.get_sol(rows, t[where]))

    def _gather(self, local_indices: Tensor, dataset_ids: Tensor, get: Callable) -> tuple[Tensor, ...]:
        indices, ids = torch.as_tensor(local_indices).cpu(), torch.as_tensor(dataset_ids).cpu()
        if not indices.numel():
            raise ValueError("no indices were given")
        if indices.shape != ids.shape or indices.ndim != 1:
            raise ValueError(f"{list(indices.shape)} local indices and {list(ids.shape)} dataset ids: must be [B] each")
        if unknown := sorted(set(ids.tolist()) - self.caches.keys()):
            raise ValueError(f"dataset id {unknown[0]} is unknown: the caches added have {sorted(self.caches)}")
        out: list[Tensor] = []
        for dataset_id in sorted(set(ids.tolist())):
            where = (ids == dataset_id).nonzero().flatten()
            values = get(self.caches[dataset_id], indices[where], where)
            out = out or [value.new_empty(len(ids), *value.shape[1:]) for value in values]
            for whole, value in zip(out, values, strict=True):
                whole[where.to(whole.device)] = value.to(whole.dtype)
        return tuple(out)


def _of_each(t: Tensor | float, indices: Tensor | Sequence[int]) -> Tensor:
    """t [B] of the samples; one t is used for all. Raises ValueError."""
    t = torch.as_tensor(t, dtype=torch.float32)
    if t.ndim and t.shape != (len(indices),):
        raise ValueError(f"t has shape {list(t.shape)} for {len(indices)} indices: give one t or one per index")
    return t.expand(len(indices))
