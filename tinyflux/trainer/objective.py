"""What is minimised: a batch, the network and the losses, put together."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinyflux.trainer import losses
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.sampling import to_tokens
from tinyflux.trainer.schedules import loss_warmup
from tinyflux.util import rng
from tinyflux.util.predictions import flow_velocity, flow_x_t


class Losses(NamedTuple):
    """Losses of each sample, float32 [B]: the weighted sum, and its parts before their weights."""

    total: Tensor
    main: Tensor
    lune: Tensor
    sol: Tensor


class Objective:
    """The losses of a batch as `StreamCollate` makes it, on the model's device.

    A teacher counts where it is enabled and the network has its head.
    """

    def __init__(self, model: nn.Module, config: TrainerConfig):
        self.model, self.config = model, config
        self.lune = config.enable_lune and model.config.use_lune_expert
        self.sol = config.enable_sol and model.config.use_sol_prior

    def __call__(self, batch: dict, step: int) -> Losses:
        """The training losses of a step.

        Draws keyed by the samples' seeds: the noise, which samples see their own predictions instead of the
        teachers' (always those that have none), and the Lune head's dropout.
        """
        c, seeds, inputs = self.config, batch["sample_seeds"], {}
        if self.lune:
            seen = rng.uniform(seeds, "lune_dropout") >= c.lune_dropout
            inputs["lune_teacher"] = seen & batch.get("lune_mask", True)
            inputs["lune_features"] = batch["lune_features"]
        if self.sol:
            seen = rng.uniform(seeds, "sol_dropout") >= c.sol_dropout
            inputs["sol_teacher"] = seen & batch.get("sol_mask", True)
            inputs |= {"sol_stats": batch["sol_stats"], "sol_spatial": batch["sol_spatial"]}
        if self.model.config.use_lune_expert:
            p = self.model.config.lune_dropout
            kept = rng.uniform(seeds, "lune_head", (self.model.config.lune_hidden_dim,)) >= p
            inputs["lune_dropout_mask"] = kept / (1 - p)
        return self._losses(batch, inputs, step)

    def validate(self, batch: dict, step: int) -> Losses:
        """The same losses of the network on its own, as it is when it samples: no teachers, no dropout."""
        return self._losses(batch, {}, step)

    def _losses(self, batch: dict, inputs: dict[str, Tensor], step: int) -> Losses:
        c, t = self.config, batch["t"]
        latents = batch["latents"].float()
        grid = tuple(latents.shape[2:])
        data = to_tokens(latents)  # [B, N, C]
        noise = to_tokens(rng.normal(batch["sample_seeds"], "noise", latents.shape[1:]))
        pred, info = self.model(
            flow_x_t(data, noise, t),
            batch["t5_embeds"],
            batch["clip_pooled"],
            t,
            self.model.create_img_ids(1, *grid, latents.device)[0],
            return_expert_pred=True,
            **inputs,
        )
        main = losses.compute_main_loss(
            pred,
            flow_velocity(data, noise),
            batch["masks"],
            batch["sol_spatial"] if c.use_spatial_weighting else None,
            snr_weights=losses.min_snr_weight(t, c.snr_gamma) if c.use_snr_weighting else None,
            use_huber=c.use_huber_loss,
            huber_delta=c.huber_delta,
            grid=grid,
            reduction="none",
        )
        lune = sol = torch.zeros_like(main)
        if self.lune:
            features = (info["lune_pred"], batch["lune_features"], c.lune_mode, c.huber_delta)
            lune = losses.compute_lune_loss(*features, reduction="none") * batch.get("lune_mask", 1)
        if self.sol:
            predicted = (info["sol_stats_pred"], info["sol_spatial_pred"], batch["sol_stats"], batch["sol_spatial"])
            sol = losses.compute_sol_loss(*predicted, reduction="none") * batch.get("sol_mask", 1)
        lune_weight = c.lune_weight * loss_warmup(step, c.lune_warmup_steps)
        sol_weight = c.sol_weight * loss_warmup(step, c.sol_warmup_steps)
        return Losses(main + lune_weight * lune + sol_weight * sol, main, lune, sol)
