"""The source maker of all tests: real shards of random tensors that encode their sample's index."""

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tinyflux.shards.format import encode_sample, sample_key
from tinyflux.shards.manifest import Base, Manifest, shard_path
from tinyflux.shards.schema import GROUP_OF, SCHEMA, fields_of, grouped
from tinyflux.shards.writer import write_null, write_shard
from tinyflux.util.buckets import BUCKETS, grid

SIZES = {
    "channels": 4,
    "t5_length": 6,
    "t5_width": 8,
    "clip_width": 8,
    "lune_width": 6,
    "sol_size": 8,
    "align_width": 12,
    "align_rows": 2,
    "align_columns": 2,
    "timesteps": len(BUCKETS),
}
"""The axes of the schema in these sources; for training the widths must be the network's."""
TRAINABLE = {"t5_width": 24, "clip_width": 24, "lune_width": 24}
"""The sizes that the tests of training use in place of those."""
SHAPE = (4, 4)
_PREVIEW = io.BytesIO()
Image.new("RGB", (4, 4)).save(_PREVIEW, "JPEG")


def make_tensors(
    index: int,
    dtype: torch.dtype = torch.float16,
    *,
    shape: tuple[int, int] = SHAPE,
    captions: int = 1,
    groups: Sequence[str] = ("latents", "text", "lune", "sol"),
    seed: int = 0,
    **sizes: int,
) -> dict[str, Tensor]:
    """Tensors of sample `index`: noise keyed by it, and the index itself in latents[0, 0, :2] as two digits of 100.

    captions: with 1, texts have no caption axis. sizes: override those of SIZES.
    """
    generator = torch.Generator().manual_seed(index + 1_000_000 * seed)
    known, tensors = SIZES | sizes | {"h": shape[0], "w": shape[1]}, {}
    for name, group in GROUP_OF.items():
        if group in ("mask", "align") and group not in groups:
            continue  # the others are drawn in any case, so that leaving one out changes no other
        axes = [known.get(axis, axis) for axis in SCHEMA[group].fields[name]]
        axes = [captions, *axes] if SCHEMA[group].repeated and captions != 1 else axes
        drawn = torch.randn(axes, generator=generator)
        if group in groups:
            tensors[name] = (drawn.sigmoid() if name in ("sol_stats", "sol_spatial", "mask") else drawn).to(dtype)
    if "latents" in tensors:
        tensors["latents"][0, 0, :2] = torch.tensor([index // 100, index % 100])
    return tensors


def make_samples(
    indices, dataset_id: int = 1, *, captions: int | Sequence[int] = 1, overlay: bool = False, **options
) -> Iterator[dict]:
    """Samples for `write_shard`, two per image. captions: number for all, or of each. options go to `make_tensors`.

    overlay: as in an overlay: without preview, and without .json unless they have texts.
    """
    for i in indices:
        count = captions if isinstance(captions, int) else captions[i % len(captions)]
        tensors = make_tensors(i, captions=count, **options)
        meta = {"origin": f"image-{i // 2}.png", "prompts": [f"prompt {i}.{n}" for n in range(count)], "index": i}
        sample = encode_sample(sample_key(dataset_id, i), tensors, meta, None if overlay else _PREVIEW.getvalue())
        if overlay and "t5_embeds" not in tensors:
            del sample["json"]
        yield sample


def make_source(
    folder: Path,
    counts: Sequence[int] = (5, 3, 4),
    name: str | None = None,
    dataset_id: int = 1,
    *,
    shapes: Sequence[tuple[int, int]] = (SHAPE,),
    producer: dict | None = None,
    subfolders: bool = False,
    base: Path | None = None,
    **options,
) -> Path:
    """A source folder with one shard for each of `counts`; options go to `make_samples`.

    name: default the folder's. shapes: of the shards in turn. base: makes it an overlay on that source, which was made
    with the same counts, dataset id and shapes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = Manifest.load(base).source if base else name or folder.name
    shards, first = [], 0
    for k, count in enumerate(counts):
        shape = shapes[k % len(shapes)]
        samples = make_samples(range(first, first + count), dataset_id, shape=shape, overlay=bool(base), **options)
        shards.append(write_shard(folder / shard_path(name, k, subfolders), samples, shape))
        first += count
    one = {key: value for key, value in options.items() if key != "captions"}
    tensors = make_tensors(0, **one)
    timesteps = grid((SIZES | options)["timesteps"])
    groups = grouped(fields_of(tensors), timesteps, dict.fromkeys(SCHEMA, producer or {"vae": {"revision": "abc"}}))
    null = {key: torch.zeros_like(tensors[key]) for key in ("t5_embeds", "clip_pooled") if key in tensors}
    manifest = Manifest.of(
        name,
        dataset_id,
        groups,
        shards,
        null_sha256=write_null(folder, null) if null else None,
        base=base and base_of(folder, base),
        subfolders=subfolders,
    )
    manifest.save(folder)
    return folder


def base_of(folder: Path, base: Path) -> Base:
    """The base entry in the manifest of an overlay in `folder`."""
    return Base(os.path.relpath(base, folder), Manifest.load(base).sha256)


def make_old_cache(folder: Path, n: int = 7, **changes) -> Path:
    """A legacy cache with the tensors of `make_tensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    t = {name: torch.stack([make_tensors(i)[name] for i in range(n)]) for name in make_tensors(0)}
    grid = torch.tensor(BUCKETS)
    files = {
        "encodings": {k: t[k] for k in ("latents", "t5_embeds", "clip_pooled")}
        | {"prompts": [f"p{i}" for i in range(n)]},
        "lune": {"features": t["lune"], "t_buckets": grid, "dtype": torch.float16},
        "sol": {"stats": t["sol_stats"], "spatial": t["sol_spatial"], "t_buckets": grid},
        "meta": {"name": "portraits"},
    }
    for name, content in (files | changes).items():
        if content is not None:
            torch.save(content, folder / f"{name}.pt")
    return folder
