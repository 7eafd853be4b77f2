"""TinyFlux-Deep: a rectified-flow transformer that predicts v = data - noise, with two distilled heads.

Everything is in the dtype of the weights except the timestep, positions, rotary table, spatial map and temperature,
which stay in float32. Under FSDP2 with low-precision parameters use `MixedPrecisionPolicy(cast_forward_inputs=False)`:
the default would round these, and the forward does the necessary casts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.experts import LunePredictor, SolPrior
from tinyflux.model.layers import DoubleBlock, Linear, RMSNorm, SingleBlock, resize_map, rope_table

TIME_FREQUENCIES = 128


class TimestepEmbedder(nn.Module):
    """Sinusoids of t in [0, 1], then an MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(Linear(2 * TIME_FREQUENCIES, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """t float32 [B] -> [B, C]."""
        i = torch.arange(TIME_FREQUENCIES, dtype=torch.float32, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10000) / (TIME_FREQUENCIES - 1) * i)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.mlp[0].weight.dtype))


class TinyFluxDeep(nn.Module):
    """The network. If it is built under `torch.device("meta")`, call `to_empty` and `init_weights` for its values.

    heads: heads for training only, by name; each reads the image tokens after block number `block`, counting first
    double blocks, then single blocks.
    """

    def __init__(self, config: TinyFluxConfig | None = None, heads: dict[str, nn.Module] | None = None):
        super().__init__()
        self.config = cfg = config or TinyFluxConfig()
        C, pooled = cfg.hidden_size, cfg.pooled_projection_dim
        self.img_in = Linear(cfg.in_channels, C)
        self.txt_in = Linear(cfg.joint_attention_dim, C)
        self.time_in = TimestepEmbedder(C)
        self.vector_in = nn.Sequential(nn.SiLU(), Linear(pooled, C))
        self.t5_pool = self.lune_predictor = self.sol_prior = None
        if cfg.use_t5_vec:
            self.t5_pool = nn.Sequential(Linear(cfg.joint_attention_dim, C), nn.SiLU(), Linear(C, C))
            self.text_balance = nn.Parameter(torch.empty(1))
        if cfg.use_lune_expert:
            self.lune_predictor = LunePredictor(C, pooled, cfg.lune_hidden_dim, cfg.lune_expert_dim, cfg.lune_dropout)
            self.lune_predictor.requires_grad_(not cfg.freeze_lune)
        if cfg.use_sol_prior:
            self.sol_prior = SolPrior(
                C, pooled, cfg.sol_hidden_dim, cfg.num_attention_heads, cfg.sol_spatial_size, cfg.sol_geometric_weight
            )
            self.sol_prior.requires_grad_(not cfg.freeze_sol)
        block = (cfg.num_attention_heads, cfg.attention_head_dim, cfg.mlp_dim, cfg.use_sol_prior)
        self.double_blocks = nn.ModuleList(DoubleBlock(*block) for _ in range(cfg.num_double_layers))
        self.single_blocks = nn.ModuleList(SingleBlock(*block) for _ in range(cfg.num_single_layers))
        self.final_norm = RMSNorm(C)
        self.final_linear = Linear(C, cfg.in_channels)
        self.heads = nn.ModuleDict(heads)  # last, so that they do not change the initialisation of the others
        if not self.img_in.weight.is_meta:
            self.init_weights()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor | float,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        lune_features: Tensor | None = None,
        sol_stats: Tensor | None = None,
        sol_spatial: Tensor | None = None,
        return_expert_pred: bool = False,
        *,
        lune_teacher: Tensor | None = None,
        sol_teacher: Tensor | None = None,
        lune_dropout_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor | tuple[Tensor, dict]:
        """Velocity [B, N, 16] at the noisy latents `hidden_states` [B, N, 16], or (velocity, info).

        encoder_hidden_states [B, L, 768] (T5), pooled_projections [B, 768] (CLIP), timestep [B] or a scalar, 0 = noise.
        img_ids [N, 3] or [B, N, 3] from `create_img_ids`, None = a square grid. txt_ids is not used: text has no
        position. lune_features [B, 1280], sol_stats [B, 3], sol_spatial [B, 8, 8]: the teachers' values, used where
        lune_teacher and sol_teacher (bool [B], None = all) are true; elsewhere the heads' predictions are used.
        lune_dropout_mask [B, lune_hidden_dim], scaled by 1 / (1 - p), replaces the Lune head's dropout.
        grid: height and width in tokens, for heads for training only.
        info: `lune` {expert_pred}, `sol` {pred_stats, pred_spatial}, None if the head is off; the same as lune_pred,
        sol_stats_pred, sol_spatial_pred; and NAME_pred of each head for training only.
        """
        B, N, _ = hidden_states.shape
        L, dtype = encoder_hidden_states.shape[1], self.img_in.weight.dtype
        ids = image_positions(img_ids, N, hidden_states.device)
        t = torch.as_tensor(timestep, dtype=torch.float32, device=hidden_states.device).expand(B)
        pooled = pooled_projections.to(dtype)
        img = self.img_in(hidden_states.to(dtype))  # [B, N, C]
        txt = self.txt_in(encoder_hidden_states.to(dtype))  # [B, L, C]

        time = self.time_in(t)
        text = self.vector_in(pooled)
        if self.t5_pool is not None:
            g = self.text_balance.sigmoid()
            text = g * text + (1 - g) * self.t5_pool(pool_tokens(encoder_hidden_states).to(dtype))
        vec = time + text
        info = {"lune": None, "sol": None}
        if self.lune_predictor is not None:
            signal, features = self.lune_predictor(time, pooled, lune_features, lune_teacher, lune_dropout_mask)
            vec = vec + signal
            info |= {"lune": {"expert_pred": features}, "lune_pred": features}
        double_temper = single_temper = spatial = None
        if self.sol_prior is not None:
            temperature, spatial, stats, maps = self.sol_prior(t, time, pooled, sol_stats, sol_spatial, sol_teacher)
            single_temper = (1 / temperature.mean(dim=-1).clamp(min=0.1))[:, None].expand(B, L + N)
            double_temper = F.pad(single_temper[:, L:], (L, 0), value=1.0)  # text queries keep the plain scale
            spatial = resize_map(spatial, ids)  # [B, N]
            info["sol"] = {"pred_stats": stats, "pred_spatial": maps}
            info |= {"sol_stats_pred": stats, "sol_spatial_pred": maps}

        vec = F.silu(vec)
        rope = rope_table(ids, self.config.axes_dims_rope, L)
        for place, block in enumerate(self.double_blocks):
            txt, img = block(txt, img, vec, rope, double_temper, spatial)
            info |= self._read(place, img, grid)
        x = torch.cat([txt, img], dim=1)  # [B, T, C]
        for place, block in enumerate(self.single_blocks, len(self.double_blocks)):
            x = block(x, vec, rope, single_temper, spatial)
            info |= self._read(place, x[:, L:], grid)
        v = self.final_linear(self.final_norm(x[:, L:])).clone()  # FSDP2 warns about views
        return (v, info) if return_expert_pred else v

    def _read(self, place: int, img: Tensor, grid: tuple[int, int] | None) -> dict[str, Tensor]:
        """Predictions of the heads for training only from the image tokens [B, N, C] after a block."""
        if grid is None:
            return {}
        return {f"{name}_pred": head(img, grid) for name, head in self.heads.items() if head.block == place}

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter: linear layers xavier-uniform, norms one, gates and zero-initialised layers apart.

        Values are drawn on the CPU in float32, so they depend only on the generator (None = torch's default), not on
        the device, dtype or sharding of the parameters.
        """
        zero = ("bias", "gate", "text_balance", "final_linear.weight", "spatial_to_mod.weight")
        for name, parameter in self.named_parameters():
            value = torch.zeros(parameter.shape)
            if name.endswith("blend_gate"):
                value.fill_(self.sol_prior.blend_logit())
            elif parameter.ndim == 1 and not name.endswith(zero):
                value.fill_(1)
            elif not name.endswith(zero):
                nn.init.xavier_uniform_(value, generator=generator)
            value = value.to(parameter.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)

    @staticmethod
    def create_img_ids(batch: int, h: int, w: int, device: torch.device | str = "cpu") -> Tensor:
        """Positions (0, row, column) of an h x w grid in row-major order, int64 [batch, h*w, 3]."""
        y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        return torch.stack([torch.zeros_like(y), y, x], dim=-1).view(-1, 3).expand(batch, -1, -1)

    def num_parameters(self, trainable_only: bool = False) -> int:
        """All parameters, or the trained ones. The published layout has 2 x heads more, unused ones (loader.py)."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)


def image_positions(img_ids: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """Positions [1 or B, N, 3]; one row if all samples share them. None = a square grid."""
    if img_ids is None:
        side = math.isqrt(tokens)
        if side**2 != tokens:
            raise ValueError(f"{tokens} image tokens are not a square grid: pass img_ids (see create_img_ids)")
        img_ids = TinyFluxDeep.create_img_ids(1, side, side, device)
    if img_ids.shape[-2:] != (tokens, 3):
        raise ValueError(f"img_ids must be [N, 3] or [B, N, 3] with N = {tokens}, not {list(img_ids.shape)}")
    if img_ids.ndim == 2:
        img_ids = img_ids[None]
    elif img_ids.stride(0) == 0:
        img_ids = img_ids[:1]  # an expanded batch
    return img_ids.to(device)


def pool_tokens(states: Tensor) -> Tensor:
    """[B, L, E] -> float32 [B, E]: weights are the softmax, over tokens, of the mean of their features."""
    states = states.float()
    return (states.mean(dim=-1).softmax(dim=-1)[:, None] @ states).squeeze(1)


def flops_per_sample(config: TinyFluxConfig, image_tokens: int, text_tokens: int) -> int:
    """Floating-point operations of one sample's forward: matrix products, 2 per multiply-add, and attention.

    Norms, activations and rotary are not counted, as usual for MFU. A training step takes 3 times this (4 times with
    full activation checkpointing, but MFU counts 3).
    """
    C, M, N, L = config.hidden_size, config.mlp_dim, image_tokens, text_tokens
    token = 4 * C * C + 2 * C * M  # qkv, out and MLP: the same for each token of either kind of block
    attention = 2 * (N + L) ** 2 * C  # q @ k and probabilities @ v, all heads
    double = (N + L) * token + attention + 12 * C * C  # AdaNorm of two streams
    single = (N + L) * token + attention + 3 * C * C
    ends = 2 * N * config.in_channels * C + L * config.joint_attention_dim * C
    vector = 2 * TIME_FREQUENCIES * C + C * C + config.pooled_projection_dim * C
    if config.use_t5_vec:
        vector += config.joint_attention_dim * C + C * C
    given = C + config.pooled_projection_dim
    if config.use_lune_expert:
        H, E = config.lune_hidden_dim, config.lune_expert_dim
        vector += given * H + 2 * H * H + H * E + E * C
    if config.use_sol_prior:
        H = config.sol_hidden_dim
        vector += 2 * (given * H + H * H) + H * (3 + config.sol_spatial_size**2)
        vector += (3 + config.num_attention_heads) * (H // 2)
    return 2 * (config.num_double_layers * double + config.num_single_layers * single + ends + vector)
