"""The objective: the losses of a batch, computed with the network and the terms."""

from torch import Tensor, nn

from tinyflux.trainer.batches import Batch
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.sampling import to_tokens
from tinyflux.trainer.terms import TERMS, Prediction
from tinyflux.util import rng
from tinyflux.util.predictions import flow_velocity, flow_x_t


class Objective:
    """The losses of a batch on the model's device, for the enabled terms that the network has heads for."""

    def __init__(self, model: nn.Module, config: TrainerConfig):
        self.model, self.config = model, config
        self.terms = {term.name: term for term in TERMS if term.learnt(config, model.config)}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of a call's results, in order: `loss`, then the terms."""
        return ("loss", *self.terms)

    def weights(self, step: int) -> dict[str, float]:
        """Each term's factor in the total loss of a step."""
        return {name: term.weight(self.config, step) for name, term in self.terms.items()}

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The per-sample training losses of a step, float32 [B]: `loss`, the weighted sum, and each term.

        Keyed by the samples' seeds: the noise, which samples use the network's own predictions instead of the
        teachers' features (always if they have none), and the Lune head's dropout.
        """
        seeds, model, inputs = batch["sample_seeds"], self.model.config, {}
        for name, term in self.terms.items():
            if term.head:
                seen = rng.uniform(seeds, f"{name}_dropout") >= term.dropout(self.config)
                inputs[f"{name}_teacher"] = seen & batch.get(f"{term.group}_mask", True)
                inputs.update({field: batch[field] for field in term.fields})
        if model.use_lune_expert:
            kept = rng.uniform(seeds, "lune_head", (model.lune_hidden_dim,)) >= model.lune_dropout
            inputs["lune_dropout_mask"] = kept / (1 - model.lune_dropout)
        return self._losses(batch, inputs, step)

    def validate(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The same losses as in sampling: no teacher features, no dropout."""
        return self._losses(batch, {}, step)

    def _losses(self, batch: Batch, inputs: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        latents, t = batch["latents"].float(), batch["t"]
        height, width = latents.shape[2:]
        data = to_tokens(latents)  # [B, N, C]
        noise = to_tokens(rng.normal(batch["sample_seeds"], "noise", latents.shape[1:]))
        velocity, info = self.model(
            flow_x_t(data, noise, t),
            batch["t5_embeds"],
            batch["clip_pooled"],
            t,
            self.model.create_img_ids(1, height, width, latents.device)[0],
            return_expert_pred=True,
            grid=(height, width),
            **inputs,
        )
        prediction = Prediction(velocity, flow_velocity(data, noise), info, batch, (height, width))
        found = {}
        for name, term in self.terms.items():
            loss = term.loss(prediction, self.config)
            found[name] = loss * batch.get(f"{term.group}_mask", 1) if term.group else loss
        weights = self.weights(step)
        return {"loss": sum(weights[name] * loss for name, loss in found.items()), **found}
