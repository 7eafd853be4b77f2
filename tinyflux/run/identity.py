"""A run's identity: configuration, data, code and library versions. Compared between ranks and when resuming."""

import hashlib
import json
import os
import platform
import socket
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

LIBRARIES = ("torch", "numpy", "safetensors", "zstandard", "diffusers", "transformers")
# keys that may differ between nodes, or do not change the results
LOCAL = {"run_dir", "dry_run", "start_over", "data.sources", "data.cache_dir", "data.cache_gb", "data.threads"}


def flat(config: dict, prefix: str = "") -> dict[str, object]:
    """A nested config with dotted keys and plain values."""
    found: dict[str, object] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= flat(value, f"{name}.")
        else:
            found[name] = json.loads(json.dumps(value, default=str))
    return found


def changes(before: dict, now: dict) -> list[str]:
    """One line for each differing key of two nested configs: `trainer.shift was 3.0, is now 1.0`."""
    old, new = flat(before), flat(now)
    if not old:
        return []
    keys = [key for key in {**old, **new} if key not in LOCAL and old.get(key) != new.get(key)]
    told = {key: (old.get(key, "not there"), new.get(key, "not there")) for key in keys}
    return [f"{key} was {a}, is now {b}" for key, (a, b) in told.items()]


def code() -> str:
    """A hash of this package's source files."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def software() -> dict[str, str]:
    """Versions of Python, libraries, CUDA and this package's code."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda), "tinyflux": code()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def agree(facts: dict) -> None:
    """Raises ValueError on every rank, with key, rank and host, if a rank's facts (nested, JSON) differ from rank 0's.

    Only hashes are exchanged, and the facts themselves if hashes differ. Must be called on all ranks.
    """
    mine = {key: value for key, value in flat(facts).items() if key not in LOCAL}
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest()[:7]
    value = int.from_bytes(digest, "big")
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    extremes = torch.tensor([value, -value], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    high, low = extremes.tolist()
    if high == -low:
        return
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), os.environ.get("LOCAL_RANK", "0"), mine))
    first, lines = everyone[0][2], []
    for rank, (host, local, facts_there) in enumerate(everyone):
        keys = [key for key in {**first, **facts_there} if first.get(key) != facts_there.get(key)]
        lines += [
            f"{key} is {facts_there.get(key, 'not there')} on rank {rank} ({host}, local rank {local}),"
            f" {first.get(key, 'not there')} on rank 0"
            for key in keys
        ]
    shown = "\n  ".join(lines[:8] + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else []))
    raise ValueError(f"the ranks differ, so they would train different models:\n  {shown}")
