"""Field test of this machine: build all caches from random images and run a short training.

    python -m tinyflux.test_training               the real models on a machine with a GPU, else the packaged ones
    python -m tinyflux.test_training --zoo tiny    the packaged models: offline, under a minute on two cores
    python -m tinyflux.test_training --zoo flux    the real models, from the Hub, and the whole network

The exit status is 1 if a loss does not fall, or the last losses are not below 1.0.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image

from tinyflux.util import cli

SMALL = {"hidden_size": 64, "num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (0, 16, 16)}
SMALL |= {"num_double_layers": 2, "num_single_layers": 4, "lune_hidden_dim": 64, "sol_hidden_dim": 64}
WINDOW = 10  # number of first and last steps to average: the losses of one step depend on its timesteps
LIMIT = 1.0


@dataclass
class Config:
    zoo: str | None = None
    """flux (the real models, from the Hub), tiny (packaged, offline) or a folder. Default: flux if torch finds a GPU,
    else tiny."""
    device: str | None = None
    """cpu, cuda, ... Default: the GPU if there is one."""
    steps: int = 50
    """Training steps."""
    samples: int = 16
    """Number of random images and prompts."""
    out: str | None = None
    """Folder for the cache, the run and its report; default: a temporary one."""

    def __post_init__(self):
        if self.steps < 2 * WINDOW:
            raise ValueError(f"--steps must be at least {2 * WINDOW}, not {self.steps}")
        if self.samples < 4:
            raise ValueError(f"--samples must be at least 4, not {self.samples}")


def random_pictures(count: int, size: int) -> tuple[list[Image.Image], list[str]]:
    """Pictures of random coloured squares, and prompts."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    images = [Image.fromarray(s).resize((size, size), Image.Resampling.NEAREST) for s in squares]
    subjects, styles = ("cat", "dog", "robot", "tree", "house"), ("photograph", "sketch", "watercolour")
    return images, [f"a {styles[i % 3]} of a {subjects[i % 5]}, number {i}" for i in range(count)]


def field_test(config: Config, folder: Path) -> bool:
    """Build, train and check the losses. Returns whether the test passes."""
    import torch
    from torch.utils.data import DataLoader

    from tinyflux.model.config import TinyFluxConfig
    from tinyflux.model.model import TinyFluxDeep
    from tinyflux.model.zoo import ModelZoo
    from tinyflux.run.records import read_metrics
    from tinyflux.trainer.cache_experts import DatasetCache, MultiSourceCache
    from tinyflux.trainer.config import TrainerConfig, fit_model
    from tinyflux.trainer.data import CachedDataset, collate_fn
    from tinyflux.trainer.parallel import local_device
    from tinyflux.trainer.trainer import Trainer

    device = torch.device(config.device) if config.device else local_device()
    zoo = ModelZoo(device=device, zoo=config.zoo or ("flux" if torch.cuda.is_available() else "tiny"))
    whole = zoo.image_size >= 512
    print(f"[1/4] {config.samples} random pictures of {zoo.image_size} x {zoo.image_size}, on {device}", flush=True)
    images, prompts = random_pictures(config.samples, zoo.image_size)

    print("[2/4] building all caches: VAE, T5, CLIP, Lune, Sol", flush=True)
    DatasetCache.build(zoo, images, prompts, name="random", batch_size=4).save(folder / "cache")
    zoo.unload_all()
    cache = DatasetCache.load(folder / "cache")
    print(f"      {cache}; " + ", ".join(f"{name} {list(field.shape)}" for name, field in cache.fields.items()))

    shapes = {name: field.shape for name, field in cache.fields.items()}
    torch.manual_seed(0)
    model = TinyFluxDeep(fit_model(TinyFluxConfig() if whole else TinyFluxConfig(**SMALL), set(), shapes))
    print(f"[3/4] training {model.num_parameters() / 1e6:.1f}M parameters for {config.steps} steps", flush=True)
    loader = DataLoader(CachedDataset(cache), batch_size=8, shuffle=True, collate_fn=collate_fn)
    caches = MultiSourceCache()
    caches.add(cache, dataset_id=0)
    trainer = Trainer(
        model,
        TrainerConfig(
            learning_rate=3e-4 if whole else 4e-3,
            total_steps=config.steps,
            warmup_steps=5,
            gradient_accumulation=2,
            stratified_sampling=True,
            dtype="bfloat16" if device.type == "cuda" else "float32",
            lune_warmup_steps=5,
            lune_dropout=0.5,
            sol_warmup_steps=5,
            sol_dropout=0.5,
            save_every_epochs=0,
            log_every=10,
        ),
        device=device,
        run_dir=folder / "run",
    )
    trainer.setup(loader, caches)
    trainer.train()

    print("[4/4] losses, mean of the first and last steps", flush=True)
    records, well = read_metrics(folder / "run"), True
    for name in ("sol", "lune", "main", "loss"):
        first, last = (fmean(r[name] for r in part) for part in (records[:WINDOW], records[-WINDOW:]))
        verdict = "fell" if last < first else "DID NOT FALL"
        well &= last < first
        print(f"      {name:5} {first:.4f} -> {last:.4f}  {verdict}")
    if last >= LIMIT:
        well = False
        print(f"      the last losses are not below {LIMIT}")
    print("PASSED" if well else "FAILED")
    return well


def run(config: Config) -> int:
    """Run the test in the given folder or in a temporary one."""
    with tempfile.TemporaryDirectory(prefix="tinyflux-test-") as folder:
        return cli.DONE if field_test(config, Path(config.out or folder)) else cli.FAILED


def main(args: list[str] | None = None) -> int:
    """The command; `args` default to those of the process. Returns the exit status."""
    prog = "python -m tinyflux.test_training"
    return cli.run(run, Config, args, prog=prog, description=__doc__, failures=(RuntimeError,))


if __name__ == "__main__":
    sys.exit(main())
