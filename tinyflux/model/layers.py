"""Norms, rotary positions, attention and the two kinds of transformer block.

B samples, L text tokens, N image tokens, T = L + N tokens joined as [text, image], H heads of width D, C = H*D
channels. Blocks take and return plain tensors, so that each can be compiled, checkpointed and sharded separately.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_THETA = 10000.0


class Linear(nn.Linear):
    """`nn.Linear` without initialisation: `TinyFluxDeep.init_weights` does it."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich, 2019, arXiv:1910.07467), optionally then * (1 + scale) + shift."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if scale is None:
            return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)
        # fold the weight into the [B, 1, C] scale, which saves one pass over the tokens
        return torch.addcmul(shift, F.rms_norm(x, self.weight.shape, None, 1e-6), self.weight * (1 + scale))


class AdaNorm(nn.Module):
    """Adaptive norm (AdaLN-zero of Peebles and Xie, 2022, arXiv:2212.09748); `chunks` counts shift, scale, gate, ..."""

    def __init__(self, dim: int, chunks: int):
        super().__init__()
        self.chunks = chunks
        self.linear = Linear(dim, chunks * dim)
        self.norm = RMSNorm(dim)

    def forward(self, x: Tensor, vec: Tensor) -> tuple[Tensor, ...]:
        """The modulated x, then the remaining [B, 1, C] chunks. `vec` [B, C] is the condition after SiLU."""
        shift, scale, *rest = self.linear(vec).unsqueeze(1).chunk(self.chunks, dim=-1)
        return self.norm(x, scale, shift), *rest


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def rope_frequencies(dim: int, device: torch.device | str = "cpu") -> Tensor:
    """theta^(-2j/dim) for j in [0, dim/2), float32 [dim/2]."""
    return 1.0 / ROPE_THETA ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def rope_table(ids: Tensor, axes_dims: tuple[int, ...], text_tokens: int) -> Tensor:
    """Cosines and sines of the joined tokens, float32 [2, 1 or B, T, 1, 1, D/2] (Su et al., 2021, arXiv:2104.09864).

    `ids` [1 or B, N, axes] are the image tokens' positions. Text is at position zero and not rotated.
    """
    angles = [ids[..., i, None].float() * rope_frequencies(d, ids.device) for i, d in enumerate(axes_dims)]
    angles = F.pad(torch.cat(angles, dim=-1), (0, 0, text_tokens, 0))  # [1 or B, T, D/2]
    return torch.stack([angles.cos(), angles.sin()])[:, :, :, None, None]


def resize_map(spatial: Tensor, ids: Tensor) -> Tensor:
    """Bilinear values (align_corners False) of a map [B, s, s] at the image tokens, float32 [B, N].

    `ids` [1 or B, N, 3] have row and column at indices 1 and 2; the grid size is their maximum plus one. It stays a
    tensor, because reading it would make the host wait for the device in every forward.
    """
    size = spatial.shape[-1]
    yx = ids[..., 1:].float()
    at = ((yx + 0.5) * (size / (yx.amax(dim=-2, keepdim=True) + 1)) - 0.5).clamp(0, size - 1)  # [1 or B, N, 2]
    knots = torch.arange(size, dtype=torch.float32, device=ids.device)
    wy, wx = (1 - (at[..., None] - knots).abs()).clamp(min=0).unbind(dim=-2)  # hat functions, [1 or B, N, s]
    return ((wy @ spatial.float()) * wx).sum(dim=-1)


class SpatialModulation(nn.Module):
    """exp(clamp(conv1x1(map), -2, 2)): a factor per image token and head for queries and keys."""

    def __init__(self, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, 1, 1, 1))
        self.bias = nn.Parameter(torch.empty(heads))

    def forward(self, spatial: Tensor, text_tokens: int) -> Tensor:
        """Factors of the joined tokens, [B, T, H], 1 for text. `spatial` [B, N] is the map resized to the grid."""
        logits = spatial[..., None] * self.weight.float().flatten() + self.bias.float()
        return F.pad(logits.clamp(-2, 2), (0, 0, text_tokens, 0)).exp()


class Attention(nn.Module):
    """Base class of both attentions: rotary, temperature and modulation are folded into q and k, then one call."""

    def __init__(self, heads: int, head_dim: int, modulated: bool):
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.spatial_to_mod = SpatialModulation(heads) if modulated else None

    def attend(self, qkv: Tensor, rope: Tensor, temper: Tensor | None, spatial: Tensor | None) -> Tensor:
        """Attention of the joined tokens, [B, T, 3*C] -> [B, T, C].

        temper [B, T]: factor of each query, 1 / temperature. spatial [B, N]. Both None when the Sol head is off.
        """
        qkv = qkv.unflatten(-1, (3, self.heads, self.head_dim))  # [B, T, 3, H, D]
        qk, v = qkv.split([2, 1], dim=2)  # not slices: each slice would allocate a full gradient
        v = v.squeeze(2)
        cos, sin = rope.unbind(0)
        even, odd = qk.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, T, 2, H, D/2]
        qk = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
        if spatial is not None:
            mod = self.spatial_to_mod(spatial, rope.shape[2] - spatial.shape[1])  # [B, T, H]
            qk = qk * torch.stack([mod * temper[..., None], mod], dim=2)[..., None]
        q, k = qk.to(v.dtype).unbind(2)
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return x.transpose(1, 2).flatten(2)


class JointAttention(Attention):
    """Attention over both streams, each with its own projections."""

    def __init__(self, heads: int, head_dim: int, modulated: bool):
        super().__init__(heads, head_dim, modulated)
        dim = heads * head_dim
        self.txt_qkv = Linear(dim, 3 * dim, bias=False)
        self.img_qkv = Linear(dim, 3 * dim, bias=False)
        self.txt_out = Linear(dim, dim, bias=False)
        self.img_out = Linear(dim, dim, bias=False)

    def forward(self, txt: Tensor, img: Tensor, rope: Tensor, temper: Tensor | None, spatial: Tensor | None):
        qkv = torch.cat([self.txt_qkv(txt), self.img_qkv(img)], dim=1)
        txt, img = self.attend(qkv, rope, temper, spatial).split([txt.shape[1], img.shape[1]], dim=1)
        return self.txt_out(txt), self.img_out(img)


class SelfAttention(Attention):
    """Attention over the joined stream."""

    def __init__(self, heads: int, head_dim: int, modulated: bool):
        super().__init__(heads, head_dim, modulated)
        dim = heads * head_dim
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.out_proj = Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor, temper: Tensor | None, spatial: Tensor | None) -> Tensor:
        return self.out_proj(self.attend(self.qkv(x), rope, temper, spatial))


class DoubleBlock(nn.Module):
    """Text and image streams with separate weights and joint attention."""

    def __init__(self, heads: int, head_dim: int, mlp_dim: int, modulated: bool):
        super().__init__()
        dim = heads * head_dim
        self.img_norm1 = AdaNorm(dim, 6)
        self.txt_norm1 = AdaNorm(dim, 6)
        self.attn = JointAttention(heads, head_dim, modulated)
        self.img_norm2 = RMSNorm(dim)
        self.txt_norm2 = RMSNorm(dim)
        self.img_mlp = MLP(dim, mlp_dim)
        self.txt_mlp = MLP(dim, mlp_dim)

    def forward(
        self, txt: Tensor, img: Tensor, vec: Tensor, rope: Tensor, temper: Tensor | None, spatial: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """txt [B, L, C], img [B, N, C], vec [B, C] after SiLU, rope, temper and spatial as in `Attention.attend`."""
        txt_y, txt_gate1, txt_shift, txt_scale, txt_gate2 = self.txt_norm1(txt, vec)
        img_y, img_gate1, img_shift, img_scale, img_gate2 = self.img_norm1(img, vec)
        txt_y, img_y = self.attn(txt_y, img_y, rope, temper, spatial)
        txt = torch.addcmul(txt, txt_gate1, txt_y)
        img = torch.addcmul(img, img_gate1, img_y)
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(self.txt_norm2(txt, txt_scale, txt_shift)))
        img = torch.addcmul(img, img_gate2, self.img_mlp(self.img_norm2(img, img_scale, img_shift)))
        return txt, img


class SingleBlock(nn.Module):
    """One stream of all tokens."""

    def __init__(self, heads: int, head_dim: int, mlp_dim: int, modulated: bool):
        super().__init__()
        dim = heads * head_dim
        self.norm = AdaNorm(dim, 3)
        self.attn = SelfAttention(heads, head_dim, modulated)
        self.norm2 = RMSNorm(dim)
        self.mlp = MLP(dim, mlp_dim)

    def forward(self, x: Tensor, vec: Tensor, rope: Tensor, temper: Tensor | None, spatial: Tensor | None) -> Tensor:
        """x [B, T, C], the rest as in `DoubleBlock`."""
        y, gate = self.norm(x, vec)
        x = torch.addcmul(x, gate, self.attn(y, rope, temper, spatial))
        return x + self.mlp(self.norm2(x))
