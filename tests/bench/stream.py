"""The stream against webdataset, LitData and MosaicML Streaming, on the same samples in one run.

    python tests/bench/stream.py                        1,024 full-size samples, all readers that are installed
    python tests/bench/stream.py --only ours floor --turns 5

Every reader has a process of its own, delivers shuffled batches of the stored tensors, and takes turns with the
others; figures are medians over the turns. `floor` is zstd and one copy on as many threads, with nothing around them.
Memory is what the process and its children hold (PSS) above the process before it opened anything. LitData and
MosaicML are peers, not dependencies: `pip install --no-deps litdata mosaicml-streaming`, and what they then ask for.
"""

import argparse
import importlib.machinery
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import safetensors.torch
import torch
import zstandard

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.store_server import store_server
from tinyflux.shards.format import GROUPS, SUFFIX, encode_sample, sample_key
from tinyflux.shards.manifest import Manifest, shard_name
from tinyflux.shards.plan import Plan, PlanSource
from tinyflux.shards.schema import fields_of
from tinyflux.shards.shardfile import ShardFile
from tinyflux.shards.stream import DataConfig, Stream, open_sources
from tinyflux.shards.tar import read_member
from tinyflux.shards.writer import write_shard
from tinyflux.trainer.collate import StreamCollate
from tinyflux.trainer.config import TrainerConfig

SHAPES = {"latents": (16, 64, 64), "t5_embeds": (128, 768), "clip_pooled": (768,)}
SHAPES |= {"lune": (10, 1280), "sol_stats": (10, 3), "sol_spatial": (10, 8, 8)}
RAW = 2 * sum(map(np.prod, SHAPES.values()))  # bytes of a sample in float16
PAGE = os.sysconf("SC_CLK_TCK")


def make_tensors(index: int) -> dict[str, torch.Tensor]:
    """The float16 tensors of a sample: normal numbers, which zstd makes little of."""
    generator = torch.Generator().manual_seed(index)
    return {name: torch.randn(shape, generator=generator).half() for name, shape in SHAPES.items()}


def make_source(folder: Path, samples: int, shard_size: int) -> None:
    """Our shards, which webdataset reads too."""
    folder.mkdir(parents=True)
    shards = []
    for first in range(0, samples, shard_size):
        entries = (
            encode_sample(sample_key(1, i), make_tensors(i), {"origin": str(i)})
            for i in range(first, min(first + shard_size, samples))
        )
        shards.append(write_shard(folder / shard_name("bench", first // shard_size), entries))
    Manifest("bench", 1, fields_of(make_tensors(0)), shards).save(folder)
    null = {name: torch.zeros(SHAPES[name]).half() for name in ("t5_embeds", "clip_pooled")}
    safetensors.torch.save_file(null, folder / "null.safetensors")


def make_litdata(folder: Path, samples: int, compression: str | None) -> None:
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir(parents=True)
    writer = BinaryWriter(str(folder), chunk_bytes="64MB", compression=compression)
    for i in range(samples):
        writer[i] = make_tensors(i)
    writer.done()
    writer.merge(1)


def make_mosaic(folder: Path, samples: int) -> None:
    columns = {name: f"ndarray:float16:{','.join(map(str, shape))}" for name, shape in SHAPES.items()}
    options = {"columns": columns, "compression": "zstd:3", "size_limit": 1 << 26}
    with mosaic().MDSWriter(out=str(folder), **options) as writer:
        for i in range(samples):
            writer.write({name: tensor.numpy() for name, tensor in make_tensors(i).items()})


def mosaic():
    """The package `streaming`. Its vision datasets, which nobody needs here, want torchvision."""
    if importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.datasets", "torchvision.transforms.functional"):
            module = types.ModuleType(name)
            module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
            module.VisionDataset, module.to_tensor = object, None
            sys.modules[name] = module
    import streaming

    return streaming


# The readers: (folder with the data, batch size, threads or workers) -> batches without end


def ours(data: Path, batch: int, threads: int, collate: Callable | None = None) -> Iterator[dict]:
    config = DataConfig([str(data / "ours")], global_batch_size=batch, micro_batch_size=batch, threads=threads)
    return Stream(open_sources(config), config, collate=collate)


def collated(data: Path, batch: int, threads: int) -> Iterator[dict]:
    """With all that training adds: timesteps, bucket interpolation, text dropout."""
    config = DataConfig([str(data / "ours")], global_batch_size=batch, micro_batch_size=batch)
    nulls = [source.null for source in open_sources(config)]
    return ours(data, batch, threads, StreamCollate(TrainerConfig(), nulls, global_batch_size=batch, seed=0))


def floor(data: Path, batch: int, threads: int) -> Iterator[dict]:
    """Nothing but pread, zstd and one copy into the batch's memory."""
    files = [ShardFile(data / "ours" / s.name, s) for s in Manifest.load(data / "ours").shards]
    places = [(f._fd, [s.members[g + SUFFIX] for g in GROUPS]) for f in files for s in f.samples]
    memory, local = np.empty((batch, RAW + 4096), np.uint8), threading.local()

    def decode(row: int, index: int) -> None:
        if not hasattr(local, "zstd"):
            local.zstd = zstandard.ZstdDecompressor()
        fd, members = places[index]
        end = 0
        for offset, size in members:
            content = np.frombuffer(local.zstd.decompress(read_member(fd, offset, size)), np.uint8)
            memory[row, end : end + len(content)] = content
            end += len(content)

    with ThreadPoolExecutor(threads) as pool:
        order = itertools.cycle(np.random.default_rng(0).permutation(len(places)).tolist())
        while True:
            list(pool.map(decode, range(batch), itertools.islice(order, batch), chunksize=8))
            yield {"latents": memory}


_decompressor = None


def _decode_webdataset(sample: dict) -> dict:
    global _decompressor  # one a worker: made anew for each sample it costs more than the work
    _decompressor = _decompressor or zstandard.ZstdDecompressor()
    tensors = {}
    for group in GROUPS:
        tensors |= safetensors.torch.load(_decompressor.decompress(sample[group + SUFFIX]))
    return tensors


def webdataset(data: Path, batch: int, workers: int) -> Iterator[dict]:
    """Shuffled before it is decoded, decoded by a decompressor that is kept, collated in shared memory."""
    import webdataset as wds

    urls = sorted(str(path) for path in (data / "ours").glob("*.tar"))
    dataset = wds.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(128, initial=32)
    dataset = dataset.map(_decode_webdataset).batched(batch, collation_fn=torch.utils.data.default_collate)
    options = {"num_workers": workers, "batch_size": None}
    options |= {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    return iter(wds.WebLoader(dataset, **options))


def litdata(data: Path, batch: int, workers: int, folder: str = "litdata") -> Iterator[dict]:
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(data / folder), shuffle=True, drop_last=True)
    options = {"num_workers": workers} | ({"persistent_workers": True, "prefetch_factor": 4} if workers else {})
    loader = StreamingDataLoader(dataset, batch_size=batch, **options)
    while True:
        yield from loader


def mosaicml(data: Path, batch: int, workers: int) -> Iterator[dict]:
    with tempfile.TemporaryDirectory(dir=data, ignore_cleanup_errors=True) as scratch:  # keeps decompressed shards
        options = {"batch_size": batch, "shuffle": True, "remote": str(data / "mosaicml"), "local": scratch}
        dataset = mosaic().StreamingDataset(**options)
        options = {"num_workers": workers} | ({"persistent_workers": True, "prefetch_factor": 4} if workers else {})
        loader = torch.utils.data.DataLoader(dataset, batch_size=batch, drop_last=True, **options)
        while True:
            yield from loader


def readers(threads: int) -> dict[str, tuple[Callable, int]]:
    """Name -> reader and its threads or workers."""
    found = {"floor": (floor, threads), "ours": (ours, threads), "ours, collated": (collated, threads)}
    found |= {f"webdataset, {n} workers": (webdataset, n) for n in range(threads + 1)}
    if importlib.util.find_spec("litdata"):
        plain = lambda *args: litdata(*args, folder="litdata_plain")  # noqa: E731
        found |= {f"litdata, {n} workers": (litdata, n) for n in range(threads + 1)}
        found |= {f"litdata uncompressed, {n} workers": (plain, n) for n in range(threads + 1)}
    if importlib.util.find_spec("streaming"):
        found |= {f"mosaicml, {n} workers": (mosaicml, n) for n in range(threads + 1)}
    return found


# Measuring


def family() -> list[int]:
    """This process and its descendants."""
    found = [os.getpid()]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            try:
                found += map(int, (task / "children").read_text().split())
            except OSError:  # it has just ended
                continue
    return found


def cpu_seconds() -> float:
    """CPU time of the family so far."""
    total = 0
    for pid in family():
        try:
            total += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
        except OSError:
            continue
    return total / PAGE


def resident() -> int:
    """Bytes that the family holds, shared ones divided among those who share them."""
    total = 0
    for pid in family():
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def measure(reader: Callable, workers: int, data: Path, batch: int, batches: int) -> dict:
    """Time to the first batch, samples/s, CPU seconds per 1,000 samples, peak memory."""
    idle, began = resident(), time.perf_counter()
    loader = reader(data, batch, workers)
    next(loader)
    first = time.perf_counter() - began
    for _ in range(4):
        next(loader)
    cpu, began = cpu_seconds(), time.perf_counter()
    for _ in range(batches):
        assert len(next(loader)["latents"]) == batch
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    held = []  # afterwards: looking takes time too
    for _ in range(batches // 2):
        next(loader)
        held.append(resident() - idle)
    samples = batch * batches
    figures = {"samples_per_s": samples / seconds, "cpu_s_per_1000": 1000 * cpu / samples}
    return figures | {"memory_mb": max(held) / 1e6, "first_s": first}


def seek() -> float:
    """Seconds that the slowest of ten steps about 10 million takes to find: 512 slots over 10,000 uneven shards."""
    sizes = np.random.default_rng(0).integers(1, 512, 5000)
    sources = [PlanSource("a", 0, sizes), PlanSource("b", 1, sizes[::-1])]
    plan, seconds = Plan(sources, [0.7, 0.3], global_batch_size=512, seed=1), []
    for step in range(10_000_000, 20_000_000, 1_000_003):
        began = time.perf_counter()
        plan.batch(step)
        seconds.append(time.perf_counter() - began)
    return max(seconds)


def behind_a_store(data: Path, batch: int, rate: float, consumer: float) -> dict:
    """A consumer of so many samples/s behind an HTTP store of `rate` bytes/s: the start, and every wait after it.

    The start is held against a plain download of the shards that the lanes begin with.
    """
    with store_server(data) as server, tempfile.TemporaryDirectory(dir=data) as cache:
        server.rate = rate
        options = {"global_batch_size": batch, "micro_batch_size": batch, "cache_dir": cache}
        config = DataConfig([f"{server.url}/ours"], **options)
        began = time.perf_counter()
        sources = open_sources(config)
        with Stream(sources, config) as stream:
            next(stream)
            start, waits = time.perf_counter() - began, []
            due = time.perf_counter()
            for _ in range(stream.plan.total // batch - 1):  # one pass: later nothing is fetched any more
                due += batch / consumer
                time.sleep(max(0.0, due - time.perf_counter()))
                next(stream)
                waits.append(stream.stats.last_wait)
            first = np.unique(stream.plan.batch(0).shard)
        names = ["manifest.json", "null.safetensors", *(sources[0].manifest.shards[i].name for i in first)]
        began = time.perf_counter()
        for name in names:
            with urllib.request.urlopen(f"{server.url}/ours/{name}") as answer, open(Path(cache, name), "wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
    fetch = time.perf_counter() - began
    return {"start_s": start, "fetch_s": fetch, "longest_wait_s": max(waits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--shard-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="readers whose name begins like this")
    parser.add_argument("--rate", type=float, default=45e6, help="bytes/s of the slow store")
    parser.add_argument("--consumer", type=float, default=100, help="samples/s of the consumer behind it")
    parser.add_argument("--data", type=Path, help="keep the data here and use it again")
    parser.add_argument("--reader", help=argparse.SUPPRESS)  # what the processes below are started with
    args = parser.parse_args()
    found = {n: r for n, r in readers(args.threads).items() if not args.only or n.startswith(tuple(args.only))}
    if args.reader:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(*found[args.reader], args.data, args.batch, args.batches)), flush=True)
        os._exit(0)  # some readers' workers take their time to leave

    data = args.data or Path(tempfile.mkdtemp(prefix="stream-bench-"))
    makers = {"ours": lambda folder: make_source(folder, args.samples, args.shard_size)}
    if any(name.startswith("litdata") for name in found):
        makers["litdata"] = lambda folder: make_litdata(folder, args.samples, "zstd")
        makers["litdata_plain"] = lambda folder: make_litdata(folder, args.samples, None)
    if any(name.startswith("mosaicml") for name in found):
        makers["mosaicml"] = lambda folder: make_mosaic(folder, args.samples)
    sizes = {}
    for name, make in makers.items():
        if not (data / name).exists():
            print(f"writing {args.samples} samples for {name} to {data / name}", flush=True)
            make(data / name)
        sizes[name] = sum(path.stat().st_size for path in (data / name).iterdir()) / args.samples
    print(f"{RAW:,} bytes a sample in memory; stored: " + ", ".join(f"{n} {size:,.0f}" for n, size in sizes.items()))

    results: dict[str, list[dict]] = {name: [] for name in found}
    for turn in range(args.turns):
        for name in found:
            command = [sys.executable, *sys.argv, "--data", str(data), "--reader", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"turn {turn + 1}/{args.turns} {name}: {results[name][-1]['samples_per_s']:,.0f}/s", flush=True)
    rows = {name: {k: median(r[k] for r in runs) for k in runs[0]} for name, runs in results.items()}
    print(f"\n{'':34}{'samples/s':>10}{'CPU s/1000':>12}{'memory MB':>11}{'first batch s':>15}")
    for name, r in rows.items():
        speed = f"{r['samples_per_s']:>10,.0f}{r['cpu_s_per_1000']:>12.3f}"
        print(f"{name:34}{speed}{r['memory_mb']:>11,.0f}{r['first_s']:>15.2f}")
    if "ours" in rows:
        for peer in ("floor", "webdataset", "litdata,", "litdata uncompressed", "mosaicml"):
            if runs := {name: r for name, r in rows.items() if name.startswith(peer)}:
                best = max(runs, key=lambda name: runs[name]["samples_per_s"])
                speed = rows["ours"]["samples_per_s"] / runs[best]["samples_per_s"]
                cpu = rows["ours"]["cpu_s_per_1000"] / min(r["cpu_s_per_1000"] for r in runs.values())
                print(f"ours against {best}: {speed:.2f} times as fast; CPU {cpu:.2f} times that of the leanest")
        slow = behind_a_store(data, args.batch, args.rate, args.consumer)
        print(
            f"behind a store of {args.rate / 1e6:.0f} MB/s, {args.consumer:.0f} samples/s: first batch after"
            f" {slow['start_s']:.2f} s (a plain download of the lanes' first shards: {slow['fetch_s']:.2f} s),"
            f" longest wait after it {1000 * slow['longest_wait_s']:.1f} ms"
        )
        print(f"a step about 10 million, 512 slots, 10,000 shards: sought in at most {1000 * seek():.0f} ms")
    if args.data is None:
        shutil.rmtree(data)


if __name__ == "__main__":
    main()
