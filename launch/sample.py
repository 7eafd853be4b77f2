"""Prompts to a picture with a trained TinyFlux: a checkpoint file, a run folder, or a Hub repo.

python launch/sample.py --checkpoint runs/mine --prompt "a red circle on a blue background" --out grid.png
python launch/sample.py --checkpoint AbstractPhil/tinyflux-deep --prompt "a portrait" "a house" --seed 3
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from tinyflux.model.loader import load_model
from tinyflux.model.zoo import ModelZoo
from tinyflux.trainer.parallel import local_device
from tinyflux.trainer.sampling import generate_samples, save_samples


@dataclass
class Options:
    checkpoint: str
    """A .safetensors or .pt file, a run folder, or user/repo[:sub/folder]."""
    prompt: list[str] = field(default_factory=list)
    """One picture for each."""
    out: Path = Path("samples.png")
    """The PNG to write: a grid where there are several prompts."""
    negative_prompt: str = ""
    """What guidance moves away from."""
    steps: int = 28
    """Euler steps."""
    guidance: float = 5.0
    """Classifier-free guidance; 1 is none."""
    shift: float | None = None
    """Flux shift of the timesteps; by default that of the run's training_config.json, 3 where there is none."""
    seed: int = 0
    """Picture k has noise keyed by (seed, k)."""
    zoo: str = "flux"
    """Encoders and decoder: flux, tiny, or a directory."""
    ema: bool = True
    """Averaged weights, or those that were trained."""

    def __post_init__(self):
        if not self.prompt:
            raise ValueError("--prompt is missing: give at least one")
        if self.steps < 1:
            raise ValueError(f"--steps is {self.steps}: it must be at least 1")


def trained_shift(checkpoint: str) -> float:
    """The shift that a checkpoint was trained with."""
    for folder in (Path(checkpoint), Path(checkpoint) / "checkpoints", Path(checkpoint).parent):
        if (path := folder / "training_config.json").is_file():
            return json.loads(path.read_text())["trainer"]["shift"]
    return 3.0


def main(argv: list[str]) -> int:
    """Load, sample, save."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    device = local_device()
    try:
        model = load_model(options.checkpoint, device=device, use_ema=options.ema)
        images = generate_samples(
            model,
            ModelZoo(device=device, zoo=options.zoo),
            options.prompt,
            negative_prompt=options.negative_prompt,
            steps=options.steps,
            guidance=options.guidance,
            shift=trained_shift(options.checkpoint) if options.shift is None else options.shift,
            seed=options.seed,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(save_samples(images, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
