"""The stream against webdataset, LitData and MosaicML Streaming, on the same samples in one run.

    python tests/bench/stream.py --peers /path/to/peers/bin/python
    python tests/bench/stream.py --only ours floor --turns 5

Every reader runs in its own process, delivers shuffled batches of the stored tensors, and takes turns with the others;
figures are medians over the turns. A peer is measured with 0 to --threads workers in the first turn, and then with the
best number of workers. `floor` is the limit for any reader of these shards: a bare pool of as many threads that reads,
decompresses and joins. Memory is the PSS of the process and its children, minus that before it opened anything. LitData
and MosaicML are not dependencies: install this package's dependencies and `pip install litdata mosaicml-streaming` in
another environment, and give its interpreter with --peers.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.readers import RAW, READERS, Reader

TICKS = os.sysconf("SC_CLK_TCK")


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
    return total / TICKS


def resident() -> int:
    """Bytes of a process and its children, with shared memory divided among its users (PSS)."""
    total = 0
    for pid in family():
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def measure(reader: Reader, workers: int, data: Path, batch: int, batches: int) -> dict:
    """Time to the first batch, samples/s, CPU seconds per 1,000 samples, peak memory."""
    idle, began = resident(), time.perf_counter()
    loader: Iterator[dict] = reader.read(data / reader.folder, batch, workers)
    next(loader)
    first = time.perf_counter() - began
    for _ in range(8):
        next(loader)
    cpu, began = cpu_seconds(), time.perf_counter()
    for _ in range(batches):
        assert len(next(loader)["latents"]) == batch
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    held = []  # afterwards: looking takes time too
    for _ in range(batches // 4):
        next(loader)
        held.append(resident() - idle)
    samples = batch * batches
    figures = {"samples_per_s": samples / seconds, "cpu_s_per_1000": 1000 * cpu / samples}
    return figures | {"memory_mb": max(held) / 1e6, "first_s": first}


def behind_a_store(data: Path, batch: int, rate: float, consumer: float) -> dict:
    """A consumer of a fixed number of samples/s behind an HTTP store of `rate` bytes/s: the start, and later waits.

    The start is compared with a plain download of the lanes' first shards.
    """
    from tests.store_server import store_server
    from tinyflux.shards.stream import DataConfig, Stream, open_sources

    with store_server(data) as server, tempfile.TemporaryDirectory(dir=data) as cache:
        server.rate = rate
        url = f"{server.url}/ours"
        config = DataConfig([url], global_batch_size=batch, micro_batch_size=batch, cache_dir=cache)
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
            shards = sorted(set(stream.plan.batch(0).shard.tolist()))
        names = ["manifest.json", "index.safetensors", "null.safetensors"]
        names += [sources[0].manifest.shards[k].path for k in shards]
        began = time.perf_counter()
        for name in names:
            with urllib.request.urlopen(f"{url}/{name}") as answer, open(Path(cache, "plain"), "wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
    return {"start_s": start, "fetch_s": time.perf_counter() - began, "longest_wait_s": max(waits)}


def run(arguments: argparse.Namespace, data: Path, name: str, workers: int | None = None) -> dict:
    """The figures of a reader, measured in its own process; without workers, write its data."""
    python = (READERS[name].peer and arguments.peers) or sys.executable
    command = [python, __file__, "--data", data, "--reader", name]
    if workers is not None:
        command += ["--workers", workers]
    for key in ("samples", "batch", "batches", "threads"):
        command += [f"--{key}", getattr(arguments, key)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def has(python: str, package: str) -> bool:
    """Whether an environment has a package."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code]).returncode == 0


def compare(rows: dict[str, dict], stored: dict[str, float]) -> Iterator[str]:
    """Conclusions about the stream from the figures, one per line."""
    mine = rows["ours"]
    yield f"stored: {stored['ours'] / RAW:.3f} of the raw bytes; memory {mine['memory_mb']:.0f} MB"
    for peer in ("webdataset", "litdata", "mosaicml"):
        if speeds := {n: r["samples_per_s"] for n, r in rows.items() if n.startswith(peer)}:
            best = max(speeds, key=speeds.get)
            yield f"{mine['samples_per_s'] / speeds[best]:.2f} times {best}"
    if "floor" in rows:
        share, cpu = (mine[k] / rows["floor"][k] for k in ("samples_per_s", "cpu_s_per_1000"))
        yield f"{share:.1%} of the floor, with {cpu:.2f} times its CPU time"
    if "ours, collated" in rows:
        yield f"the training's collate costs {1 - rows['ours, collated']['samples_per_s'] / mine['samples_per_s']:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="readers whose name begins like this")
    parser.add_argument("--peers", help="the interpreter of an environment with litdata and mosaicml-streaming")
    parser.add_argument("--rate", type=float, default=45e6, help="bytes/s of the slow store")
    parser.add_argument("--consumer", type=float, default=100, help="samples/s of the consumer behind it")
    parser.add_argument("--data", type=Path, help="keep the data here and use it again")
    parser.add_argument("--reader", help=argparse.SUPPRESS)  # what the processes below are started with
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reader:
        torch.set_num_threads(args.threads)
        reader = READERS[args.reader]
        if args.workers is None:
            reader.make(args.data / reader.folder, args.samples)
            figures = {}
        else:
            figures = measure(reader, args.workers, args.data, args.batch, args.batches)
        print(json.dumps(figures), flush=True)
        os._exit(0)  # some readers' workers take their time to leave

    pythons = {name: (reader.peer and args.peers) or sys.executable for name, reader in READERS.items()}
    found = {
        name: reader
        for name, reader in READERS.items()
        if (not args.only or name.startswith(tuple(args.only))) and (not reader.peer or has(pythons[name], reader.peer))
    }
    data = args.data or Path(tempfile.mkdtemp(prefix="stream-bench-"))
    stored = {}
    for name, reader in found.items():
        if not (data / reader.folder).exists():
            print(f"writing {args.samples} samples to {data / reader.folder}", flush=True)
            run(args, data, name)
        files = (path for path in (data / reader.folder).rglob("*") if path.is_file())
        stored[name] = sum(path.stat().st_size for path in files) / args.samples

    results: dict[str, dict[int, list[dict]]] = {
        name: {n: [] for n in (range(args.threads + 1) if reader.peer else [args.threads])}
        for name, reader in found.items()
    }
    for turn in range(args.turns):
        for name, by_workers in results.items():
            for workers, runs in by_workers.items():
                runs.append(run(args, data, name, workers))
                speed = runs[-1]["samples_per_s"]
                print(f"turn {turn + 1}/{args.turns} {name}, {workers}: {speed:,.0f}/s", flush=True)
        if turn == 0:
            for name, by_workers in results.items():
                best = max(by_workers, key=lambda n: by_workers[n][0]["samples_per_s"])
                results[name] = {best: by_workers[best]}
    rows = {}
    print(f"\n{'':30}{'workers':>8}{'samples/s':>11}{'CPU s/1000':>12}{'memory MB':>11}{'first s':>9}{'stored':>8}")
    for name, by_workers in results.items():
        ((workers, runs),) = by_workers.items()
        r = rows[name] = {key: median(run[key] for run in runs) for key in runs[0]}
        figures = f"{workers:>8}{r['samples_per_s']:>11,.0f}{r['cpu_s_per_1000']:>12.3f}{r['memory_mb']:>11,.0f}"
        print(f"{name:30}{figures}{r['first_s']:>9.2f}{stored[name] / RAW:>8.3f}")
    if "ours" in rows:
        print(*compare(rows, stored), sep="\n")
        slow = behind_a_store(data, args.batch, args.rate, args.consumer)
        print(
            f"behind a store of {args.rate / 1e6:.0f} MB/s, {args.consumer:.0f} samples/s: first batch after"
            f" {slow['start_s']:.2f} s, {slow['start_s'] / slow['fetch_s']:.3f} times a plain download of the lanes'"
            f" first shards; longest wait after it {1000 * slow['longest_wait_s']:.1f} ms"
        )
    if args.data is None:
        shutil.rmtree(data)


if __name__ == "__main__":
    main()
