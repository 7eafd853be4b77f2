"""TinyFlux-Deep written the obvious way, with the published parameter names: the reference for the network's values and
speed. It shares no code with the package; `config` is any object with TinyFluxConfig's fields.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def softmax_attention(q, k, v):
    """Attention spelled out, [B, H, T, D]."""
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
    return weights @ v


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        y = y / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y.to(x.dtype) * self.weight


class AdaNorm(nn.Module):
    def __init__(self, dim, chunks):
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(dim, chunks * dim)
        self.norm = RMSNorm(dim)

    def forward(self, x, vec):
        shift, scale, *rest = self.linear(F.silu(vec))[:, None].chunk(self.chunks, dim=-1)
        return self.norm(x) * (1 + scale) + shift, *rest


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Rope(nn.Module):
    def __init__(self, axes_dims):
        super().__init__()
        for i, dim in enumerate(axes_dims):
            self.register_buffer(f"freqs_{i}", 1.0 / 10000.0 ** (torch.arange(0, dim, 2).float() / dim))

    def forward(self, ids):
        """ids [N, 3] -> angles [N, D/2]."""
        return torch.cat([ids[:, i, None].float() * getattr(self, f"freqs_{i}") for i in range(3)], dim=-1)


def rotate(x, angles):
    """x [B, H, N, D], angles [N, D/2]."""
    x0, x1 = x.float()[..., 0::2], x.float()[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    out = torch.stack([x0 * cos - x1 * sin, x1 * cos + x0 * sin], dim=-1)
    return out.flatten(-2).to(x.dtype)


def modulation(spatial_to_mod, spatial, grid):
    """Factor for queries and keys of the image tokens, [B, H, N, 1]."""
    resized = F.interpolate(spatial[:, None], size=grid, mode="bilinear", align_corners=False)
    resized = resized.to(spatial_to_mod.weight.dtype)
    return spatial_to_mod(resized).clamp(-2, 2).exp().flatten(2)[..., None]


def heads_of(qkv, heads):
    """[B, T, 3*C] -> q, k, v of [B, H, T, D]."""
    B, T, _ = qkv.shape
    return qkv.view(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)


def merge(x):
    B, H, T, D = x.shape
    return x.transpose(1, 2).reshape(B, T, H * D)


class JointAttention(nn.Module):
    def __init__(self, dim, heads, modulated, attention):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.txt_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.img_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.txt_out = nn.Linear(dim, dim, bias=False)
        self.img_out = nn.Linear(dim, dim, bias=False)
        if modulated:
            self.spatial_to_mod = nn.Conv2d(1, heads, 1)

    def forward(self, txt, img, angles, tau, spatial, grid):
        txt_q, txt_k, txt_v = heads_of(self.txt_qkv(txt), self.heads)
        img_q, img_k, img_v = heads_of(self.img_qkv(img), self.heads)
        img_q, img_k = rotate(img_q, angles), rotate(img_k, angles)
        if tau is not None:
            mod = modulation(self.spatial_to_mod, spatial, grid)
            img_q, img_k = img_q * mod, img_k * mod
            img_q = img_q / tau.view(-1, 1, 1, 1).to(img_q.dtype)
        k, v = torch.cat([txt_k, img_k], dim=2), torch.cat([txt_v, img_v], dim=2)
        txt, img = self.attention(txt_q, k, v), self.attention(img_q, k, v)
        return self.txt_out(merge(txt)), self.img_out(merge(img))


class SelfAttention(nn.Module):
    def __init__(self, dim, heads, modulated, attention):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        if modulated:
            self.spatial_to_mod = nn.Conv2d(1, heads, 1)

    def forward(self, x, angles, tau, spatial, grid):
        q, k, v = heads_of(self.qkv(x), self.heads)
        text = x.shape[1] - angles.shape[0]
        angles = torch.cat([angles.new_zeros(text, angles.shape[1]), angles])
        q, k = rotate(q, angles), rotate(k, angles)
        if tau is not None:
            mod = modulation(self.spatial_to_mod, spatial, grid)
            mod = torch.cat([mod.new_ones(*mod.shape[:2], text, 1), mod], dim=2)
            q, k = q * mod, k * mod
            q = q / tau.view(-1, 1, 1, 1).to(q.dtype)
        return self.out_proj(merge(self.attention(q, k, v)))


class DoubleBlock(nn.Module):
    def __init__(self, dim, heads, mlp_dim, modulated, attention):
        super().__init__()
        self.img_norm1, self.txt_norm1 = AdaNorm(dim, 6), AdaNorm(dim, 6)
        self.attn = JointAttention(dim, heads, modulated, attention)
        self.img_norm2, self.txt_norm2 = RMSNorm(dim), RMSNorm(dim)
        self.img_mlp, self.txt_mlp = MLP(dim, mlp_dim), MLP(dim, mlp_dim)

    def forward(self, txt, img, vec, angles, tau, spatial, grid):
        img_y, img_gate, img_shift2, img_scale2, img_gate2 = self.img_norm1(img, vec)
        txt_y, txt_gate, txt_shift2, txt_scale2, txt_gate2 = self.txt_norm1(txt, vec)
        txt_y, img_y = self.attn(txt_y, img_y, angles, tau, spatial, grid)
        txt, img = txt + txt_gate * txt_y, img + img_gate * img_y
        txt = txt + txt_gate2 * self.txt_mlp(self.txt_norm2(txt) * (1 + txt_scale2) + txt_shift2)
        img = img + img_gate2 * self.img_mlp(self.img_norm2(img) * (1 + img_scale2) + img_shift2)
        return txt, img


class SingleBlock(nn.Module):
    def __init__(self, dim, heads, mlp_dim, modulated, attention):
        super().__init__()
        self.norm = AdaNorm(dim, 3)
        self.attn = SelfAttention(dim, heads, modulated, attention)
        self.norm2 = RMSNorm(dim)
        self.mlp = MLP(dim, mlp_dim)

    def forward(self, txt, img, vec, angles, tau, spatial, grid):
        x = torch.cat([txt, img], dim=1)
        y, gate = self.norm(x, vec)
        x = x + gate * self.attn(y, angles, tau, spatial, grid)
        x = x + self.mlp(self.norm2(x))
        return x[:, : txt.shape[1]], x[:, txt.shape[1] :]


class TimeIn(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device).float() / 127)
        angles = t[:, None] * freqs
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.mlp[0].weight.dtype))


class Lune(nn.Module):
    def __init__(self, c):
        super().__init__()
        H = c.lune_hidden_dim
        self.expert_gate = nn.Parameter(torch.zeros(()))
        self.input_proj = nn.Linear(c.hidden_size + c.pooled_projection_dim, H)
        self.predictor = nn.Sequential(
            nn.SiLU(), nn.Linear(H, H), nn.SiLU(), nn.Dropout(c.lune_dropout), nn.Linear(H, H), nn.SiLU(),
            nn.Linear(H, c.lune_expert_dim),
        )  # fmt: skip
        self.output_proj = nn.Sequential(nn.LayerNorm(c.lune_expert_dim), nn.Linear(c.lune_expert_dim, c.hidden_size))


class Sol(nn.Module):
    def __init__(self, c):
        super().__init__()
        H, given, points = c.sol_hidden_dim, c.hidden_size + c.pooled_projection_dim, c.sol_spatial_size**2
        heads = c.num_attention_heads
        self.blend_gate = nn.Parameter(torch.zeros(()))
        self.stat_predictor = nn.Sequential(nn.Linear(given, H), nn.SiLU(), nn.Linear(H, H), nn.SiLU(), nn.Linear(H, 3))
        self.spatial_predictor = nn.Sequential(
            nn.Linear(given, H), nn.SiLU(), nn.Linear(H, H), nn.SiLU(), nn.Linear(H, points), nn.Sigmoid()
        )
        self.stat_to_temperature = nn.Sequential(
            nn.Linear(3, H // 2), nn.SiLU(), nn.Linear(H // 2, heads), nn.Softplus()
        )
        self.spatial_to_qk_scale = nn.Linear(1, heads)  # used by nothing

    def priors(self, t, heads, size):
        temperature = (1 + t[:, None] + torch.linspace(-0.2, 0.2, heads, device=t.device)).clamp(0.5, 3.0)
        y, x = torch.meshgrid(*[torch.linspace(-1, 1, size, device=t.device)] * 2, indexing="ij")
        centre = torch.exp(-2 * torch.sqrt(x**2 + y**2))
        t = t[:, None, None]
        return temperature, t * torch.ones_like(centre) + (1 - t) * centre


def take(teacher, predicted, use_teacher):
    if teacher is None:
        return predicted
    rows = [teacher[b] if use_teacher is None or use_teacher[b] else predicted[b] for b in range(len(predicted))]
    return torch.stack([row.to(predicted.dtype) for row in rows])


class ReferenceTinyFlux(nn.Module):
    """`attention` computes [B, H, T, D]: spelled out, or `F.scaled_dot_product_attention`."""

    def __init__(self, config, attention=softmax_attention):
        super().__init__()
        self.config = c = config
        dim = c.hidden_size
        self.img_in = nn.Linear(c.in_channels, dim)
        self.txt_in = nn.Linear(c.joint_attention_dim, dim)
        self.time_in = TimeIn(dim)
        self.vector_in = nn.Sequential(nn.SiLU(), nn.Linear(c.pooled_projection_dim, dim))
        if c.use_t5_vec:
            self.t5_pool = nn.Sequential(nn.Linear(c.joint_attention_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
            self.text_balance = nn.Parameter(torch.zeros(()))
        if c.use_lune_expert:
            self.lune_predictor = Lune(c)
        if c.use_sol_prior:
            self.sol_prior = Sol(c)
        self.rope = Rope(c.axes_dims_rope)
        block = (dim, c.num_attention_heads, int(dim * c.mlp_ratio), c.use_sol_prior, attention)
        self.double_blocks = nn.ModuleList([DoubleBlock(*block) for _ in range(c.num_double_layers)])
        self.single_blocks = nn.ModuleList([SingleBlock(*block) for _ in range(c.num_single_layers)])
        self.final_norm = RMSNorm(dim)
        self.final_linear = nn.Linear(dim, c.in_channels)

    def forward(
        self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, lune_features=None,
        sol_stats=None, sol_spatial=None, lune_teacher=None, sol_teacher=None, lune_dropout_mask=None,
    ):  # fmt: skip
        """The same arguments as TinyFluxDeep.forward, t [B] and img_ids [N, 3]; gives (velocity, info)."""
        c, t, info = self.config, timestep.float(), {}
        dtype = self.img_in.weight.dtype
        t5, clip = encoder_hidden_states.to(dtype), pooled_projections.to(dtype)
        img, txt = self.img_in(hidden_states.to(dtype)), self.txt_in(t5)
        time = self.time_in(t)
        text = self.vector_in(clip)
        if c.use_t5_vec:
            weights = torch.softmax(encoder_hidden_states.float().mean(dim=-1), dim=1)
            t5_vec = self.t5_pool((weights[..., None] * encoder_hidden_states.float()).sum(dim=1).to(dtype))
            g = torch.sigmoid(self.text_balance)
            text = g * text + (1 - g) * t5_vec
        vec = time + text
        given = torch.cat([time, clip], dim=-1)

        if c.use_lune_expert:
            lune = self.lune_predictor
            x = lune.predictor[:3](lune.input_proj(given))
            x = lune.predictor[3](x) if lune_dropout_mask is None else x * lune_dropout_mask
            info["lune_pred"] = pred = lune.predictor[4:](x)
            features = take(lune_features, pred, lune_teacher)
            vec = vec + torch.sigmoid(lune.expert_gate) * lune.output_proj(features)

        tau = spatial = None
        if c.use_sol_prior:
            sol = self.sol_prior
            stats = sol.stat_predictor(given)
            spatial = sol.spatial_predictor(given).view(-1, c.sol_spatial_size, c.sol_spatial_size)
            info["sol_stats_pred"], info["sol_spatial_pred"] = stats, spatial
            geometric_temperature, geometric_spatial = sol.priors(t, c.num_attention_heads, c.sol_spatial_size)
            learned = sol.stat_to_temperature(take(sol_stats, stats, sol_teacher))
            b = torch.sigmoid(sol.blend_gate)
            temperature = b * geometric_temperature + (1 - b) * learned
            spatial = b * geometric_spatial + (1 - b) * take(sol_spatial, spatial, sol_teacher)
            tau = temperature.mean(dim=1).clamp(min=0.1)

        grid = (int(img_ids[:, 1].max()) + 1, int(img_ids[:, 2].max()) + 1)
        angles = self.rope(img_ids)
        for block in self.double_blocks:
            txt, img = block(txt, img, vec, angles, tau, spatial, grid)
        for block in self.single_blocks:
            txt, img = block(txt, img, vec, angles, tau, spatial, grid)
        return self.final_linear(self.final_norm(img)), info
