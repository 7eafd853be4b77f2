"""A head for training only: a block's tokens learn to predict a teacher's feature grid, such as DINO's (REPA, Yu et al.
2024, arXiv:2410.06940). It is not exported."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyflux.model.layers import Linear

WIDEN = 4  # width of the head's hidden layers, as a multiple of the network's width


def pooling(size: int, cells: int) -> Tensor:
    """Weights [cells, size] that average `size` points over `cells` equal parts."""
    edges = torch.arange(cells + 1, dtype=torch.float32) * (size / cells)
    points = torch.arange(size, dtype=torch.float32)
    overlap = torch.minimum(edges[1:, None], points + 1) - torch.maximum(edges[:-1, None], points)
    return overlap.clamp(min=0) / (size / cells)


class AlignHead(nn.Module):
    """block: index of the block that it reads, first double blocks, then single blocks. features: shape of the
    teacher's grid, (D, rows, columns)."""

    def __init__(self, dim: int, block: int, features: tuple[int, int, int]):
        super().__init__()
        self.block, self.grid = block, features[1:]
        hidden = WIDEN * dim
        self.layers = nn.Sequential(
            Linear(dim, hidden), nn.SiLU(), Linear(hidden, hidden), nn.SiLU(), Linear(hidden, features[0])
        )

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Image tokens [B, H*W, C] of a grid (H, W) -> predicted features [B, D, rows, columns]."""
        rows, columns = (pooling(*pair).to(tokens) for pair in zip(grid, self.grid, strict=True))
        pooled = rows @ tokens.unflatten(1, grid).movedim(-1, 1) @ columns.mT  # [B, C, rows, columns]
        return self.layers(pooled.movedim(1, -1)).movedim(-1, 1)


def align_loss(pred: Tensor, target: Tensor) -> Tensor:
    """1 - cosine of the features [B, D, rows, columns], mean over the grid, float32 [B]."""
    return 1 - F.cosine_similarity(pred.float(), target.float(), dim=1).mean((1, 2))
