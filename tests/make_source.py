"""Small sources for tests: real shards whose tensors say which sample they are."""

import io
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image

from tinyflux.shards.format import encode_sample, fields_of, sample_key
from tinyflux.shards.manifest import Manifest, shard_name
from tinyflux.shards.writer import write_shard
from tinyflux.util.buckets import BUCKETS

SHAPES = {
    "latents": (4, 4, 4),
    "t5_embeds": (6, 8),
    "clip_pooled": (8,),
    "lune": (10, 6),
    "sol_stats": (10, 3),
    "sol_spatial": (10, 8, 8),
}


def make_tensors(index: int, dtype: torch.dtype = torch.float16, without: tuple[str, ...] = ()) -> dict:
    """Tensors of sample `index`: noise keyed by it, and the index itself in latents[0, 0, :2] as two digits of 100."""
    generator = torch.Generator().manual_seed(index)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    tensors["latents"][0, 0, :2] = torch.tensor([index // 100, index % 100])
    return {name: tensor for name, tensor in tensors.items() if name not in without}


def make_samples(indices, dataset_id: int = 1, **options):
    preview = io.BytesIO()
    Image.new("RGB", (4, 4)).save(preview, "JPEG")
    for i in indices:
        meta = {"origin": f"image-{i // 2}.png", "prompt": f"prompt {i}", "index": i}  # two captions an image
        yield encode_sample(sample_key(dataset_id, i), make_tensors(i, **options), meta, preview.getvalue())


def make_source(folder: Path, counts=(5, 3, 4), name="portraits", dataset_id=1, fingerprint=None, **options) -> Path:
    """A source folder with one shard for each of `counts`; options go to `make_tensors`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards, first = [], 0
    for k, count in enumerate(counts):
        samples = make_samples(range(first, first + count), dataset_id, **options)
        shards.append(write_shard(folder / shard_name(name, k), samples))
        first += count
    fields = fields_of(make_tensors(0, **options))
    Manifest(name, dataset_id, fields, shards, fingerprint or {"vae": {"revision": "abc"}}).save(folder)
    null = {name: torch.zeros(SHAPES[name]) for name in ("t5_embeds", "clip_pooled")}
    safetensors.torch.save_file(null, folder / "null.safetensors")
    return folder


def make_old_cache(folder: Path, n: int = 7, **changes) -> Path:
    """A cache as it was before there were shards, of the tensors of `make_tensors`."""
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
