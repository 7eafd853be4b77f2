"""A source of 10^9 samples in 4 million shards: the cost of opening it, seeking a step, and planning steps.

    python tests/bench/large_source.py --folder /somewhere/with/6/GB

There are no shards, only their manifest and index, which are written once. Memory is private memory of the process; the
index is in the page cache. The seek is the first requested step of a plan, deep in a pass, and includes the order of
all shards. The planned steps are those of 64 sources with as many samples in total.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.make_source import make_tensors
from tinyflux.shards.config import DataConfig
from tinyflux.shards.index import Index
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.plan import Plan, PlanSource
from tinyflux.shards.schema import fields_of, grouped
from tinyflux.shards.sources import open_sources
from tinyflux.shards.stream import Stream
from tinyflux.shards.writer import write_null
from tinyflux.util.buckets import BUCKETS

A_SHARD = 250
SEEK = 1_234_567  # the step that is sought


def make(folder: Path, shards: int) -> None:
    """Write the manifest and the index."""
    folder.mkdir(parents=True)
    tensors, count, generator = make_tensors(0), shards * A_SHARD, np.random.default_rng(0)
    null_sha256 = write_null(folder, {name: torch.zeros_like(tensors[name]) for name in ("t5_embeds", "clip_pooled")})
    arrays = {
        "bytes": np.full(shards, 80_000_000, "<u8"),
        "samples": np.full(shards, A_SHARD, "<u4"),
        "number": np.arange(shards, dtype="<u4"),
        "origins": np.lib.stride_tricks.as_strided(  # each shares three bytes with the next: one byte of memory a row
            generator.integers(0, 1 << 32, count // 4 + 2, "<u4"), (count,), (1,)
        ),
        "shape": np.zeros(shards, "<u2"),
        "sha256": np.frombuffer(hashlib.shake_128(b"").digest(32 * shards), "u1").reshape(shards, 32),
        "captions": np.broadcast_to(np.uint8(1), (count,)),
    }
    groups = grouped(fields_of(tensors), BUCKETS)
    Manifest("large", 1, groups, [(4, 4)], Index(arrays), null_sha256=null_sha256, subfolders=True).save(folder)


def own() -> float:
    """MB of this process's private memory, without mapped files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1000


def measure(folder: Path, batch: int, ranks: int, val_fraction: float) -> None:
    """Print the cost of opening and planning; runs in a separate process."""
    before, began = own(), time.perf_counter()
    config = DataConfig([str(folder)], global_batch_size=batch, val_fraction=val_fraction)
    stream = Stream(open_sources(config), config, 0, ranks)
    opened = time.perf_counter() - began
    print(f"{stream.plan.total:,} samples of {len(stream.sources[0].manifest.shards):,} shards: open {opened:.2f} s")
    began = time.perf_counter()
    stream.plan.batch(SEEK, 0, ranks)
    print(f"first step: {1000 * (time.perf_counter() - began):.0f} ms; own memory {own() - before:.0f} MB")


def steps(shards: int, batch: int, ranks: int, count: int) -> None:
    """Print what the steps of many sources take."""
    sizes = [np.full(shards // count + s, A_SHARD) for s in range(count)]
    sources = [PlanSource(f"source-{s}", s, sizes[s]) for s in range(count)]
    plan = Plan(sources, [1 + s % 7 for s in range(count)], global_batch_size=batch, seed=0, unit=8)
    began = time.perf_counter()
    plan.batch(SEEK, 0, ranks)
    sought, began = time.perf_counter() - began, time.perf_counter()
    for step in range(SEEK + 1, SEEK + 21):
        plan.batch(step, step % ranks, ranks)
    each = (time.perf_counter() - began) / 20
    print(f"{count} sources, G = {batch:,}, rank of {ranks}: {1000 * each:.1f} ms a step, first {1000 * sought:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the index is written, and kept")
    parser.add_argument("--shards", type=int, default=4_000_000)
    parser.add_argument("--batch", type=int, default=65_536)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--sources", type=int, default=64)
    parser.add_argument("--val-fraction", type=float, default=0.0)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.folder, args.batch, args.ranks, args.val_fraction)
        steps(args.shards, args.batch, args.ranks, args.sources)
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="large-source-"), "source")
    if not folder.exists():
        began = time.perf_counter()
        make(folder, args.shards)
        size, seconds = os.path.getsize(folder / "index.safetensors"), time.perf_counter() - began
        print(f"index of {size / 1e9:.2f} GB written in {seconds:.0f} s", flush=True)
    subprocess.run([sys.executable, __file__, "--measure", *sys.argv[1:], "--folder", str(folder)], check=True)
    if args.folder is None:
        shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
