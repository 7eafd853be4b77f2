"""Prompts to a picture with a trained TinyFlux: a checkpoint file, a run folder, or a Hub repo.

python launch/sample.py --checkpoint runs/mine --prompt "a red circle on a blue background" --out grid.png
python launch/sample.py --checkpoint AbstractPhil/tinyflux-deep --prompt "a portrait" "a house" --seed 3
python launch/sample.py --checkpoint runs/mine --prompt-file prompts.txt --solver heun --guidance-interval 0.1 0.8

The PNG has its parameters in the text chunk "parameters", as JSON.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from tinyflux.model.loader import load_model, locate
from tinyflux.model.zoo import ModelZoo
from tinyflux.trainer.parallel import local_device
from tinyflux.trainer.sampling import Sampler, save_samples

DEFAULT_SHIFT = 3.0  # what the published weights were trained with


@dataclass
class Options:
    checkpoint: str
    """A .safetensors or .pt file, a run folder, or user/repo[:sub/folder]."""
    prompt: list[str] = field(default_factory=list)
    """One picture for each."""
    prompt_file: Path | None = None
    """A text file of more prompts, one a line."""
    out: Path = Path("samples.png")
    """The PNG to write: a grid where there are several prompts."""
    grid: bool = True
    """One picture of all, or one each: out-0.png, out-1.png, ..."""
    columns: int | None = None
    """Columns of the grid; by default it is as near a square as can be."""
    negative_prompt: str = ""
    """What guidance moves away from."""
    steps: int = 28
    """Steps of the solver."""
    solver: Literal["euler", "heun", "midpoint"] = "euler"
    """heun and midpoint are of second order and call the network twice a step."""
    guidance: float = 5.0
    """Classifier-free guidance; 1 is none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Timesteps between which guidance applies; 0 is noise, 1 data."""
    guidance_rescale: float = 0.0
    """Against the overexposure of strong guidance: 0 is none, 0.7 usual, 1 most."""
    shift: float | None = None
    """Flux shift of the timesteps; by default that of the run's training_config.json, 3 where there is none."""
    seed: int = 0
    """Picture k has noise keyed by (seed, k)."""
    height: int | None = None
    """Of a picture, in pixels; by default what the zoo is made for. Likewise the width."""
    width: int | None = None
    batch_size: int = 8
    """Pictures that are drawn at once."""
    zoo: str = "flux"
    """Encoders and decoder: flux, tiny, or a directory."""
    ema: bool = True
    """Averaged weights, or those that were trained."""
    compile: bool = False
    """Compile the network first: worth it for many pictures."""

    def __post_init__(self):
        if self.prompt_file is not None:
            lines = self.prompt_file.read_text(encoding="utf-8").splitlines()
            self.prompt = [*self.prompt, *(line.strip() for line in lines if line.strip())]
        if not self.prompt:
            raise ValueError("no prompts: give --prompt or --prompt-file")
        for name in ("batch_size", "columns"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")


def find_shift(checkpoint: str) -> tuple[float, str]:
    """The shift that a checkpoint was trained with, and where that is known from."""
    for folder in (Path(checkpoint), Path(checkpoint) / "checkpoints", Path(checkpoint).parent):
        if (path := folder / "training_config.json").is_file():
            return json.loads(path.read_text())["trainer"]["shift"], f"of {path}"
    return DEFAULT_SHIFT, "by default: the checkpoint has no training_config.json"


def sample(options: Options) -> list[Path]:
    """Load, sample, save. Returns the pictures' paths."""
    shift, origin = (options.shift, "as given") if options.shift is not None else find_shift(options.checkpoint)
    device = local_device()
    model = load_model(options.checkpoint, device=device, use_ema=options.ema)
    zoo = ModelZoo(device=device, zoo=options.zoo)
    height, width = options.height or zoo.image_size, options.width or zoo.image_size
    settings = {name: getattr(options, name) for name in ("steps", "guidance", "solver")}
    settings |= {name: getattr(options, name) for name in ("guidance_interval", "guidance_rescale")}
    latent_shape = zoo.latent_shape_of(height, width)
    sampler = Sampler(zoo, shift=shift, batch_size=options.batch_size, latent_shape=latent_shape, **settings)
    weights = locate(options.checkpoint, options.ema)[0]
    # names, no paths: a picture is passed on, and where its weights lay is nobody's business
    local = Path(options.checkpoint)
    parameters = {
        "checkpoint": local.resolve().name if local.exists() else options.checkpoint,
        "weights": weights.name,
        "negative_prompt": options.negative_prompt,
        "seed": options.seed,
        "height": height,
        "width": width,
        **asdict(sampler.settings),
    }
    print(f"weights {weights.name}, shift {shift:g} {origin}", file=sys.stderr)
    if options.compile:
        model.compile()
    images = sampler(model, options.prompt, negative=options.negative_prompt, seed=options.seed)
    if options.grid:
        parameters = {"prompts": options.prompt, **parameters}
        return [save_samples(images, options.out, options.columns, parameters)]
    paths = []
    for k, (prompt, image) in enumerate(zip(options.prompt, images, strict=True)):
        path = options.out.with_name(f"{options.out.stem}-{k}.png")
        paths.append(save_samples(image[None], path, parameters={"prompts": [prompt], "picture": k, **parameters}))
    return paths


def main(argv: list[str]) -> int:
    """Parse, sample, print the paths. Returns the exit status."""
    try:
        for path in sample(tyro.cli(Options, args=argv, description=__doc__)):
            print(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
