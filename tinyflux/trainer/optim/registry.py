"""The optimizers by name. To add one: a file beside this with a function `build`, and a line in OPTIMIZERS."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """module: a file in this folder; its `build(model, config)` returns the optimizer. state_bytes: per trained
    parameter, without row, column and scale vectors. extra: the extra of the distribution that it needs."""

    module: str
    state_bytes: int
    extra: str | None = None


OPTIMIZERS = {
    "adamw": Entry("adamw", 8),
    "adamw8bit": Entry("adamw8bit", 2, extra="8bit"),
    "adafactor": Entry("adafactor", 0),
    "muon": Entry("muon", 4),  # 8 for the few parameters outside the blocks
}
