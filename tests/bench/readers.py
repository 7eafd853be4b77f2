"""The readers that `tests/bench/stream.py` compares: how each one's data is written and read.

Every reader is in its best form: it shuffles before decoding, reuses decompressors, and collates batches in workers.
The peers' functions import nothing from this package, so that they run in a separate environment.
"""

import importlib.machinery
import importlib.util
import itertools
import os
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import zstandard

SHAPES = {"latents": (16, 64, 64), "t5_embeds": (128, 768), "clip_pooled": (768,)}
SHAPES |= {"lune": (10, 1280), "sol_stats": (10, 3), "sol_spatial": (10, 8, 8)}
RAW = 2 * sum(map(np.prod, SHAPES.values()))  # bytes of a sample in float16
SIZES = {"channels": 16, "t5_length": 128, "t5_width": 768, "clip_width": 768, "lune_width": 1280}
SHARD = 64  # samples


def make_tensors(index: int) -> dict[str, torch.Tensor]:
    """The float16 tensors of a sample: normal numbers, which zstd makes little of."""
    generator = torch.Generator().manual_seed(index)
    return {name: torch.randn(shape, generator=generator).half() for name, shape in SHAPES.items()}


def make_ours(folder: Path, samples: int) -> None:
    from tests.make_source import make_source

    counts = [min(SHARD, samples - first) for first in range(0, samples, SHARD)]
    make_source(folder, counts, name="bench", shapes=((64, 64),), **SIZES)


def make_webdataset(folder: Path, samples: int, compressed: bool) -> None:
    """Shards with one safetensors member per sample, in a zstd frame or uncompressed."""
    import safetensors.torch
    import webdataset

    folder.mkdir(parents=True)
    compressor, name = zstandard.ZstdCompressor(level=3), "safetensors.zst" if compressed else "safetensors"
    for first in range(0, samples, SHARD):
        with webdataset.TarWriter(str(folder / f"{first // SHARD:06d}.tar"), encoder=False) as writer:
            for i in range(first, min(first + SHARD, samples)):
                data = safetensors.torch.save(make_tensors(i))
                writer.write({"__key__": f"{i:09d}", name: compressor.compress(data) if compressed else data})


def make_litdata(folder: Path, samples: int, compressed: bool) -> None:
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir(parents=True)
    writer = BinaryWriter(str(folder), chunk_bytes="64MB", compression="zstd" if compressed else None)
    for i in range(samples):
        writer[i] = make_tensors(i)
    writer.done()
    writer.merge(1)


def make_mosaicml(folder: Path, samples: int, compressed: bool) -> None:
    columns = {name: f"ndarray:float16:{','.join(map(str, shape))}" for name, shape in SHAPES.items()}
    compression = "zstd:3" if compressed else None
    with mosaic().MDSWriter(out=str(folder), columns=columns, compression=compression, size_limit=1 << 26) as writer:
        for i in range(samples):
            writer.write({name: tensor.numpy() for name, tensor in make_tensors(i).items()})


def mosaic():
    """The package `streaming`. Its vision datasets, which are not needed here, require torchvision."""
    if importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.datasets", "torchvision.transforms.functional"):
            module = types.ModuleType(name)
            module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
            module.VisionDataset, module.to_tensor = object, None
            sys.modules[name] = module
    import streaming

    return streaming


# The readers: (folder with the data, batch size, threads or workers) -> batches without end


def ours(folder: Path, batch: int, threads: int, collate: Callable | None = None) -> Iterator[dict]:
    from tinyflux.shards.stream import DataConfig, Stream, open_sources

    config = DataConfig([str(folder)], global_batch_size=batch, micro_batch_size=batch, threads=threads)
    return Stream(open_sources(config), config, collate=collate)


def collated(folder: Path, batch: int, threads: int) -> Iterator[dict]:
    """With all that training adds: timesteps, interpolation of the teachers' grid, text dropout."""
    from tinyflux.shards.source import open_source
    from tinyflux.trainer.collate import StreamCollate
    from tinyflux.trainer.config import TrainerConfig

    source = open_source(folder)
    collate = StreamCollate(TrainerConfig(), [source.null], source.grids, global_batch_size=batch, seed=0)
    return ours(folder, batch, threads, collate)


def floor(folder: Path, batch: int, threads: int) -> Iterator[dict]:
    """A bare pool: each task reads, decompresses and joins eight samples into the batch's memory, without checks.

    A sample's members are read by one call and decompressed by one; a task's planes are joined by one call per field.
    """
    from tinyflux.shards.source import open_source

    source = open_source(folder)
    files = [source.open(k) for k in range(len(source.manifest.shards))]
    parts, size = [], 0  # of each field: its elements, and where its planes lie in a sample
    for _, layout in files[0].wanted(0):
        planes, size = layout.planes(layout.head[8:]), size + len(layout.head)
        parts += [(name, field.count, *(size + at for at in planes[name])) for name, field in layout.fields.items()]
        size += layout.payload
    places = []
    for file in files:
        members = [[sample.members[name] for name, _ in file.wanted(0)] for sample in file.samples]
        places += [(file.fd, one) for one in members]
    local, between = threading.local(), memoryview(bytearray(1 << 16))

    def decode(memory: dict[str, np.ndarray], rows: range, samples: list[int]) -> None:
        if not hasattr(local, "zstd"):
            local.zstd, local.data = zstandard.ZstdDecompressor(), memoryview(bytearray(2 * size))
            local.blobs = np.zeros((8, size), np.uint8)
        for blob, (fd, members) in zip(local.blobs, (places[i] for i in samples), strict=False):
            at, end, buffers = 0, members[0][0], []
            for offset, length in members:
                buffers += [between[: offset - end], local.data[at : at + length]]
                at, end = at + length, offset + length
            os.preadv(fd, buffers, members[0][0])
            local.zstd.stream_reader(local.data[:at], read_size=at, read_across_frames=True).readinto(blob)
        for name, count, low, high in parts:
            out = memory[name][rows.start : rows.stop]
            np.multiply(local.blobs[: len(rows), high : high + count], 256, out=out, dtype=np.uint16)
            out |= local.blobs[: len(rows), low : low + count]

    order = itertools.cycle(np.random.default_rng(0).permutation(len(places)).tolist())
    memories = itertools.cycle(
        [{name: np.empty((batch, np.prod(shape)), np.uint16) for name, shape in SHAPES.items()} for _ in range(4)]
    )
    with ThreadPoolExecutor(threads) as pool:
        ahead = []
        while True:
            while len(ahead) < 3:
                memory, samples = next(memories), list(itertools.islice(order, batch))
                rows = [range(k, min(k + 8, batch)) for k in range(0, batch, 8)]
                ahead.append((memory, [pool.submit(decode, memory, r, samples[r.start : r.stop]) for r in rows]))
            memory, tasks = ahead.pop(0)
            for task in tasks:
                task.result()
            yield memory


_decompressor = None


def _decompress(data: bytes) -> bytes:
    global _decompressor  # one a worker: made for each sample it costs more than the work
    _decompressor = _decompressor or zstandard.ZstdDecompressor()
    return _decompressor.decompress(data)


def _plain(sample: dict) -> dict:
    import safetensors.torch

    if "safetensors" in sample:
        return safetensors.torch.load(sample["safetensors"])
    return safetensors.torch.load(_decompress(sample["safetensors.zst"]))


def _planes(sample: dict) -> dict:
    """A sample of our shards: safetensors and one line of numpy a tensor."""
    import safetensors.numpy

    tensors = {}
    for name, data in sample.items():
        if name.endswith(".safetensors.zst"):
            blob = safetensors.numpy.load(_decompress(data))
            for field in {key[:-2] for key in blob if key.endswith(".0")}:
                joined = (blob[f"{field}.1"].astype("<u2") << 8 | blob[f"{field}.0"]).view("<f2")
                tensors[field] = torch.from_numpy(joined)
    return tensors


def webdataset(folder: Path, batch: int, workers: int, decode: Callable) -> Iterator[dict]:
    import webdataset as wds

    urls = sorted(map(str, folder.glob("*.tar")))
    dataset = wds.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(128, initial=32)
    dataset = dataset.map(decode).batched(batch, collation_fn=torch.utils.data.default_collate)
    return iter(wds.WebLoader(dataset, num_workers=workers, batch_size=None, **_kept(workers)))


def litdata(folder: Path, batch: int, workers: int) -> Iterator[dict]:
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(folder), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, **_kept(workers))
    while True:
        yield from loader


def mosaicml(folder: Path, batch: int, workers: int) -> Iterator[dict]:
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:  # decompressed shards
        dataset = mosaic().StreamingDataset(remote=str(folder), local=scratch, shuffle=True, batch_size=batch)
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=batch, drop_last=True, num_workers=workers, **_kept(workers)
        )
        while True:
            yield from loader


def _kept(workers: int) -> dict:
    return {"persistent_workers": True, "prefetch_factor": 4} if workers else {}


@dataclass(frozen=True)
class Reader:
    """One line of the table. folder: of its data; make: writes that; read: see above; peer: has an environment of its
    own, and as many workers as suit it best."""

    folder: str
    make: Callable[[Path, int], None]
    read: Callable[[Path, int, int], Iterator[dict]]
    peer: str = ""


READERS = {
    "floor": Reader("ours", make_ours, floor),
    "ours": Reader("ours", make_ours, ours),
    "ours, collated": Reader("ours", make_ours, collated),
    "webdataset, our shards": Reader("ours", make_ours, partial(webdataset, decode=_planes), "webdataset"),
    "webdataset, zstd": Reader(
        "webdataset-zstd", partial(make_webdataset, compressed=True), partial(webdataset, decode=_plain), "webdataset"
    ),
    "webdataset, uncompressed": Reader(
        "webdataset", partial(make_webdataset, compressed=False), partial(webdataset, decode=_plain), "webdataset"
    ),
    "litdata, zstd": Reader("litdata-zstd", partial(make_litdata, compressed=True), litdata, "litdata"),
    "litdata, uncompressed": Reader("litdata", partial(make_litdata, compressed=False), litdata, "litdata"),
    "mosaicml, zstd": Reader("mosaicml-zstd", partial(make_mosaicml, compressed=True), mosaicml, "streaming"),
    "mosaicml, uncompressed": Reader("mosaicml", partial(make_mosaicml, compressed=False), mosaicml, "streaming"),
}
