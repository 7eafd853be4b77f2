"""Images and prompts -> one batch of sample tensors: what a build writes and a training run reads."""

from collections.abc import Iterable
from typing import NamedTuple

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
# what is made of a sample: the models that each part takes, all of them in the order in which they run
PARTS = {
    "latents": ("vae",),
    "text": ("t5", "clip"),
    "lune": ("clip", "sd_vae", "lune"),
    "sol": ("clip", "sd_vae", "sol"),
}
MODELS = ("vae", "t5", "clip", "sd_vae", "lune", "sol")


class Batch(NamedTuple):
    """Images and their captions. `pixels`: float32 [B, 3, H, W] in [-1, 1] or uint8 [B, H, W, 3], None where no part
    needs them; `seeds` int64 [B] key the teachers' noise."""

    pixels: Tensor | None
    prompts: list[str]
    seeds: Tensor

    def floats(self) -> Tensor:
        """float32 [B, 3, H, W] in [-1, 1]."""
        if self.pixels.dtype != torch.uint8:
            return self.pixels
        return self.pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def models_of(parts: Iterable[str]) -> list[str]:
    """The models that these parts take, in the order in which they run."""
    needed = {model for part in parts for model in PARTS[part]}
    return [model for model in MODELS if model in needed]


@torch.no_grad()
def extract_batches(
    zoo: ModelZoo,
    batches: list[Batch],
    parts: Iterable[str] = tuple(PARTS),
    *,
    teacher_input: str = "image",
    dtype: torch.dtype = torch.float16,
) -> list[dict[str, Tensor]]:
    """`extract` of several batches, model by model, so that a zoo of `one_at_a_time` loads each once.

    "latents" gives `latents`, "text" `t5_embeds` and `clip_pooled`, "lune" `lune`, "sol" `sol_stats` and `sol_spatial`.
    """
    parts = set(parts)
    out: list[dict[str, Tensor]] = [{} for _ in batches]

    def put(sample: dict[str, Tensor], **tensors: Tensor) -> None:
        sample.update({name: tensor.to("cpu", dtype) for name, tensor in tensors.items()})

    if "latents" in parts:
        with zoo.using("vae"):
            for batch, sample in zip(batches, out, strict=True):
                put(sample, latents=zoo.encode_images(batch.floats()))
    if "text" in parts:
        with zoo.using("t5"):
            for batch, sample in zip(batches, out, strict=True):
                put(sample, t5_embeds=zoo.encode_t5(batch.prompts))
        with zoo.using("clip"):
            for batch, sample in zip(batches, out, strict=True):
                put(sample, clip_pooled=zoo.encode_clip(batch.prompts))
    if teachers := [name for name in ("lune", "sol") if name in parts]:
        with zoo.using("clip"):
            contexts = [zoo.encode_clip_hidden(batch.prompts) for batch in batches]  # [B, 77, D] each
        with zoo.using("sd_vae"):
            latents = [zoo.encode_sd(batch.floats()) for batch in batches]
        for name in teachers:
            with zoo.using(name):
                for batch, sample, context, x in zip(batches, out, contexts, latents, strict=True):
                    put(sample, **_taught(zoo, name, context, *teacher_inputs(x, batch.seeds, teacher_input)))
    return out


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
    batch = Batch(pixels, prompts, seeds)
    return extract_batches(zoo, [batch], parts_of(lune, sol), teacher_input=teacher_input, dtype=dtype)[0]


def parts_of(lune: bool, sol: bool) -> tuple[str, ...]:
    """The parts of a whole sample, with or without its teachers'."""
    return ("latents", "text", *(("lune",) if lune else ()), *(("sol",) if sol else ()))


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
    batch, parts = Batch(pixels, prompts, seeds), parts_of(lune, sol)[2:]
    return extract_batches(zoo, [batch], parts, teacher_input=teacher_input, dtype=torch.float32)[0]


def _taught(zoo: ModelZoo, name: str, contexts: Tensor, latents: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
    """One teacher's features of latents [B, K, 4, h, w] at timesteps [K], in chunks."""
    B, K = latents.shape[:2]
    unet, features = zoo.required(name), []
    rows = torch.arange(B * K, device=latents.device)
    tokens = TOKENS["cpu" if latents.device.type == "cpu" else "accelerator"]
    for chunk in rows.split(max(1, tokens // latents[0, 0, 0].numel())):
        at = chunk // K, chunk % K
        inputs = _cast(unet, latents[at], contexts[at[0]], timesteps[at[1]])
        if name == "lune":
            features.append({"lune": lune_features(unet, *inputs)})
        else:
            stats, spatial = sol_statistics(unet, *inputs, size=SOL_SIZE)
            features.append({"sol_stats": stats, "sol_spatial": spatial})
    return {key: torch.cat([chunk[key] for chunk in features]).unflatten(0, (B, K)) for key in features[0]}


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
    batch = Batch(None, [""], torch.zeros(1, dtype=torch.int64))
    return {name: tensor[0].clone() for name, tensor in extract_batches(zoo, [batch], ["text"], dtype=dtype)[0].items()}


def load_models(zoo: ModelZoo, lune: bool = True, sol: bool = True) -> None:
    """Load what `extract` needs and the zoo has not, and no more."""
    load_for(zoo, parts_of(lune, sol))


def load_for(zoo: ModelZoo, parts: Iterable[str]) -> None:
    """Load what these parts need and the zoo has not; with `one_at_a_time` each is only tried, for the fingerprint."""
    for name in models_of(parts):
        if zoo.one_at_a_time:
            with zoo.using(name):
                pass
        elif getattr(zoo, name) is None:
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
    unused = set(MODELS) - set(models_of(parts_of(lune, sol)))
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
