"""Scores of pictures: how well they match their prompts, and the distance of a set of pictures from real ones."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from tinyflux.model.zoo import ModelZoo

# normalisation of all published CLIP models (Radford et al., 2021)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipScorer:
    """Embeds pictures and prompts with the zoo's CLIP, including its vision tower.

    Raises as `ModelZoo.load_whole_clip`.
    """

    def __init__(self, zoo: "ModelZoo"):
        self.clip = zoo.load_whole_clip()
        self.side = self.clip.config.vision_config.image_size

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """Unit vectors [B, D] of pictures [B, 3, H, W] in [-1, 1], after resizing the short side and a centre crop."""
        pixels = pixels.float()
        scale = self.side / min(pixels.shape[2:])
        if scale != 1:
            size = [max(self.side, round(length * scale)) for length in pixels.shape[2:]]
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        top, left = ((length - self.side) // 2 for length in pixels.shape[2:])
        pixels = pixels[..., top : top + self.side, left : left + self.side]
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
        pixels = (((pixels.cpu() + 1) / 2 - mean) / std).to(self.clip.device, self.clip.dtype)
        states = self.clip.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.clip.visual_projection(states).float(), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, pooled: Tensor) -> Tensor:
        """Unit vectors [B, D] of prompts, from the pooled vectors [B, D'] in the shards."""
        pooled = pooled.to(self.clip.device, self.clip.dtype)
        return F.normalize(self.clip.text_projection(pooled).float(), dim=-1).cpu()


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """100 max(0, cosine) [B] of unit vectors [B, D] (Hessel et al., 2021, arXiv:2104.08718, without the factor 2.5)."""
    return 100 * (images * texts).sum(-1).clamp(min=0)


def cmmd(real: Tensor, drawn: Tensor, sigma: float = 10.0) -> float:
    """CLIP maximum mean discrepancy of two sets of unit vectors [N, D], [M, D], times 1000; 0 for equal sets.

    Jayasumana et al., 2024, arXiv:2401.09603: a Gaussian kernel, and the mean over all pairs as in their code.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a.double(), b.double()).square() / (2 * sigma**2)).mean()

    return 1000 * (kernel(real, real) + kernel(drawn, drawn) - 2 * kernel(real, drawn)).item()


def frechet(real: Tensor, drawn: Tensor) -> float:
    """Frechet distance of two sets of features [N, D], [M, D] as Gaussians (Heusel et al., 2017, arXiv:1706.08500)."""
    real, drawn = real.double(), drawn.double()
    a, b = torch.cov(real.T), torch.cov(drawn.T)
    # the trace of sqrt(AB) is the sum of the square roots of AB's eigenvalues, which are not negative
    roots = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return ((real.mean(0) - drawn.mean(0)).square().sum() + a.trace() + b.trace() - 2 * roots).item()


class Inception:
    """FID's features [B, 2048] of pictures, from torch-fidelity (the extra [eval]) and its weights file.

    Raises ValueError without that package, FileNotFoundError without the file.
    """

    def __init__(self, weights: Path):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ValueError("FID needs torch-fidelity: pip install 'tinyflux-deep[eval]'") from error
        if not weights.is_file():
            raise FileNotFoundError(f"{weights}: FID needs the weights pt_inception-2015-12-05-6726825d.pth")
        self.network: nn.Module = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
        )

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """pixels: uint8 [B, 3, H, W]."""
        return self.network(pixels)[0].float().cpu()
