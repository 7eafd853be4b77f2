"""The tiny CLIP's vision tower and both projections, trained against its finished text tower.

The loss is CLIP's (Radford et al., 2021, arXiv:2103.00020), where pictures with the same caption are all positives. The
text tower does not change, bit for bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPVisionConfig

from tinyflux.model.tiny.descent import Descent
from tinyflux.model.tiny.fit import SEEN
from tinyflux.model.tiny.pictures import PHOTOGRAPHS, captioned, photo_pictures, to_pixels

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own normalisation
DIM = 64  # of the space that pictures and captions share


def build_clip_model(text: CLIPTextModel) -> CLIPModel:
    """A complete CLIP with this text tower and an untrained vision tower for 64 x 64 pixels."""
    vision = CLIPVisionConfig(
        image_size=64, patch_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        projection_dim=DIM,
    )  # fmt: skip
    texts = text.config.to_dict()
    parts = {"text_config": texts, "vision_config": vision.to_dict()}
    config = CLIPConfig(**parts, projection_dim=DIM, logit_scale_init_value=3.0)  # a float: it is a parameter
    clip = CLIPModel(config)
    clip.text_model.load_state_dict(text.state_dict())
    return clip


def training_set(n: int, seed: int = 4) -> tuple[Tensor, list[str]]:
    """Pictures [N, 3, 64, 64] in [-1, 1] and their captions: shapes and patterns, and a tenth as many photo crops."""
    images, captions = captioned(n, seed)
    for name in SEEN:
        images += photo_pictures(n // len(SEEN) // 10, seed, (name,))
        captions += [PHOTOGRAPHS[name]] * (len(images) - len(captions))
    return to_pixels(images), captions


def fit_vision(clip: CLIPModel, tokenizer, steps: int, batch_size: int = 96, n: int = 5000, seed: int = 0) -> None:
    """Train the vision tower and the projections in place."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    clip.text_model.requires_grad_(False)
    pixels, captions = training_set(n)
    names = sorted(set(captions))
    labels = torch.tensor([names.index(caption) for caption in captions])
    tokens = tokenizer(names, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        pooled = torch.cat([clip.text_model(input_ids=chunk).pooler_output for chunk in tokens.split(128)])
    parts = torch.nn.ModuleList([clip.vision_model, clip.visual_projection, clip.text_projection])
    descent = Descent(parts, steps, lr=0.01, adam_lr=1e-3)
    for step in range(steps):
        rows = torch.randint(len(pixels), (batch_size,), generator=generator)
        seen, wanted = _disturbed(pixels[rows], generator), labels[rows]
        image = F.normalize(clip.visual_projection(clip.vision_model(normalise(seen)).pooler_output), dim=-1)
        text = F.normalize(clip.text_projection(pooled[wanted]), dim=-1)
        logits = 20 * image @ text.T
        right = (wanted[:, None] == wanted).float()
        right = right / right.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
        descent.step(loss)
        if step % 50 == 0 or step == steps - 1:
            found = (wanted[logits.argmax(1)] == wanted).float().mean().item()
            print(f"vision {step}: {loss.item():.4f}, right {found:.3f}", flush=True)


def normalise(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], normalised for CLIP."""
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    return ((pixels + 1) / 2 - mean) / std


def _disturbed(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures moved by up to four pixels, with a little noise, whose strength differs per picture."""
    y, x = (4 + torch.randint(-4, 5, (2,), generator=generator)).tolist()
    pixels = F.pad(pixels, (4, 4, 4, 4), mode="replicate")[..., y : y + 64, x : x + 64]
    strength = 0.15 * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    return (pixels + strength * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1)
