"""What this project claims about a GPU: steps a second against the baseline, MFU, memory a sample, the stall of a save,
the teachers, the VAE, sampling at 28 steps, the stream into pinned memory.

    python tests/bench/gpu.py [OUT.json]

Each measurement runs in a separate process. One that fails or takes too long is reported, and the others continue;
everything ends within ten minutes, and the file is written after each. Without a GPU, small versions run on the CPU,
only to show that they work.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tinyflux.util.cli import table

ROOT = Path(__file__).parents[2]
CUDA = torch.cuda.is_available()
GIB = torch.cuda.get_device_properties(0).total_memory / 2**30 if CUDA else 0
BENCH = "tests/bench"
LIMIT, BUDGET = 200, 550  # seconds of one measurement, of all
BEGAN = time.monotonic()


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


def sampling() -> dict:
    """Seconds a picture at 28 guided steps, eager, in batches of 8."""
    from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
    from tinyflux.trainer.sampling import Settings, denoise

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
    from tests.make_source import make_source
    from tinyflux.shards.stream import DataConfig, Stream, open_sources

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


PARTS = {part.__name__: part for part in (vae, sampling, streaming)}


def batch(most: int, gib: float) -> int:
    """Samples that fit into the GPU's memory where each takes so many GiB."""
    return max(1, min(most, int(GIB / gib)))


def commands() -> dict[str, tuple]:
    """Each measurement's command line, which ends with the file that it writes. The long one is last: it gets all the
    time that is left."""
    step, precache = [f"{BENCH}/train_step.py"], [f"{BENCH}/precache.py", "--turns", 3]
    save = [f"{BENCH}/save_step.py", "--saves", 3, "--every", 6]
    if CUDA:
        step += ["--device", "cuda", "--dtype", "bfloat16", "--batch", batch(8, 8), "--turns", 10]
        precache += ["--device", "cuda", "--dtype", "float16", "--batch", batch(32, 4)]
        save += ["--blocks", 15, 25, "--grid", 64, "--batch", batch(8, 8), "--dtype", "bfloat16"]
    else:
        step += ["--batch", 4, "--turns", 2]
        precache += ["--batch", 1, "--side", 16, "--channels", 32, 32, 64, 64]
        save += ["--blocks", 1, 1]
    compiled = ["baseline-compiled", "ours-compiled", "ours-compiled-selective"] if CUDA else ["ours-compiled"]
    return {
        "training": (*step, "--variants", "baseline-eager", "ours-eager"),
        "saving": (*save,),
        "teachers": (*precache,),
        **{name: (f"{BENCH}/gpu.py", "--part", name) for name in PARTS},
        "host": (f"{BENCH}/host_time.py", "--steps", 15),
        "training compiled": (*step, "--variants", "baseline-eager", *compiled),
    }


def measured(words: tuple, limit: float) -> dict:
    """The figures of a command. Raises RuntimeError with its last words, or where it takes too long."""
    kept = Path(tempfile.gettempdir(), f"tinyflux-compiled-{os.getuid()}")
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "said"), "w+") as said:
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(kept), **os.environ, "TMPDIR": folder}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        if words[0].endswith("host_time.py"):
            environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(
            [sys.executable, *map(str, words), "--json", f"{folder}/figures.json"],
            cwd=ROOT,
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done in {limit:.0f} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started, too
            process.wait()
        if status:
            said.seek(0)
            lines = said.read().strip().splitlines() or [f"status {status}"]
            print(*lines[-15:], sep="\n", file=sys.stderr, flush=True)
            raise RuntimeError(next((line for line in reversed(lines) if "rror" in line), lines[-1]))
        return json.loads(Path(folder, "figures.json").read_text())


def main(out: Path) -> int:
    """Measure, print the table, write the file. Returns 1 where a measurement failed."""
    name = torch.cuda.get_device_name() if CUDA else "CPU (small sizes: no claim)"
    found: dict = {"device": name, "torch": torch.__version__, "python": sys.version.split()[0]}
    rows: list[tuple] = []
    for what, words in commands().items():
        began, left = time.monotonic(), BUDGET - (time.monotonic() - BEGAN)
        limit = max(1.0, left if what == "training compiled" else min(LIMIT, left))
        try:
            found[what] = measured(words, limit)
        except (RuntimeError, OSError, ValueError) as error:
            found[what] = {"error": str(error)}
        out.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{what}: {time.monotonic() - began:.0f} s", found[what].get("error", ""), flush=True)
        rows += [(what, *row) for row in flat(found[what])]
    print(f"\n{name}, torch {torch.__version__}", table(rows), f"written: {out}", sep="\n")
    return int(any(name.endswith("error") for _, name, _ in rows))


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
    if sys.argv[1:2] == ["--part"]:
        Path(sys.argv[4]).write_text(json.dumps(PARTS[sys.argv[2]]()))
        sys.exit(0)
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "gpu.json")))
