"""Images and prompts -> one batch of sample tensors: what a build writes and a training run reads."""

import torch
from torch import Tensor

from tinyflux.model.teachers import lune_features, sol_statistics
from tinyflux.model.zoo import ModelZoo
from tinyflux.util import rng
from tinyflux.util.buckets import BUCKETS
from tinyflux.util.predictions import flow_x_t

TEACHER_INPUTS = ("image", "noise")
SOL_SIZE = 8
TOKENS = {"cpu": 1 << 14, "accelerator": 1 << 18}  # latent pixels that go through a teacher at once


@torch.no_grad()
def extract(
    zoo: ModelZoo,
    pixels: Tensor,
    prompts: list[str],
    seeds: Tensor,
    *,
    lune: bool = True,
    sol: bool = True,
    teacher_input: str = "image",
    dtype: torch.dtype = torch.float16,
) -> dict[str, Tensor]:
    """Encodings and teacher features of a batch, in `dtype` on the CPU.

    pixels float32 [B, 3, H, W] in [-1, 1], seeds int64 [B] (they key the teachers' noise). Returns `latents`
    [B, C, h, w], `t5_embeds` [B, L, D], `clip_pooled` [B, D], with `lune` the feature `lune` [B, K, D], with `sol`
    `sol_stats` [B, K, 3] and `sol_spatial` [B, K, 8, 8], K the timestep buckets. A sample's features don't depend on
    the rest of its batch.
    """
    if not len(pixels) == len(prompts) == len(seeds):
        raise ValueError(f"{len(pixels)} images, {len(prompts)} prompts and {len(seeds)} seeds: one of each per sample")
    sample = {
        "latents": zoo.encode_images(pixels),
        "t5_embeds": zoo.encode_t5(prompts),
        "clip_pooled": zoo.encode_clip(prompts),
    }
    if lune or sol:
        sample |= teacher_features(zoo, pixels, prompts, seeds, lune=lune, sol=sol, teacher_input=teacher_input)
    return {name: tensor.to("cpu", dtype) for name, tensor in sample.items()}


@torch.no_grad()
def teacher_features(
    zoo: ModelZoo,
    pixels: Tensor,
    prompts: list[str],
    seeds: Tensor,
    *,
    lune: bool = True,
    sol: bool = True,
    teacher_input: str = "image",
) -> dict[str, Tensor]:
    """The teachers' part of `extract`: `lune` [B, K, D], `sol_stats` [B, K, 3], `sol_spatial` [B, K, 8, 8], float32."""
    latents, timesteps = teacher_inputs(zoo.encode_sd(pixels), seeds, teacher_input)
    B, K = latents.shape[:2]
    contexts = zoo.encode_clip_hidden(prompts)  # [B, 77, D]
    features: dict[str, list[Tensor]] = {}
    rows = torch.arange(B * K, device=latents.device)
    tokens = TOKENS["cpu" if latents.device.type == "cpu" else "accelerator"]
    for chunk in rows.split(max(1, tokens // latents[0, 0, 0].numel())):
        at = chunk // K, chunk % K
        inputs = latents[at], contexts[at[0]], timesteps[at[1]]
        if lune:
            unet = zoo.required("lune")
            features.setdefault("lune", []).append(lune_features(unet, *_cast(unet, *inputs)))
        if sol:
            unet = zoo.required("sol")
            stats, spatial = sol_statistics(unet, *_cast(unet, *inputs), size=SOL_SIZE)
            features.setdefault("sol_stats", []).append(stats)
            features.setdefault("sol_spatial", []).append(spatial)
    return {name: torch.cat(chunks).unflatten(0, (B, K)) for name, chunks in features.items()}


def teacher_inputs(latents: Tensor, seeds: Tensor, teacher_input: str = "image") -> tuple[Tensor, Tensor]:
    """What the teachers see at each bucket t.

    latents [B, 4, h, w] of the SD VAE, seeds int64 [B]. Returns [B, K, 4, h, w] float32 and teacher timesteps [K].
    "image": x_t at timestep 1000 (1 - t), the teachers' own convention. "noise": pure noise at timestep 1000 t, which
    is what the published heads were distilled from. A sample's noise is the same in all of its buckets.
    """
    if teacher_input not in TEACHER_INPUTS:
        raise ValueError(f"teacher_input is {teacher_input!r}; known: {', '.join(TEACHER_INPUTS)}")
    latents = latents.float()
    noise = rng.normal(seeds.to(latents.device), "teacher_noise", latents.shape[1:])
    t = torch.tensor(BUCKETS, device=latents.device)
    if teacher_input == "noise":
        return noise[:, None].expand(-1, len(t), -1, -1, -1), 1000 * t
    return torch.stack([flow_x_t(latents, noise, time.expand(len(noise))) for time in t], dim=1), 1000 * (1 - t)


def null_embeddings(zoo: ModelZoo, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """T5 states [L, D] and pooled CLIP vector [D] of the empty prompt, for text dropout and guidance."""
    embeddings = {"t5_embeds": zoo.encode_t5([""])[0], "clip_pooled": zoo.encode_clip([""])[0]}
    return {name: tensor.to("cpu", dtype) for name, tensor in embeddings.items()}


def load_models(zoo: ModelZoo, lune: bool = True, sol: bool = True) -> None:
    """Load what `extract` needs and the zoo has not, and no more."""
    wanted = {"vae": True, "t5": True, "clip": True, "sd_vae": lune or sol, "lune": lune, "sol": sol}
    for name, needed in wanted.items():
        if needed and getattr(zoo, name) is None:
            getattr(zoo, f"load_{name}")()


def producer(
    zoo: ModelZoo,
    resolution: int,
    dtype: torch.dtype,
    *,
    crop: str = "center",
    seed: int = 0,
    lune: bool = True,
    sol: bool = True,
    teacher_input: str = "image",
) -> dict:
    """The fingerprint of a source: all that decides what its samples' tensors mean. `zoo`: with its models loaded."""
    unused = {name for name, used in (("sd_vae", lune or sol), ("lune", lune), ("sol", sol)) if not used}
    return {name: value for name, value in zoo.fingerprint().items() if name not in unused} | {
        "resolution": resolution,
        "resize": "lanczos",
        "crop": crop,
        "teacher_input": teacher_input if lune or sol else None,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _cast(unet, latents: Tensor, contexts: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return latents.to(unet.dtype), contexts.to(unet.dtype), timesteps
