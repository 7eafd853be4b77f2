"""Draw pictures from a checkpoint with the settings of its run. Shared by sample, app and evaluate.

torch is imported when something is drawn, so that --help is fast.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tinyflux.run.recorded import Recorded
from tinyflux.trainer.solvers import SOLVERS

if TYPE_CHECKING:
    import torch

    from tinyflux.model.model import TinyFluxDeep
    from tinyflux.model.zoo import ModelZoo
    from tinyflux.trainer.sampling import Sampler

log = logging.getLogger(__name__)


class Artist:
    """A checkpoint and its zoo, ready to draw.

    model: the network; zoo: its encoders and decoder; recorded: the run's settings; checkpoint, weights, zoo_name: the
    names of the run, of the weights file and of the zoo.
    """

    def __init__(
        self, checkpoint: str, model: "TinyFluxDeep", zoo: "ModelZoo", recorded: Recorded, weights: str, zoo_name: str
    ):
        self.checkpoint, self.model, self.zoo, self.recorded = checkpoint, model, zoo, recorded
        self.weights, self.zoo_name = weights, zoo_name

    @classmethod
    def load(
        cls, checkpoint: str, *, zoo: str | None = None, ema: bool = True, device: "torch.device | None" = None
    ) -> "Artist":
        """Load a checkpoint: a file, a run or one of its `checkpoints/step_N`, or user/repo[:sub/folder].

        zoo: default, that of the run. device: default, the GPU if there is one. Raises as `load_model` and `ModelZoo`.
        """
        from tinyflux.model.locate import find_training_config
        from tinyflux.model.zoo import ModelZoo
        from tinyflux.trainer.parallel import local_device

        device = device or local_device()
        recorded = Recorded.read(find_training_config(checkpoint, ema))
        model, weights = _load(checkpoint, ema, device)
        # names without paths: pictures are shared, and must not tell where the weights were stored
        local = Path(checkpoint)
        name = local.resolve().name if local.exists() else checkpoint
        zoo = zoo or recorded.zoo
        return cls(name, model, ModelZoo(device, zoo=zoo), recorded, weights, Path(zoo).name)

    def other(self, checkpoint: str, ema: bool) -> "Artist":
        """Other weights with the same settings and zoo. Raises as `load_model`."""
        model, weights = _load(checkpoint, ema, next(self.model.parameters()).device)
        return Artist(self.checkpoint, model, self.zoo, self.recorded, weights, self.zoo_name)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Heights and widths in pixels that the network was trained on, most frequent first; [] if unknown."""
        factor = self.zoo.factor
        return [(h * factor, w * factor) for h, w in self.recorded.latent_shapes]

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width of a picture. Default: the most frequent size in training, else the zoo's."""
        usual = [*self.sizes, (self.zoo.image_size,) * 2][0]
        return usual[0] if height is None else height, usual[1] if width is None else width

    def sampler(
        self,
        height: int | None = None,
        width: int | None = None,
        *,
        batch_size: int = 8,
        shift: float | None = None,
        guidance: float | None = None,
        **settings,
    ) -> "Sampler":
        """A Sampler for pictures of this size; shift and guidance default to the run's. Raises ValueError."""
        from tinyflux.trainer.sampling import Sampler

        return Sampler(
            self.zoo,
            batch_size=batch_size,
            latent_shape=self.zoo.latent_shape_of(*self.size(height, width)),
            shift=self.recorded.shift if shift is None else shift,
            guidance=self.recorded.guidance if guidance is None else guidance,
            **settings,
        )

    def parameters(self, sampler: "Sampler", **more) -> dict:
        """The parameters that are stored in a picture's file; more: its prompt, seed and so on."""
        _, h, w = sampler.latent_shape
        return {
            "checkpoint": self.checkpoint,
            "weights": self.weights,
            "zoo": self.zoo_name,
            **more,
            "height": h * self.zoo.factor,
            "width": w * self.zoo.factor,
            **{name: value for name, value in asdict(sampler.settings).items() if value is not None},
        }

    def doubts(self, prompts: Sequence[str], height: int, width: int) -> list[str]:
        """Warnings about a size, or words of the prompts, that training never saw; one sentence each."""
        found = []
        if self.sizes and (height, width) not in self.sizes:
            known = ", ".join(f"{h}x{w}" for h, w in self.sizes)
            found.append(f"no training image was {height}x{width} (height x width); sizes in training: {known}")
        for prompt in dict.fromkeys(prompts):
            if words := self.recorded.unseen(prompt):
                found.append(f"no training caption has {', '.join(words)}, in the prompt {prompt[:60]!r}")
        return found


def _load(checkpoint: str, ema: bool, device: "torch.device") -> tuple["TinyFluxDeep", str]:
    """A network, and the name of its weights file."""
    from tinyflux.model.loader import load_model
    from tinyflux.model.locate import locate

    return load_model(checkpoint, device=device, use_ema=ema), locate(checkpoint, ema)[0].name


@dataclass
class SampleOptions:
    checkpoint: str
    """A .safetensors or .pt file, a run folder or one of its checkpoints/step_N, or user/repo[:sub/folder]."""
    prompt: list[str] = field(default_factory=list)
    """Prompts; one picture is drawn for each."""
    prompt_file: Path | None = None
    """A text file with more prompts, one per line."""
    out: Path = Path("samples.png")
    """The PNG to write; several pictures make a grid."""
    grid: bool = True
    """Write all pictures as one grid; otherwise one file each: out-0.png, out-1.png, ..."""
    columns: int | None = None
    """Columns of the grid. Default: nearly square."""
    negative_prompt: str = ""
    """Prompt that guidance moves away from."""
    steps: int = 28
    """Steps of the solver."""
    solver: Literal[*SOLVERS] = "euler"
    """euler and ab2 call the network once per step, heun and midpoint twice; all except euler are second order."""
    guidance: float | None = None
    """Classifier-free guidance; 1 is none. Default: guidance_scale in the run's training_config.json, else 5."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Timesteps between which guidance applies; 0 is noise, 1 data."""
    guidance_rescale: float = 0.0
    """Reduces the overexposure of strong guidance: 0 is off, 0.7 is usual, 1 is the most."""
    shift: float | None = None
    """Flux shift of the timesteps. Default: shift in the run's training_config.json, else 3."""
    seed: int = 0
    """The noise of picture k is keyed by (seed, k)."""
    first: int = 0
    """Number of the first picture. To draw a picture again, give the `picture` of its PNG's parameters."""
    height: int | None = None
    """Height of a picture in pixels. Default: the most frequent height in training, else the zoo's."""
    width: int | None = None
    """Width of a picture in pixels; same default."""
    batch_size: int = 8
    """Pictures to draw at once."""
    lora: Path | None = None
    """An adapter: a PEFT folder, or a file in the original package's layout (lora_A and lora_B)."""
    lora_scale: float = 1.0
    """Strength of the adapter: 0 is off, 1 as trained."""
    zoo: str | None = None
    """Encoders and decoder: flux, tiny, or a folder. Default: the zoo in the run's training_config.json, else flux."""
    ema: bool = True
    """Use the averaged weights; otherwise the trained ones."""
    compile: bool = False
    """Compile the network first; pays off for many pictures."""

    def __post_init__(self):
        if self.prompt_file is not None:
            try:
                lines = self.prompt_file.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"--prompt-file {self.prompt_file}: not a text file in UTF-8: {error}") from error
            self.prompt = [*self.prompt, *(line.strip() for line in lines if line.strip())]
        if not self.prompt:
            raise ValueError("no prompts: give --prompt or --prompt-file")
        if self.out.is_dir():
            raise ValueError(f"--out {self.out} is a folder: name the PNG to write")
        if not math.isfinite(self.lora_scale):
            raise ValueError(f"--lora-scale is {self.lora_scale}: it must be a finite number")
        if self.first < 0:
            raise ValueError(f"--first is {self.first}: it must be at least 0")
        for name in ("batch_size", "columns"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")


def sample(options: SampleOptions) -> list[Path]:
    """Load, draw, save, and log each setting with its origin. Returns the paths."""
    artist = Artist.load(options.checkpoint, zoo=options.zoo, ema=options.ema)
    from tinyflux.trainer.sampling import save_samples

    height, width = artist.size(options.height, options.width)
    sampler = artist.sampler(
        height,
        width,
        batch_size=options.batch_size,
        shift=options.shift,
        guidance=options.guidance,
        steps=options.steps,
        solver=options.solver,
        guidance_interval=options.guidance_interval,
        guidance_rescale=options.guidance_rescale,
    )
    if options.lora is not None:
        from tinyflux.model.lora import read_lora

        read_lora(options.lora, artist.model).add_to(artist.model, options.lora_scale)
    for line in _told(options, artist, sampler):
        log.info(line)
    for doubt in artist.doubts(options.prompt, height, width):
        log.warning(doubt)
    if options.compile:
        artist.model.compile()
    parameters = artist.parameters(
        sampler,
        negative_prompt=options.negative_prompt,
        seed=options.seed,
        **({"lora": options.lora.resolve().name, "lora_scale": options.lora_scale} if options.lora else {}),
    )
    images = sampler(
        artist.model, options.prompt, negative=options.negative_prompt, seed=options.seed, first=options.first
    )
    if options.grid:
        every = {"prompts": options.prompt, "picture": options.first, **parameters}
        return [save_samples(images, options.out, options.columns, every)]
    paths = []
    for k, (prompt, image) in enumerate(zip(options.prompt, images, strict=True), options.first):
        path = options.out.with_name(f"{options.out.stem}-{k}.png")
        paths.append(save_samples(image[None], path, parameters={"prompts": [prompt], "picture": k, **parameters}))
    return paths


def _told(options: SampleOptions, artist: Artist, sampler: "Sampler") -> list[str]:
    """One log line for each setting that may come from the run."""
    origin, (height, width) = artist.recorded.origin, artist.size(options.height, options.width)
    usual = origin if artist.sizes else "the zoo's own"
    rows = [
        ("weights", artist.weights, "averaged" if artist.weights.endswith("_ema.safetensors") else ""),
        *([("lora", options.lora, f"scale {options.lora_scale:g}")] if options.lora else []),
        ("zoo", options.zoo or artist.recorded.zoo, "as given" if options.zoo else origin),
        ("shift", f"{sampler.settings.shift:g}", origin if options.shift is None else "as given"),
        ("guidance", f"{sampler.settings.guidance:g}", origin if options.guidance is None else "as given"),
        ("size", f"{height}x{width}", "as given" if options.height and options.width else usual),
    ]
    return [f"{name} {value}{f' ({where})' if where else ''}" for name, value, where in rows]
