"""What this project claims about a GPU: steps a second against the baseline, MFU, memory a sample, the stall of a save,
the teachers, sampling at 28 steps, the stream into pinned memory.

    python tests/bench/gpu.py [OUT.json]

Each measurement has a process and a time limit of its own; one that fails is reported and the others go on. Without a
GPU all of it runs small on the CPU, which shows that it works and nothing more.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.make_source import make_source
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.shards.stream import DataConfig, Stream, open_sources
from tinyflux.trainer.sampling import Settings, denoise
from tinyflux.util.cli import table

ROOT = Path(__file__).parents[2]
CUDA = torch.cuda.is_available()
BENCH = "tests/bench"
TRAIN = ("baseline-eager", "baseline-compiled", "ours-eager", "ours-compiled", "ours-compiled-selective")
LIMIT = 200  # seconds of one measurement


def command(*words: object) -> dict:
    """The figures of a benchmark that writes --json, or what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "figures.json")
        words = [str(out) if word == "OUT" else str(word) for word in words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return json.loads(out.read_text()) if out.exists() else {"printed": done.stdout.strip().splitlines()}


def training() -> dict:
    """Eager, compiled and baseline: samples a second, MFU, memory a sample."""
    size = ("--device", "cuda", "--dtype", "bfloat16", "--batch", 8) if CUDA else ("--batch", 4, "--turns", 2)
    variants = TRAIN if CUDA else ("baseline-eager", "ours-eager")
    size = (*size, "--turns", 10) if CUDA else size
    figures = command(f"{BENCH}/train_step.py", *size, "--variants", *variants, "--json", "OUT")
    best = max(run["samples_per_s"] for name, run in figures.items() if name.startswith("ours"))
    return figures | {"times_the_eager_baseline": best / figures["baseline-eager"]["samples_per_s"]}


def saving() -> dict:
    """The stall of a step that begins a save."""
    full = ("--blocks", 15, 25, "--grid", 64, "--batch", 8, "--dtype", "bfloat16") if CUDA else ("--blocks", 1, 1)
    return command(f"{BENCH}/save_step.py", *full, "--saves", 3, "--every", 6, "--json", "OUT")


def teachers() -> dict:
    """Lune and Sol, against the plain way."""
    full = ("--device", "cuda", "--dtype", "float16", "--batch", 32) if CUDA else ("--batch", 1, "--side", 8)
    return command(f"{BENCH}/precache.py", *full, "--turns", 3 if CUDA else 1)


def host() -> dict:
    """Host time, operations and reads of a step."""
    return command(f"{BENCH}/host_time.py", "--steps", 15)


def sampling() -> dict:
    """Seconds a picture at 28 guided steps, eager, in batches of 8."""
    device = torch.device("cuda" if CUDA else "cpu")
    small = {"num_double_layers": 1, "num_single_layers": 1}
    config, side, B = (TinyFluxConfig(), 64, 8) if CUDA else (TinyFluxConfig(**small), 8, 1)
    model = TinyFluxDeep(config).to(device, torch.bfloat16 if CUDA else torch.float32).eval()
    noise = torch.randn(B, config.in_channels, side, side, device=device)
    text = [torch.randn(B, 128, config.joint_attention_dim), torch.randn(B, config.pooled_projection_dim)]
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        denoise(model, noise, *text, *text, Settings(steps=28)).cpu()
        seconds.append(time.perf_counter() - began)
    return {"seconds_per_picture": median(seconds[1:]) / B}


def streaming() -> dict:
    """Samples a second of a stream of full-size samples, into pinned memory where there is a GPU."""
    sizes = {"channels": 16, "t5_length": 128, "t5_width": 768, "clip_width": 768, "lune_width": 1280}
    with tempfile.TemporaryDirectory() as folder:
        make_source(Path(folder, "source"), [128] * (4 if CUDA else 1), shapes=((64, 64),), **sizes)
        config = DataConfig([f"{folder}/source"], global_batch_size=8, threads=4 if CUDA else 2)
        with Stream(open_sources(config), config, device="cuda" if CUDA else "cpu") as stream:
            next(stream)
            began, samples = time.perf_counter(), 0
            while time.perf_counter() - began < (10 if CUDA else 2):
                samples += len(next(stream)["keys"])
            return {"samples_per_s": samples / (time.perf_counter() - began)}


MEASUREMENTS = (training, saving, teachers, sampling, streaming, host)


def main(out: Path) -> int:
    """Measure, print the table, write the file. Returns 1 where a measurement failed."""
    name = torch.cuda.get_device_name() if CUDA else "CPU (small sizes: no claim)"
    found: dict = {"device": name, "torch": torch.__version__}
    rows: list[tuple] = []
    for measure in MEASUREMENTS:
        began = time.perf_counter()
        try:
            found[measure.__name__] = measure()
        except (RuntimeError, OSError, ValueError, subprocess.TimeoutExpired) as error:
            found[measure.__name__] = {"error": str(error)}
        print(f"{measure.__name__}: {time.perf_counter() - began:.0f} s", flush=True)
        rows += [(measure.__name__, *row) for row in flat(found[measure.__name__])]
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\n{name}, torch {torch.__version__}", table(rows), f"written: {out}", sep="\n")
    return int(any("error" in found[measure.__name__] for measure in MEASUREMENTS))


def flat(figures: dict, prefix: str = "") -> list[tuple]:
    """(name, value) of nested figures, a printed line each."""
    rows = []
    for key, value in figures.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key} ")
        elif isinstance(value, list):
            rows += [("", line) for line in value]
        else:
            rows.append((prefix + key, "-" if value is None else value))
    return rows


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "gpu.json")))
