"""Sampling: prompts -> latents -> pictures. Pure functions, and a Sampler with their settings."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from tinyflux.trainer.schedules import flux_shift
from tinyflux.trainer.solvers import SOLVERS
from tinyflux.util import rng
from tinyflux.util.files import Stopped
from tinyflux.util.pixels import to_uint8

if TYPE_CHECKING:  # the zoo's libraries take seconds to import, and training ranks do not need them
    from tinyflux.model.zoo import ModelZoo


def to_tokens(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H*W, C], row-major."""
    return latents.flatten(2).transpose(1, 2)


def to_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, H*W, C] -> [B, C, H, W]."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def timestep_schedule(steps: int, shift: float = 3.0) -> list[float]:
    """The steps + 1 timesteps of a sample, from noise (0) to data (1)."""
    if steps < 1:
        raise ValueError(f"sampling takes at least 1 step, not {steps}")
    return flux_shift(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()


def initial_noise(seed: int, indices: Tensor, shape: tuple[int, int, int], device: torch.device | str) -> Tensor:
    """Noise [B, C, H, W] of a seed's pictures number `indices`; independent of batching."""
    seeds = torch.from_numpy(rng.sample_seeds(seed, 0, indices.numpy()))
    return rng.normal(seeds.to(device), "noise", tuple(shape))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, for a `with` block."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@dataclass(frozen=True)
class Settings:
    """Settings for drawing latents. Raises ValueError with the name of a bad one."""

    steps: int = 28
    """Steps of the solver."""
    guidance: float = 5.0
    """Classifier-free guidance (Ho & Salimans, 2022, arXiv:2207.12598); 1 is none."""
    shift: float = 3.0
    """Flux shift of the timesteps; use that of the training."""
    solver: str = "euler"
    """A name of `SOLVERS`."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """First and last timestep at which guidance applies (Kynkaanniemi et al., 2024, arXiv:2404.07724)."""
    guidance_rescale: float = 0.0
    """Share, in [0, 1], of the guided velocity that is rescaled to the standard deviation of the conditional velocity
    (Lin et al., 2023, arXiv:2305.08891)."""
    timesteps: tuple[float, ...] | None = None
    """Ascending timesteps in [0, 1], instead of `steps` and `shift`."""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps: sampling takes at least 1, not {self.steps}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, not {self.guidance}")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be positive and finite, not {self.shift}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, not {self.solver!r}")
        first, last = self.guidance_interval
        if not 0 <= first <= last <= 1:
            raise ValueError(f"guidance_interval must be two ascending timesteps in [0, 1], not {first} {last}")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be in [0, 1], not {self.guidance_rescale}")
        if (times := self.timesteps) is not None and not (
            len(times) > 1 and 0 <= times[0] and times[-1] <= 1 and all(a < b for a, b in pairwise(times))
        ):
            raise ValueError(f"timesteps must be two or more ascending numbers in [0, 1], not {times}")

    def schedule(self) -> list[float]:
        """The timesteps from first to last, one more than steps."""
        return timestep_schedule(self.steps, self.shift) if self.timesteps is None else list(self.timesteps)

    def guides(self, t: float) -> bool:
        """Whether guidance applies at t. If not, the negative prompt need not be run."""
        first, last = self.guidance_interval
        return self.guidance != 1 and first <= t <= last


def guide(null: Tensor, text: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """null + scale (text - null); a share `rescale` of it gets text's deviation (arXiv:2305.08891, eq. 14-16)."""
    v = null + scale * (text - null)
    if not rescale:
        return v
    dims = tuple(range(1, v.ndim))
    return v * (rescale * text.std(dims, keepdim=True) / v.std(dims, keepdim=True) + 1 - rescale)


class _Stopped(Exception):
    """on_step asked to stop; the exception's argument is the current latents."""


def denoise(
    model: nn.Module,
    noise: Tensor,
    t5: Tensor,
    clip: Tensor,
    null_t5: Tensor,
    null_clip: Tensor,
    settings: Settings,
    on_step: Callable[[int, float, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Latents from noise by the solver's steps; guidance runs both prompts in one batch.

    noise [B, C, H, W], t5 [B, L, D] and clip [B, D] of the prompts; null_t5 and null_clip of the negative prompts.
    on_step(step, t, latents) is called after each step; its result replaces the latents, and None stops. Returns
    float32 [B, C, H, W].
    """
    H, W = noise.shape[2:]
    img_ids = model.create_img_ids(1, H, W, noise.device)[0]  # [H*W, 3]
    t5, clip, null_t5, null_clip = (x.to(noise.device) for x in (t5, clip, null_t5, null_clip))
    both = torch.cat((null_t5, t5)), torch.cat((null_clip, clip))

    def velocity(x: Tensor, t: float) -> Tensor:
        at = torch.tensor(t, dtype=torch.float32, device=x.device)  # a number would be recompiled for each t
        if not settings.guides(t):
            return model(x, t5, clip, at, img_ids).float()
        null, text = model(x.repeat(2, 1, 1), *both, at, img_ids).float().chunk(2)
        return guide(null, text, settings.guidance, settings.guidance_rescale)

    done = 0

    def after_step(x: Tensor, t: float) -> Tensor:
        nonlocal done
        done += 1
        if on_step is None:
            return x
        latents = on_step(done - 1, t, to_latents(x, H, W))
        if latents is None:
            raise _Stopped(x)
        return to_tokens(latents)

    with evaluating(model):
        try:
            x = SOLVERS[settings.solver](velocity, to_tokens(noise).float(), settings.schedule(), after_step)
        except _Stopped as stopped:
            (x,) = stopped.args
    return to_latents(x, H, W)


def at_once(device: torch.device, batch_size: int) -> int:
    """Number of latents to decode at once: on a CPU one, because there a picture's bits would depend on the others."""
    return 1 if device.type == "cpu" else batch_size


@dataclass
class Prompts:
    """Encoded prompts: t5 [B, L, D] and clip [B, D], and the same of the negative prompts, [B, ...] or [1, ...]."""

    texts: list[str]
    t5: Tensor
    clip: Tensor
    null_t5: Tensor
    null_clip: Tensor

    @classmethod
    def encode(cls, zoo: "ModelZoo", texts: list[str], negative: str | list[str] = "") -> "Prompts":
        """Encode with the zoo's T5 and CLIP, loading them if necessary. negative: one for all, or one per text."""
        for name in ("t5", "clip"):
            if getattr(zoo, name) is None:
                getattr(zoo, f"load_{name}")()
        every = [*texts, *([negative] if isinstance(negative, str) else negative)]
        (t5, null_t5), (clip, null_clip) = (
            x.cpu().tensor_split([len(texts)]) for x in (zoo.encode_t5(every), zoo.encode_clip(every))
        )
        return cls(list(texts), t5, clip, null_t5, null_clip)

    def __len__(self) -> int:
        return len(self.texts)

    def repeat(self, times: int) -> "Prompts":
        """Each prompt repeated `times` times in a row."""
        texts = [text for text in self.texts for _ in range(times)]
        tensors = (self.t5, self.clip, self.null_t5, self.null_clip)
        return Prompts(texts, *(x.repeat_interleave(times, 0) if len(x) == len(self) else x for x in tensors))


class Sampler:
    """Draws pictures for prompts: `zoo` encodes and decodes, the model is passed to each call.

    latent_shape (C, H, W): default, the zoo's. settings: fields of `Settings`.
    The k-th picture of a seed has its own noise, so the batch size does not change it.
    """

    def __init__(
        self,
        zoo: "ModelZoo",
        *,
        batch_size: int = 8,
        latent_shape: tuple[int, int, int] | None = None,
        **settings,
    ):
        self.settings = Settings(**settings)
        self.zoo, self.batch_size, self.latent_shape = zoo, batch_size, tuple(latent_shape or zoo.latent_shape)
        self.stopped = False

    def latents(
        self,
        model: nn.Module,
        prompts: Prompts,
        *,
        seed: int = 0,
        indices: Tensor | None = None,
        device: torch.device | str = "cpu",
        noise: Tensor | None = None,
        on_step: Callable[[int, float, Tensor], Tensor | None] | None = None,
    ) -> Tensor:
        """Latents [B, C, H, W] of the prompts number `indices` (default: all in order).

        noise [B, C, H, W], by prompt number, replaces the seed's. on_step: see `denoise`; it is called for each batch.
        """
        config = model.config
        width, expected = prompts.t5.shape[-1], config.joint_attention_dim
        if width != expected or prompts.clip.shape[-1] != config.pooled_projection_dim:
            raise ValueError(
                f"T5 and CLIP give {width} and {prompts.clip.shape[-1]} features, this network takes {expected} and"
                f" {config.pooled_projection_dim}: choose the zoo that its shards were built with"
            )
        indices = torch.arange(len(prompts)) if indices is None else indices
        parts = []
        for chunk in indices.split(self.batch_size):
            start = initial_noise(seed, chunk, self.latent_shape, device) if noise is None else noise[chunk]
            nulls = [x[chunk % len(x)] for x in (prompts.null_t5, prompts.null_clip)]  # one for all, or one per prompt
            text = prompts.t5[chunk], prompts.clip[chunk]
            parts.append(denoise(model, start, *text, *nulls, self.settings, on_step))
        return torch.cat(parts)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1], on the CPU. Raises Stopped once `stop` is called."""
        if self.zoo.vae is None:
            self.zoo.load_vae()
        pictures = []
        for some in latents.split(at_once(self.zoo.device, self.batch_size)):
            if self.stopped:
                raise Stopped("pictures")
            pictures.append(self.zoo.decode_latents(some).float().cpu())
        return torch.cat(pictures)

    def stop(self) -> None:
        """End a `decode` in another thread after its current picture, and all later ones."""
        self.stopped = True

    def __call__(
        self,
        model: nn.Module,
        texts: list[str],
        *,
        negative: str = "",
        seed: int = 0,
        first: int = 0,
        on_step: Callable[[int, float, Tensor], Tensor | None] | None = None,
    ) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1], on the CPU, one per prompt; the first is the seed's picture number `first`.

        on_step: see `latents`.
        """
        device = next(model.parameters()).device
        prompts = Prompts.encode(self.zoo, texts, negative)
        noise = initial_noise(seed, torch.arange(first, first + len(texts)), self.latent_shape, device)
        return self.decode(self.latents(model, prompts, device=device, noise=noise, on_step=on_step))


def generate_samples(
    model: nn.Module,
    zoo: "ModelZoo",
    prompts: list[str],
    *,
    negative_prompt: str = "",
    seed: int = 0,
    **settings,
) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] for prompts, from a Sampler with these settings."""
    return Sampler(zoo, **settings)(model, prompts, negative=negative_prompt, seed=seed)


def image_grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] as one uint8 grid [3, H', W'] on white; default: nearly square."""
    B, _, H, W = images.shape
    columns = columns or math.ceil(math.sqrt(B))
    rows = math.ceil(B / columns)
    grid = torch.full((3, rows * (H + gap) - gap, columns * (W + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(to_uint8(images)):
        y, x = i // columns * (H + gap), i % columns * (W + gap)
        grid[:, y : y + H, x : x + W] = image
    return grid


def save_samples(images: Tensor, path: str | Path, columns: int | None = None, parameters: dict | None = None) -> Path:
    """Write pictures [B, 3, H, W] in [-1, 1] as one PNG grid; creates the folder. Returns the path.

    parameters: stored as JSON in the text chunk "parameters".
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_text("parameters", json.dumps(parameters))
    grid = image_grid(images, columns).permute(1, 2, 0).numpy()
    Image.fromarray(grid).save(path, format="PNG", pnginfo=info)
    return path
