"""The two distilled heads: Lune predicts a teacher's mid-block features, Sol its attention statistics.

In training, the network gets the teachers' values as input and the heads learn to predict them; in inference, the
heads' predictions replace them.
"""

import math

import torch
from torch import Tensor, nn

from tinyflux.model.layers import Linear


def choose(teacher: Tensor | None, predicted: Tensor, use_teacher: Tensor | None) -> Tensor:
    """The teacher's values [B, ...], if given, where `use_teacher` (bool [B], None = all) is true, else `predicted`."""
    if teacher is None:
        return predicted
    teacher = teacher.to(predicted.dtype)
    if use_teacher is None:
        return teacher
    return torch.where(use_teacher.view(-1, *[1] * (teacher.ndim - 1)), teacher, predicted)


class LunePredictor(nn.Module):
    """Trajectory guidance: predicts features [B, E] from time and pooled text, and their signal for `vec`."""

    def __init__(self, dim: int, pooled_dim: int, hidden: int, expert_dim: int, dropout: float):
        super().__init__()
        self.expert_gate = nn.Parameter(torch.empty(1))
        self.input_proj = Linear(dim + pooled_dim, hidden)
        self.predictor = nn.Sequential(
            nn.SiLU(),
            Linear(hidden, hidden),
            nn.SiLU(),
            nn.Dropout(dropout),
            Linear(hidden, hidden),
            nn.SiLU(),
            Linear(hidden, expert_dim),
        )
        self.output_proj = nn.Sequential(nn.LayerNorm(expert_dim), Linear(expert_dim, dim))

    def forward(
        self,
        time: Tensor,
        pooled: Tensor,
        teacher: Tensor | None = None,
        use_teacher: Tensor | None = None,
        dropout_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Signal [B, C] to add to the condition, and the predicted features [B, E].

        dropout_mask [B, hidden], values 0 and 1 / (1 - p), replaces the dropout layer.
        """
        x = self.input_proj(torch.cat([time, pooled], dim=-1))
        for layer in self.predictor:
            if isinstance(layer, nn.Dropout) and dropout_mask is not None:
                x = x * dropout_mask.to(x.dtype)
            else:
                x = layer(x)
        features = choose(teacher, x, use_teacher)
        return self.expert_gate.sigmoid() * self.output_proj(features), x


class SolPrior(nn.Module):
    """Structural prior: attention temperature [B, H] and spatial map [B, s, s], partly geometric, partly learned."""

    def __init__(self, dim: int, pooled_dim: int, hidden: int, heads: int, spatial_size: int, geometric_weight: float):
        super().__init__()
        self.heads = heads
        self.spatial_size = spatial_size
        self.geometric_weight = geometric_weight
        self.blend_gate = nn.Parameter(torch.empty(1))

        def head(out: int) -> nn.Sequential:
            return nn.Sequential(
                Linear(dim + pooled_dim, hidden), nn.SiLU(), Linear(hidden, hidden), nn.SiLU(), Linear(hidden, out)
            )

        self.stat_predictor = head(3)
        self.spatial_predictor = head(spatial_size**2)
        self.stat_to_temperature = nn.Sequential(
            Linear(3, hidden // 2), nn.SiLU(), Linear(hidden // 2, heads), nn.Softplus()
        )

    def blend_logit(self) -> float:
        """Initial value of the gate: its sigmoid is `geometric_weight`."""
        p = min(max(self.geometric_weight, 1e-4), 1 - 1e-4)
        return math.log(p / (1 - p))

    def forward(
        self,
        t: Tensor,
        time: Tensor,
        pooled: Tensor,
        teacher_stats: Tensor | None = None,
        teacher_spatial: Tensor | None = None,
        use_teacher: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Temperature [B, H] and map [B, s, s] in float32, predicted statistics [B, 3], predicted map [B, s, s]."""
        x = torch.cat([time, pooled], dim=-1)
        stats = self.stat_predictor(x)
        spatial = self.spatial_predictor(x).sigmoid().unflatten(-1, (self.spatial_size, self.spatial_size))
        learned_temperature = self.stat_to_temperature(choose(teacher_stats, stats, use_teacher)).float()
        learned_spatial = choose(teacher_spatial, spatial, use_teacher).float()

        offsets = torch.linspace(-0.2, 0.2, self.heads, device=t.device)
        axis = torch.linspace(-1, 1, self.spatial_size, device=t.device)
        centred = (-2 * torch.hypot(axis[:, None], axis)).exp()  # [s, s]
        geometric_temperature = (1 + t[:, None] + offsets).clamp(0.5, 3)
        geometric_spatial = torch.lerp(centred, torch.ones_like(centred), t[:, None, None])
        b = self.blend_gate.float().sigmoid()
        temperature = torch.lerp(learned_temperature, geometric_temperature, b)
        return temperature, torch.lerp(learned_spatial, geometric_spatial, b), stats, spatial
