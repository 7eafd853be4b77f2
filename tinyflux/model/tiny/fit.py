"""Short trainings of the tiny zoo's autoencoders and UNets."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from tinyflux.model.tiny.descent import Descent
from tinyflux.model.tiny.pictures import HELD_OUT, PHOTOGRAPHS, captioned, photo_pictures, shape_pictures, to_pixels

SEEN = tuple(name for name in PHOTOGRAPHS if name not in HELD_OUT)


def training_pixels(n: int = 3000, seed: int = 1) -> Tensor:
    """n pictures of shapes and n photo crops, float32 [2n, 3, 64, 64]."""
    return torch.cat([to_pixels(shape_pictures(n, seed)), to_pixels(photo_pictures(n, seed, SEEN))])


def fit_vae(vae: AutoencoderKL, steps: int, batch_size: int = 16, seed: int = 0) -> None:
    """Train in place, then set `scaling_factor` so that latents of the training pictures have std 1."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    pixels = training_pixels()
    descent = Descent(vae, steps)
    for step in range(steps):
        batch = pixels[torch.randint(len(pixels), (batch_size,), generator=generator)]
        batch = batch.flip(-1) if step % 2 else batch
        posterior = vae.encode(batch).latent_dist
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        descent.step(loss := picture_loss(vae.decode(posterior.sample()).sample, batch) + 1e-3 * kl)
        if step % 50 == 0 or step == steps - 1:
            print(f"vae {step}: {loss.item():.4f}", flush=True)
    with torch.no_grad():
        latents = vae.encode(pixels[:: len(pixels) // 500]).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))


def picture_loss(x: Tensor, y: Tensor) -> Tensor:
    """L1 at three scales and L1 of the finest scale's gradients: flat colours and crisp edges."""
    loss = 0.5 * sum((x.diff(dim=dim) - y.diff(dim=dim)).abs().mean() for dim in (-1, -2))
    for scale in (1, 2, 4):
        loss = loss + (F.avg_pool2d(x, scale) - F.avg_pool2d(y, scale)).abs().mean()
    return loss


@torch.no_grad()
def encode_captioned(sd_vae: AutoencoderKL, clip: nn.Module, tokenizer, n: int = 3000) -> tuple[Tensor, Tensor]:
    """Latents [N, 4, 8, 8] and CLIP states [N, 77, D] of pictures and photo crops, some without a caption."""
    images, captions = captioned(n, seed=2)
    for name in SEEN:
        images += photo_pictures(n // len(SEEN) // 4, 2, (name,))
        captions += [PHOTOGRAPHS[name]] * (len(images) - len(captions))
    captions = ["" if i % 10 == 0 else caption for i, caption in enumerate(captions)]
    latents = torch.cat([sd_vae.encode(chunk).latent_dist.mode() for chunk in to_pixels(images).split(64)])
    tokens = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    contexts = torch.cat([clip(input_ids=chunk).last_hidden_state for chunk in tokens.split(256)])
    return latents * sd_vae.config.scaling_factor, contexts


def fit_unet(unet: UNet2DConditionModel, latents: Tensor, contexts: Tensor, steps: int, batch_size=48, seed=0) -> None:
    """Flow matching in the teachers' convention: timestep 1000 is noise, and the network predicts noise - data."""
    generator = torch.Generator().manual_seed(seed)
    descent = Descent(unet, steps)
    for step in range(steps):
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        data = latents[rows]
        noise = torch.randn(data.shape, generator=generator)
        level = torch.rand(batch_size, generator=generator)  # 1 = noise
        x = data.lerp(noise, level.view(-1, 1, 1, 1))
        loss = F.mse_loss(unet(x, 1000 * level, contexts[rows]).sample, noise - data)
        descent.step(loss)
        if step % 100 == 0 or step == steps - 1:
            print(f"unet {step}: {loss.item():.4f}", flush=True)
