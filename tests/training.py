"""Helpers of the training tests: small sources of random tensors, and real torchrun processes on them."""

import contextlib
import io
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.distributed import TCPStore

import tests.make_source as sources
from launch.train import main
from tests.forked import Forked
from tests.held import holding

ROOT = Path(__file__).parent.parent
TINY = {  # the network that tests train, without the sizes that depend on the shards
    "hidden_size": 32,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "num_double_layers": 1,
    "num_single_layers": 2,
    "lune_hidden_dim": 16,
    "sol_hidden_dim": 8,
}
FITTED = {"in_channels": 4, "joint_attention_dim": 24, "pooled_projection_dim": 24, "lune_expert_dim": 24}
"""Those sizes, of `make_source`."""


def options_of(group: str, values: dict) -> list[str]:
    """Settings as the options of a command."""
    words = [
        (f"--{group}.{key.replace('_', '-')}", *(v if isinstance(v, tuple) else (v,))) for key, v in values.items()
    ]
    return [str(word) for several in words for word in several]


SMALL = [  # a run small enough for a test
    *options_of("model", TINY),
    *("--trainer.dtype", "float32", "--trainer.learning-rate", "3e-3", "--trainer.warmup-steps", "4"),
    *("--trainer.lr-scheduler", "constant"),
    *("--trainer.lune-warmup-steps", "5", "--trainer.sol-warmup-steps", "5", "--trainer.ema-decay", "0.9"),
    *("--trainer.save-every-epochs", "0", "--trainer.log-every", "5"),
    *("--data.global-batch-size", "8", "--data.micro-batch-size", "4", "--data.seed", "7"),
]


def make_source(folder: Path, dataset_id: int, samples: int = 24, shard_size: int = 8, **options) -> Path:
    """A source for SMALL; options go to `tests.make_source.make_source`."""
    counts = [min(shard_size, samples - first) for first in range(0, samples, shard_size)]
    return sources.make_source(folder, counts, dataset_id=dataset_id, seed=dataset_id, **(sources.TRAINABLE | options))


def options_of_run(run_dir: Path, sources: list[Path], *options: object) -> list[str]:
    """The options of a training."""
    return ["--run-dir", str(run_dir), "--data.sources", *map(str, sources), *SMALL, *map(str, options)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(holds: dict[str, Path] | None) -> tuple[list[Path], dict[str, str]]:
    """The training command and its environment. holds: where it waits, see tests/held.py."""
    script = ROOT / "launch/train.py"
    return ([ROOT / "tests/held.py", script], environment() | holding(holds)) if holds else ([script], environment())


def train(
    run_dir: Path,
    sources: list[Path],
    *options: object,
    ranks: int = 1,
    file_limit: int | None = None,
    meanwhile: Callable[[list[Forked]], None] | None = None,
    holds: dict[str, Path] | None = None,
) -> subprocess.CompletedProcess:
    """Run a training to its end; stdout has stderr too. file_limit: bytes beyond which writing a file fails.
    meanwhile: is called with the processes of several ranks once they are started. holds: where these wait.

    Of one rank without a limit in this process, of several in forked ones: both spare the start of an interpreter.
    """
    script, env = command(holds)
    argv = [*script, *options_of_run(run_dir, sources, *options)]
    if ranks == 1:
        if file_limit is None:
            return _train_here(argv)
        process = Forked(argv, environment(), file_limit=file_limit)
        said, _ = process.communicate(timeout=300)
        return subprocess.CompletedProcess(argv, process.returncode, said)
    with tempfile.NamedTemporaryFile() as log:
        status = run_ranks(argv, ranks, Path(log.name), meanwhile, env=env)
        return subprocess.CompletedProcess(argv, status, Path(log.name).read_text())


def run_ranks(
    argv: Sequence[object],
    ranks: int,
    log: Path,
    meanwhile: Callable[[list[Forked]], None] | None = None,
    timeout: float = 300,
    env: dict[str, str] | None = None,
) -> int:
    """`argv` on several ranks, as torchrun would start them, with their output in `log`.

    Returns the exit status of a rank that failed, which ends the others, or 0.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # kept here, as torchrun's agent does
    env = (env or environment()) | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_WORLD_SIZE": "1",
    }
    processes = [Forked(argv, env | {"RANK": str(r), "LOCAL_RANK": str(r)}, log=log) for r in range(ranks)]
    if meanwhile:
        meanwhile(processes)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        statuses = [process.poll(timeout=0.01) for process in processes]
        if failed := [status for status in statuses if status]:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(30)
            return failed[0]
        if None not in statuses:
            return 0
    return -signal.SIGKILL


def _train_here(argv: list[object]) -> subprocess.CompletedProcess:
    output, threads = io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes: the summation order depends on it
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = main(argv[1:])
    except RuntimeError as error:
        status = 1
        output.write(str(error))
    finally:
        torch.set_num_threads(threads)
    return subprocess.CompletedProcess(argv, status, output.getvalue())


def start(run_dir: Path, sources: list[Path], *options: object, holds: dict[str, Path] | None = None) -> Forked:
    """Start a training on one rank. holds: where it waits."""
    script, env = command(holds)
    return Forked([*script, *options_of_run(run_dir, sources, *options)], env)


def start_torchrun(
    run_dir: Path,
    sources: list[Path],
    *options: object,
    ranks: int = 2,
    more: Sequence[object] = (),
    holds: dict[str, Path] | None = None,
) -> Forked:
    """Start a training on several ranks under the real torchrun. more: its options; holds: where the ranks wait. The
    output is in RUN_DIR.log."""
    script, env = command(holds)
    argv = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *more]
    argv += [*script, *options_of_run(run_dir, sources, *options)]
    return Forked(argv, env, log=Path(f"{run_dir}.log"))


def wait_for(process: Forked, run_dir: Path, when: int | Path) -> None:
    """Wait until a step of a run is recorded, or a file exists. AssertionError if the process ends before."""
    deadline = time.monotonic() + 300
    while not (when.exists() if isinstance(when, Path) else len(records(run_dir)) >= when):
        assert process.poll() is None and time.monotonic() < deadline, f"{process.returncode} before {when}"
        time.sleep(0.002)


def workers(torchrun: Forked) -> list[int]:
    """Process ids of the ranks, in their order."""
    found = {}
    for children in Path(f"/proc/{torchrun.pid}/task").glob("*/children"):
        for pid in children.read_text().split():
            content: list[bytes] = []
            with contextlib.suppress(OSError):  # it has ended
                content = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = next((entry[5:] for entry in content if entry.startswith(b"RANK=")), None)
            if rank is not None:
                found[int(rank)] = int(pid)
    return [found[rank] for rank in sorted(found)]


def train_until(
    run_dir: Path, sources: list[Path], when: int | Path, number: int, *options: object, latest: str
) -> tuple[int, str]:
    """Train on one rank until a step is recorded or a file exists, then send a signal. (Exit status, output).

    latest: the place where the training waits for the signal if it comes there first.
    """
    sent = run_dir.with_name(f"{run_dir.name}.{when if isinstance(when, int) else when.name}.sent")
    process = start(run_dir, sources, *options, holds={latest: sent})
    wait_for(process, run_dir, when)
    process.send_signal(number)
    sent.touch()
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def records(run_dir: Path) -> list[dict]:
    """The complete lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def curve(run_dir: Path) -> list[dict]:
    """The records without entries that depend on the clock or on the process's start."""
    timing = ("samples_per_s", "step_s", "data_wait", "slowest", "data", "resumed")
    return [{k: v for k, v in record.items() if k not in timing} for record in records(run_dir)]
