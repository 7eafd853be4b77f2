"""Check the inputs of a pipeline call and convert them for the Sampler; convert its pictures to the requested type."""

from dataclasses import replace

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from PIL import Image
from torch import Tensor

from tinyflux.model.zoo import ModelZoo
from tinyflux.trainer.sampling import Prompts, Settings, initial_noise
from tinyflux.util.pixels import to_uint8

OUTPUTS = ("pil", "np", "pt", "latent")


def device_of(part: torch.nn.Module) -> torch.device:
    """The device where a part computes; an offloaded part is elsewhere until it is called."""
    return getattr(getattr(part, "_hf_hook", None), "execution_device", None) or part.device


def encode_texts(
    zoo: ModelZoo,
    prompt: str | list[str] | None,
    negative: str | list[str] | None,
    times: int,
    given: tuple[Tensor | None, ...],
) -> Prompts:
    """Prompts from texts, or from the tensors `given` (T5, CLIP, negative T5, negative CLIP), each `times` in a row.

    Raises ValueError if they do not match.
    """
    if times < 1:
        raise ValueError(f"num_images_per_prompt must be at least 1, not {times}")
    t5, clip, null_t5, null_clip = given
    for (a, b), name in (((t5, clip), ""), ((null_t5, null_clip), "negative_")):
        if (a is None) != (b is None):
            raise ValueError(f"give both {name}prompt_embeds and {name}pooled_prompt_embeds, or neither")
    if (prompt is None) == (t5 is None):
        raise ValueError("give either prompt or prompt_embeds with pooled_prompt_embeds")
    if negative is not None and null_t5 is not None:
        raise ValueError("give either negative_prompt or negative_prompt_embeds with negative_pooled_prompt_embeds")
    texts = [""] * len(t5) if prompt is None else [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompt must be a text or a list of texts, not {prompt!r:.80}")
    if not isinstance(negative, str | None):
        if not isinstance(negative, list | tuple) or not all(isinstance(text, str) for text in negative):
            raise ValueError(f"negative_prompt must be a text or a list of texts, not {negative!r:.80}")
        if len(negative) != len(texts):
            raise ValueError(f"{len(negative)} negative prompts for {len(texts)} prompts: give one, or one per prompt")
    encoded = None
    if t5 is None or null_t5 is None:
        encoded = Prompts.encode(zoo, list(texts) if t5 is None else [], negative or "")
    if t5 is None:
        t5, clip = encoded.t5, encoded.clip
    if null_t5 is None:
        null_t5, null_clip = encoded.null_t5, encoded.null_clip
    for name, x, null, axes in (
        ("prompt_embeds", t5, null_t5, "[B, L, D]"),
        ("pooled_prompt_embeds", clip, null_clip, "[B, D]"),
    ):
        if x.ndim != len(axes.split()) or x.shape[1:] != null.shape[1:]:
            raise ValueError(
                f"{name} {list(x.shape)} and negative_{name} {list(null.shape)} must be {axes}, and differ only in B"
            )
        if len(x) != len(t5) or len(null) not in (1, len(t5)):
            raise ValueError(f"{name} has {len(x)} rows and negative_{name} {len(null)}, for {len(t5)} prompts")
    return Prompts(list(texts), *(x.cpu() for x in (t5, clip, null_t5, null_clip))).repeat(times)


def starting_noise(count: int, shape: tuple[int, int, int], generator, latents: Tensor | None, device) -> Tensor:
    """The starting noise [B, C, h, w] of a call: the given latents, or keyed by the generators' seeds. ValueError."""
    if latents is not None:
        if latents.shape != (count, *shape):
            raise ValueError(
                f"latents must be {[count, *shape]} for these prompts and sizes, not {list(latents.shape)}"
            )
        return latents.to(device)
    if isinstance(generator, list | tuple):
        if len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} pictures: give one, or one per picture")
        first = torch.zeros(1, dtype=torch.int64)
        return torch.cat([initial_noise(g.initial_seed(), first, shape, device) for g in generator])
    seed = int(torch.randint(1 << 62, ())) if generator is None else generator.initial_seed()
    return initial_noise(seed, torch.arange(count), shape, device)


def encode_pictures(
    vae: AutoencoderKL, image: PipelineImageInput, height: int | None, width: int | None, count: int, times: int
) -> Tensor:
    """Latents [count, C, h, w] of the images to draw over: one for all, or one per prompt, each `times` in a row."""
    processor = VaeImageProcessor(vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1), do_convert_rgb=True)
    pixels = processor.preprocess(image, height, width).to(device_of(vae), vae.dtype)
    latents = vae.encode(pixels).latent_dist.mode().float() * vae.config.scaling_factor
    if len(latents) == 1:
        return latents.expand(count, -1, -1, -1)
    if len(latents) * times != count:
        raise ValueError(f"{len(latents)} images for {count // times} prompts: give one, or one per prompt")
    return latents.repeat_interleave(times, 0)


def given_times(timesteps: list[float] | None, sigmas: list[float] | None) -> tuple[float, ...] | None:
    """Ascending timesteps from a call's timesteps or sigmas. Raises ValueError."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("give either timesteps or sigmas")
    if sigmas is not None:
        timesteps = [1 - float(sigma) for sigma in sigmas]
        timesteps += [1.0] if timesteps and timesteps[-1] < 1 else []
    return None if timesteps is None else tuple(map(float, timesteps))


def last_part(settings: Settings, strength: float) -> Settings:
    """The same settings with only the last part of their timesteps. Raises ValueError."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1], not {strength}")
    times = settings.schedule()
    steps = max(1, round((len(times) - 1) * strength))
    return replace(settings, timesteps=tuple(times[-steps - 1 :]))


def as_asked(images: Tensor, output_type: str):
    """Pictures [B, 3, H, W] in [-1, 1] as PIL images, or in [0, 1] as "np" [B, H, W, 3] or "pt"."""
    if output_type == "pil":
        return [Image.fromarray(image) for image in to_uint8(images).permute(0, 2, 3, 1).numpy()]
    images = (images / 2 + 0.5).clamp(0, 1)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy()
