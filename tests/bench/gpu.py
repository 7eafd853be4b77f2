"""What this project claims about a GPU: steps a second against the baseline, MFU, memory a sample, the stall of a save,
the teachers, the VAE, sampling at 28 steps, the stream into pinned memory.

    python tests/bench/gpu.py [OUT.json]

A measurement that fails or takes too long is reported, and the others go on; all of it ends in ten minutes. Without a
GPU it runs small on the CPU, which shows that it works and nothing more.
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
LIMIT, BUDGET = 200, 580  # seconds of one measurement, of all
BEGAN = time.monotonic()


def command(*words: object) -> dict:
    """The figures of a benchmark that writes --json."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "figures.json")
        words = [str(out) if word == "OUT" else str(word) for word in words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        limit = max(1.0, min(LIMIT, BUDGET - (time.monotonic() - BEGAN)))
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit
        )
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or f"status {done.returncode}").splitlines()[-1])
        return json.loads(out.read_text())


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
    full = ("--device", "cuda", "--dtype", "float16", "--batch", 32)
    small = ("--batch", 1, "--side", 16, "--channels", 32, 32, 64, 64)
    return command(f"{BENCH}/precache.py", *(full if CUDA else small), "--turns", 3, "--json", "OUT")


def vae() -> dict:
    """Pictures a second through an autoencoder of FLUX's size, both ways."""
    from diffusers import AutoencoderKL

    channels, side, B = ((128, 256, 512, 512), 512, 8) if CUDA else ((32, 32, 32, 32), 64, 1)
    ways = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    model = AutoencoderKL(block_out_channels=channels, layers_per_block=2, latent_channels=16, **ways).eval()
    like = {"device": "cuda" if CUDA else "cpu", "dtype": torch.bfloat16 if CUDA else torch.float32}
    model.to(**like)
    pixels, latents = torch.randn(B, 3, side, side, **like), torch.randn(B, 16, side // 8, side // 8, **like)
    figures = {}
    for name, run in (("encoded", lambda: model.encode(pixels).latent_dist.mode()),
                      ("decoded", lambda: model.decode(latents).sample)):  # fmt: skip
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            with torch.no_grad():
                run().sum().item()  # waits for the device
            seconds.append(time.perf_counter() - began)
        figures[f"{name}_per_s"] = B / median(seconds[1:])
    return figures


def host() -> dict:
    """Host time, operations and reads of a step."""
    return command(f"{BENCH}/host_time.py", "--steps", 15, "--json", "OUT")


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


MEASUREMENTS = (training, saving, teachers, vae, sampling, streaming, host)


def main(out: Path) -> int:
    """Measure, print the table, write the file. Returns 1 where a measurement failed."""
    name = torch.cuda.get_device_name() if CUDA else "CPU (small sizes: no claim)"
    found: dict = {"device": name, "torch": torch.__version__}
    rows: list[tuple] = []
    for measure in MEASUREMENTS:
        began = time.perf_counter()
        try:
            found[measure.__name__] = measure()
        except (RuntimeError, OSError, ValueError, ImportError, subprocess.TimeoutExpired) as error:
            found[measure.__name__] = {"error": str(error)}
        print(f"{measure.__name__}: {time.perf_counter() - began:.0f} s", flush=True)
        rows += [(measure.__name__, *row) for row in flat(found[measure.__name__])]
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\n{name}, torch {torch.__version__}", table(rows), f"written: {out}", sep="\n")
    return int(any("error" in found[measure.__name__] for measure in MEASUREMENTS))


def flat(figures: dict, prefix: str = "") -> list[tuple]:
    """(name, value) of nested figures."""
    rows = []
    for key, value in figures.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key} ")
        else:
            rows.append((prefix + key, "-" if value is None else value))
    return rows


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "gpu.json")))
