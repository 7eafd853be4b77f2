"""Images and captions -> the tensors of a sample, with one function per group. To add a teacher, add its function."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tinyflux.model.teachers import lune_features, sol_statistics
from tinyflux.model.zoo import ModelZoo
from tinyflux.precache.config import sample_groups
from tinyflux.util import rng
from tinyflux.util.buckets import BUCKETS
from tinyflux.util.pixels import to_pixels
from tinyflux.util.predictions import flow_x_t

TEACHER_INPUTS = ("image", "noise")
SOL_SIZE = 8
TOKENS = {"cpu": 1 << 12, "accelerator": 1 << 18}  # latent pixels per call of a teacher

Tensors = dict[str, Tensor]


class Batch(NamedTuple):
    """Images and their captions. `pixels`: float32 [B, 3, H, W] in [-1, 1] or uint8 [B, H, W, 3], None if no group
    needs them; `seeds` int64 [B] key the teachers' noise."""

    pixels: Tensor | None
    prompts: list[str]
    seeds: Tensor

    def on(self, device: torch.device) -> Tensor:
        """float32 [B, 3, H, W] in [-1, 1] on a device; uint8 pixels are converted there."""
        if self.pixels.dtype != torch.uint8:
            return self.pixels.to(device)
        pixels = self.pixels.pin_memory() if device.type == "cuda" else self.pixels
        return to_pixels(pixels.to(device, non_blocking=True))


@dataclass
class Extraction:
    """One call of `extract_batches`: its batches, and intermediate results that several groups share."""

    zoo: ModelZoo
    batches: list[Batch]
    teacher_input: str = "image"
    timesteps: tuple[float, ...] = BUCKETS
    _clip: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _sd_latents: list[Tensor] = field(default_factory=list)

    def clip(self) -> list[tuple[Tensor, Tensor]]:
        """CLIP's pooled vectors [B, D] and hidden states [B, 77, D] of each batch."""
        if not self._clip:
            with self.zoo.using("clip"):
                self._clip = [self.zoo.encode_clip_both(batch.prompts) for batch in self.batches]
        return self._clip

    def teacher_inputs(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """A UNet's inputs for each batch: latents [B, K, 4, h, w], timesteps [K] and context [B, 77, D]."""
        contexts = [hidden for _, hidden in self.clip()]
        if not self._sd_latents:
            with self.zoo.using("sd_vae"):
                self._sd_latents = [self.zoo.encode_sd(batch.on(self.zoo.device)) for batch in self.batches]
        return [
            (*teacher_inputs(latents, batch.seeds, self.teacher_input, self.timesteps), context)
            for latents, batch, context in zip(self._sd_latents, self.batches, contexts, strict=True)
        ]


def latents(run: Extraction) -> list[Tensors]:
    """`latents` [B, C, h, w] of the zoo's VAE."""
    with run.zoo.using("vae"):
        return [{"latents": run.zoo.encode_images(batch.on(run.zoo.device))} for batch in run.batches]


def text(run: Extraction) -> list[Tensors]:
    """`t5_embeds` [B, L, D] and `clip_pooled` [B, D] of the captions."""
    with run.zoo.using("t5"):
        states = [run.zoo.encode_t5(batch.prompts) for batch in run.batches]
    pooled = [vectors for vectors, _ in run.clip()]
    return [{"t5_embeds": t5, "clip_pooled": clip} for t5, clip in zip(states, pooled, strict=True)]


def lune(run: Extraction) -> list[Tensors]:
    """`lune` [B, K, D] at K timesteps."""
    inputs = run.teacher_inputs()
    with run.zoo.using("lune") as unet:
        return [_in_chunks(lambda *x: {"lune": lune_features(unet, *x)}, unet, *each) for each in inputs]


def sol(run: Extraction) -> list[Tensors]:
    """`sol_stats` [B, K, 3] and `sol_spatial` [B, K, 8, 8] at K timesteps."""
    inputs = run.teacher_inputs()

    def statistics(*x: Tensor) -> Tensors:
        stats, spatial = sol_statistics(unet, *x, size=SOL_SIZE)
        return {"sol_stats": stats, "sol_spatial": spatial}

    with run.zoo.using("sol") as unet:
        return [_in_chunks(statistics, unet, *each) for each in inputs]


class Extractor(NamedTuple):
    """The function that makes a group of tensors, and the models that it needs, in the order in which they run."""

    run: Callable[[Extraction], list[Tensors]]
    models: tuple[str, ...]
    of_image: bool = True
    """Whether it needs the image, not only the captions."""
    is_teacher: bool = False
    """Whether it depends on `teacher_input` and on the sample's seed."""
    version: str = ""
    """Part of the fingerprint; give another one when the tensors change for another reason than the models above."""


EXTRACTORS = {
    "latents": Extractor(latents, ("vae",)),
    "text": Extractor(text, ("t5", "clip"), of_image=False),
    "lune": Extractor(lune, ("clip", "sd_vae", "lune"), is_teacher=True),
    "sol": Extractor(sol, ("clip", "sd_vae", "sol"), is_teacher=True),
}


def models_of(groups: Iterable[str]) -> list[str]:
    """The models that these groups need, in the order in which they run."""
    groups = set(groups)
    return list(dict.fromkeys(m for name, each in EXTRACTORS.items() if name in groups for m in each.models))


@torch.no_grad()
def extract_batches(
    zoo: ModelZoo,
    batches: list[Batch],
    groups: Iterable[str] = tuple(EXTRACTORS),
    *,
    teacher_input: str = "image",
    timesteps: tuple[float, ...] = BUCKETS,
    dtype: torch.dtype = torch.float16,
) -> list[Tensors]:
    """The tensors of these groups for each batch, in `dtype` on the CPU.

    Each group is computed for all batches before the next, so that a zoo with `one_at_a_time` loads each model once. A
    sample's tensors don't depend on the rest of its batch. Raises ValueError for unknown groups and uneven batches.
    """
    groups = set(groups)
    if unknown := groups - EXTRACTORS.keys():
        raise ValueError(f"no extractor for {', '.join(sorted(unknown))}; known groups: {', '.join(EXTRACTORS)}")
    for batch in batches:
        if not len(batch.prompts if batch.pixels is None else batch.pixels) == len(batch.prompts) == len(batch.seeds):
            raise ValueError(
                f"{len(batch.pixels)} images, {len(batch.prompts)} prompts and {len(batch.seeds)} seeds: "
                "give one of each per sample"
            )
    run, found = Extraction(zoo, batches, teacher_input, timesteps), [{} for _ in batches]
    for name, extractor in EXTRACTORS.items():
        if name in groups:
            for sample, tensors in zip(found, extractor.run(run), strict=True):
                sample.update({key: x.to(dtype).to("cpu", non_blocking=True) for key, x in tensors.items()})
    if zoo.device.type == "cuda":
        torch.cuda.synchronize(zoo.device)  # once for all copies
    return found


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
) -> Tensors:
    """`extract_batches` of one batch: `latents`, `t5_embeds`, `clip_pooled` and the teachers' features.

    pixels float32 [B, 3, H, W] in [-1, 1] or uint8 [B, H, W, 3]; seeds int64 [B], which key the teachers' noise.
    """
    batch, groups = Batch(pixels, prompts, seeds), sample_groups(lune, sol)
    return extract_batches(zoo, [batch], groups, teacher_input=teacher_input, dtype=dtype)[0]


def _in_chunks(features: Callable[..., Tensors], unet, latents: Tensor, timesteps: Tensor, contexts: Tensor) -> Tensors:
    """features(latents, context, timestep) of latents [B, K, 4, h, w] at timesteps [K], as [B, K, ...]."""
    B, K = latents.shape[:2]
    rows, found = torch.arange(B * K, device=latents.device), []
    tokens = TOKENS["cpu" if latents.device.type == "cpu" else "accelerator"]
    for chunk in rows.split(max(1, tokens // latents[0, 0, 0].numel())):
        row, k = chunk // K, chunk % K
        found.append(features(latents[row, k].to(unet.dtype), contexts[row].to(unet.dtype), timesteps[k]))
    return {name: torch.cat([each[name] for each in found]).unflatten(0, (B, K)) for name in found[0]}


def teacher_inputs(
    latents: Tensor, seeds: Tensor, teacher_input: str = "image", timesteps: tuple[float, ...] = BUCKETS
) -> tuple[Tensor, Tensor]:
    """The teachers' inputs at each t of a grid.

    latents [B, 4, h, w] of the SD VAE, seeds int64 [B]. Returns [B, K, 4, h, w] float32 and teacher timesteps [K].
    "image": x_t at timestep 1000 (1 - t), the teachers' own convention. "noise": pure noise at timestep 1000 t, from
    which the published heads were distilled. A sample has the same noise at all timesteps.
    """
    if teacher_input not in TEACHER_INPUTS:
        raise ValueError(f"teacher_input is {teacher_input!r}; known: {', '.join(TEACHER_INPUTS)}")
    latents = latents.float()
    noise = rng.normal(seeds.to(latents.device), "teacher_noise", latents.shape[1:])
    t = torch.tensor(timesteps, device=latents.device)
    if teacher_input == "noise":
        return noise[:, None].expand(-1, len(t), -1, -1, -1), 1000 * t
    return torch.stack([flow_x_t(latents, noise, time.expand(len(noise))) for time in t], dim=1), 1000 * (1 - t)


def null_embeddings(zoo: ModelZoo, dtype: torch.dtype = torch.float16) -> Tensors:
    """T5 states [L, D] and pooled CLIP vector [D] of the empty prompt, for text dropout and guidance."""
    batch = Batch(None, [""], torch.zeros(1, dtype=torch.int64))
    return {name: tensor[0].clone() for name, tensor in extract_batches(zoo, [batch], ["text"], dtype=dtype)[0].items()}


def load_for(zoo: ModelZoo, groups: Iterable[str]) -> None:
    """Load the models that these groups need. With `one_at_a_time`, each is loaded only once, for the fingerprint."""
    for name in models_of(groups):
        if zoo.one_at_a_time:
            with zoo.using(name):
                pass
        elif getattr(zoo, name) is None:
            getattr(zoo, f"load_{name}")()


def producers(
    zoo: ModelZoo, groups: Iterable[str], dtype: torch.dtype, *, teacher_input: str = "image", seed: int = 0
) -> dict[str, dict]:
    """The producer of each group: models, precision, and the input of teachers.

    zoo: with its models loaded.
    """
    known, found = zoo.fingerprint(), {}
    for name in groups:
        extractor = EXTRACTORS[name]
        found[name] = {model: known[model] for model in extractor.models}
        found[name]["dtype"] = str(dtype).removeprefix("torch.")
        if extractor.version:
            found[name][f"{name}_version"] = extractor.version
        if "t5" in extractor.models:
            found[name]["t5_length"] = known["t5_length"]
        if "vae" in extractor.models:
            found[name]["latent"] = known["latent"]
        if extractor.is_teacher:
            found[name] |= {"teacher_input": teacher_input, "seed": seed}
    return found
