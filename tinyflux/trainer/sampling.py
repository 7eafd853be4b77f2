"""Sampling: prompts -> latents -> pictures. Pure functions, and a Sampler that holds what they need."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from tinyflux.trainer.schedules import flux_shift
from tinyflux.util import rng
from tinyflux.util.predictions import euler_step

if TYPE_CHECKING:  # the zoo's libraries take seconds to import, and a rank that trains never needs them
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
    """Noise [B, C, H, W] of the pictures number `indices` of a seed: it does not depend on how they are batched."""
    seeds = torch.from_numpy(rng.sample_seeds(seed, 0, indices.numpy()))
    return rng.normal(seeds.to(device), "noise", tuple(shape))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients, for the length of a `with` block."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def denoise(
    model: nn.Module,
    noise: Tensor,
    t5: Tensor,
    clip: Tensor,
    null_t5: Tensor,
    null_clip: Tensor,
    *,
    steps: int = 28,
    guidance: float = 5.0,
    shift: float = 3.0,
) -> Tensor:
    """Latents from noise: Euler steps along v = v_null + guidance (v_text - v_null), both in one batch of two
    (Ho & Salimans, 2022, arXiv:2207.12598).

    noise [B, C, H, W], t5 [B, L, D] and clip [B, D] of the prompts, null_t5 and null_clip, the same of the negative
    prompts. Returns float32 [B, C, H, W]. Guidance 1 leaves the nulls out.
    """
    B, _, H, W = noise.shape
    img_ids = model.create_img_ids(1, H, W, noise.device)[0]  # [H*W, 3]
    text = (t5, clip) if guidance == 1 else (torch.cat((null_t5, t5)), torch.cat((null_clip, clip)))
    t5, clip = (x.to(noise.device) for x in text)
    x = to_tokens(noise).float()
    schedule = timestep_schedule(steps, shift)
    with evaluating(model):
        for now, after in zip(schedule, schedule[1:], strict=False):
            v = model(x.repeat(len(t5) // B, 1, 1), t5, clip, now, img_ids).float()
            if guidance != 1:
                null, v = v.chunk(2)
                v = null + guidance * (v - null)
            x = euler_step(x, v, now, after)
    return to_latents(x, H, W)


@dataclass
class Prompts:
    """Encoded prompts: t5 [B, L, D] and clip [B, D], and the same of the negative prompt, [1, ...]."""

    texts: list[str]
    t5: Tensor
    clip: Tensor
    null_t5: Tensor
    null_clip: Tensor

    @classmethod
    def encode(cls, zoo: "ModelZoo", texts: list[str], negative: str = "") -> "Prompts":
        """Encode with the zoo's T5 and CLIP, loading what is not there."""
        for name in ("t5", "clip"):
            if getattr(zoo, name) is None:
                getattr(zoo, f"load_{name}")()
        t5, clip = zoo.encode_t5([*texts, negative]).cpu(), zoo.encode_clip([*texts, negative]).cpu()
        return cls(list(texts), t5[:-1], clip[:-1], t5[-1:], clip[-1:])

    def __len__(self) -> int:
        return len(self.texts)


class Sampler:
    """Draws pictures for prompts: `zoo` encodes and decodes, the model is given with each call.

    latent_shape (C, H, W): the zoo's unless given.
    The k-th picture of a seed has its own noise, so the batch size does not change it.
    """

    def __init__(
        self,
        zoo: "ModelZoo",
        *,
        steps: int = 28,
        guidance: float = 5.0,
        shift: float = 3.0,
        batch_size: int = 8,
        latent_shape: tuple[int, int, int] | None = None,
    ):
        self.zoo, self.batch_size, self.latent_shape = zoo, batch_size, tuple(latent_shape or zoo.latent_shape)
        self.options = {"steps": steps, "guidance": guidance, "shift": shift}

    def latents(
        self,
        model: nn.Module,
        prompts: Prompts,
        *,
        seed: int = 0,
        indices: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Latents [B, C, H, W] of the prompts number `indices` (default: all of them, in order)."""
        indices = torch.arange(len(prompts)) if indices is None else indices
        parts = []
        for chunk in indices.split(self.batch_size):
            noise = initial_noise(seed, chunk, self.latent_shape, device)
            nulls = [x.expand(len(chunk), *x.shape[1:]) for x in (prompts.null_t5, prompts.null_clip)]
            parts.append(denoise(model, noise, prompts.t5[chunk], prompts.clip[chunk], *nulls, **self.options))
        return torch.cat(parts)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1], on the CPU."""
        if self.zoo.vae is None:
            self.zoo.load_vae()
        return torch.cat([self.zoo.decode_latents(x).float().cpu() for x in latents.split(self.batch_size)])

    def __call__(self, model: nn.Module, texts: list[str], *, negative: str = "", seed: int = 0) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1], on the CPU, one a prompt."""
        device = next(model.parameters()).device
        prompts = Prompts.encode(self.zoo, texts, negative)
        return self.decode(self.latents(model, prompts, seed=seed, device=device))


def generate_samples(
    model: nn.Module,
    zoo: "ModelZoo",
    prompts: list[str],
    *,
    negative_prompt: str = "",
    steps: int = 28,
    guidance: float = 5.0,
    shift: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] for prompts: a Sampler used once."""
    sampler = Sampler(zoo, steps=steps, guidance=guidance, shift=shift)
    return sampler(model, prompts, negative=negative_prompt, seed=seed)


def image_grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] as one uint8 [3, H', W'] on white, as near a square as can be."""
    B, _, H, W = images.shape
    columns = columns or math.ceil(math.sqrt(B))
    rows = math.ceil(B / columns)
    grid = torch.full((3, rows * (H + gap) - gap, columns * (W + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)):
        y, x = i // columns * (H + gap), i % columns * (W + gap)
        grid[:, y : y + H, x : x + W] = image
    return grid


def save_samples(images: Tensor, path: str | Path, columns: int | None = None) -> Path:
    """Write pictures [B, 3, H, W] in [-1, 1] as one PNG grid; its folder is made. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_grid(images, columns).permute(1, 2, 0).numpy()).save(path)
    return path
