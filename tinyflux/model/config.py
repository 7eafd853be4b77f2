"""The sizes of the network. Does not import torch, so that --help is fast."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tinyflux.util.settings import Above, AtLeast, Within, check, require


@dataclass
class TinyFluxConfig:
    """The network's sizes. The defaults are the published 245M-parameter model."""

    hidden_size: Annotated[int, AtLeast(1)] = 512
    """Channels: num_attention_heads x attention_head_dim."""
    num_attention_heads: Annotated[int, AtLeast(1)] = 4
    attention_head_dim: Annotated[int, AtLeast(1)] = 128
    in_channels: Annotated[int, AtLeast(1)] = 16
    """Latent channels."""
    patch_size: Annotated[int, Within(1, 1)] = 1
    """One token per latent pixel; no other value is supported."""
    joint_attention_dim: Annotated[int, AtLeast(1)] = 768
    """Width of the T5 states."""
    pooled_projection_dim: Annotated[int, AtLeast(1)] = 768
    """Width of the pooled CLIP vector."""
    num_double_layers: Annotated[int, AtLeast(0)] = 15
    num_single_layers: Annotated[int, AtLeast(0)] = 25
    mlp_ratio: Annotated[float, Above(0)] = 4.0
    axes_dims_rope: Annotated[tuple[int, int, int], AtLeast(0)] = (16, 56, 56)
    """Rotary channels of (frame, row, column); their sum is attention_head_dim."""
    use_lune_expert: bool = True
    lune_expert_dim: Annotated[int, AtLeast(1)] = 1280
    """Width of the Lune teacher's features."""
    lune_hidden_dim: Annotated[int, AtLeast(1)] = 512
    lune_dropout: Annotated[float, Within(0, 1, open_high=True)] = 0.1
    freeze_lune: bool = False
    use_sol_prior: bool = True
    sol_spatial_size: Annotated[int, AtLeast(1)] = 8
    """Points along each side of the Sol map."""
    sol_hidden_dim: Annotated[int, AtLeast(2)] = 256
    sol_geometric_weight: Annotated[float, Within(0, 1)] = 0.7
    """Initial share of the geometric prior relative to the learned one, in [0, 1]."""
    freeze_sol: bool = False
    use_t5_vec: bool = True
    """Condition on a vector pooled from the T5 states, in addition to the CLIP vector."""

    def __post_init__(self):
        self.axes_dims_rope = tuple(self.axes_dims_rope)
        check(self, "model.")
        heads, head_dim = self.num_attention_heads, self.attention_head_dim
        if self.hidden_size != heads * head_dim:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not num_attention_heads x attention_head_dim = {heads} x {head_dim}"
            )
        dims = self.axes_dims_rope
        require(len(dims) == 3 and not any(d % 2 for d in dims), "model.axes_dims_rope", dims, "three even numbers")
        if sum(dims) != head_dim:
            raise ValueError(f"axes_dims_rope {dims} must sum to attention_head_dim {head_dim}")
        require(
            self.mlp_dim >= 1, "model.mlp_ratio", self.mlp_ratio, f"at least 1 / hidden_size = {1 / self.hidden_size}"
        )

    @property
    def mlp_dim(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "TinyFluxConfig":
        """Keys that start with `_` are metadata and ignored. Raises ValueError for other unknown keys."""
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"unknown model config keys: {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**values)

    def save_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> "TinyFluxConfig":
        """Raises ValueError, with the path, if the file is not an object with known keys."""
        try:
            values = json.loads(Path(path).read_text())
            if not isinstance(values, dict):
                raise ValueError("not a JSON object")
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
