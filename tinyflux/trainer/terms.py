"""The losses of a run, one `Term` each. To add one: a term here and its settings in `TrainerConfig`.

The settings of an optional term NAME: enable_NAME, NAME_weight, NAME_warmup_steps and, if the network has a head for
it, NAME_dropout.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import Tensor, nn

from tinyflux.model.align import AlignHead, align_loss
from tinyflux.model.config import TinyFluxConfig
from tinyflux.trainer import losses
from tinyflux.trainer.batches import Batch
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.schedules import loss_warmup
from tinyflux.util.settings import require


@dataclass(frozen=True)
class Prediction:
    """The inputs of a loss: the network's velocity and its target [B, N, C], the network's other outputs, the batch,
    and the token grid (height, width)."""

    velocity: Tensor
    target: Tensor
    info: dict
    batch: Batch
    grid: tuple[int, int]


@dataclass(frozen=True)
class Term:
    """A per-sample loss, float32 [B].

    name: its name in metrics. optional: it has its own settings and can be turned off. group: the group of the shards
    that it needs. fields: fields of the batch -> the shards' field that each is read from. head: the model setting that
    adds the head for this loss; the network then also gets the teacher's values as input, except for samples drawn by
    `NAME_dropout`. training_head: makes a head that is used in training only, from the trainer settings, the model
    settings and the shapes of the shards' fields.
    """

    name: str
    loss: Callable[[Prediction, TrainerConfig], Tensor]
    optional: bool = True
    group: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    head: str | None = None
    training_head: Callable[[TrainerConfig, TinyFluxConfig, dict[str, tuple[int, ...]]], nn.Module] | None = None

    def enabled(self, config: TrainerConfig) -> bool:
        """Whether a run with these settings has this term."""
        return not self.optional or getattr(config, f"enable_{self.name}")

    def learnt(self, config: TrainerConfig, model: TinyFluxConfig) -> bool:
        """Whether it is enabled and this network has its head."""
        return self.enabled(config) and (self.head is None or getattr(model, self.head))

    def weight(self, config: TrainerConfig, step: int) -> float:
        """Its factor in the total loss at a step; steps count from 0."""
        if not self.optional:
            return 1.0
        return getattr(config, f"{self.name}_weight") * loss_warmup(step, getattr(config, f"{self.name}_warmup_steps"))

    def dropout(self, config: TrainerConfig) -> float:
        """Probability that the teacher's values of a sample are hidden from the network."""
        return getattr(config, f"{self.name}_dropout")


def main(p: Prediction, config: TrainerConfig) -> Tensor:
    """The velocity's squared error, with the configured weights."""
    t = p.batch["t"]
    return losses.compute_main_loss(
        p.velocity,
        p.target,
        p.batch["masks"],
        p.batch["sol_spatial"] if config.use_spatial_weighting else None,
        snr_weights=losses.min_snr_weight(t, config.snr_gamma, config.snr_form) if config.use_snr_weighting else None,
        use_huber=config.use_huber_loss,
        huber_delta=config.huber_delta,
        grid=p.grid,
        reduction="none",
    )


def lune(p: Prediction, config: TrainerConfig) -> Tensor:
    """Distance of the Lune head's features from the teacher's."""
    return losses.compute_lune_loss(
        p.info["lune_pred"], p.batch["lune_features"], config.lune_mode, config.huber_delta, reduction="none"
    )


def sol(p: Prediction, config: TrainerConfig) -> Tensor:
    """Squared error of the Sol head's statistics and map."""
    return losses.compute_sol_loss(
        p.info["sol_stats_pred"],
        p.info["sol_spatial_pred"],
        p.batch["sol_stats"],
        p.batch["sol_spatial"],
        reduction="none",
    )


def align(p: Prediction, config: TrainerConfig) -> Tensor:
    """1 - cosine between the align head's output and the teacher's grid."""
    return align_loss(p.info["align_pred"], p.batch["align_features"])


def align_head(config: TrainerConfig, model: TinyFluxConfig, shapes: dict[str, tuple[int, ...]]) -> AlignHead:
    """The head of `align`. Raises ValueError if the network has no such block."""
    place, blocks = config.align_block, model.num_double_layers + model.num_single_layers
    require(place < blocks, "trainer.align_block", place, f"less than the number of blocks, {blocks}")
    return AlignHead(model.hidden_size, place, shapes["align"])


TERMS = (
    Term("main", main, optional=False),
    Term("lune", lune, group="lune", fields={"lune_features": "lune"}, head="use_lune_expert"),
    Term(
        "sol",
        sol,
        group="sol",
        fields={"sol_stats": "sol_stats", "sol_spatial": "sol_spatial"},
        head="use_sol_prior",
    ),
    Term("align", align, group="align", fields={"align_features": "align"}, training_head=align_head),
)


def enabled(config: TrainerConfig) -> list[Term]:
    """The terms of a run, in order."""
    return [term for term in TERMS if term.enabled(config)]


def check_groups(config: TrainerConfig, groups: Collection[str]) -> None:
    """Raises ValueError if an enabled term needs a group that is not among these, the groups of a run's sources."""
    for term in enabled(config):
        if term.group and term.group not in groups:
            off = f"set trainer.enable_{term.name} = false, or " if term.optional else ""
            raise ValueError(
                f"the loss {term.name!r} needs the group {term.group!r}, which no source has: {off}add a source that"
                " has it, such as an overlay"
            )
