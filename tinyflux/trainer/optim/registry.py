"""The optimizers by name. To add one: a file beside this with a function `build`, and a line in OPTIMIZERS."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """module: the file beside this; its `build(model, config)` gives the optimizer. state_bytes: of a trained
    parameter; rows, columns and scales are not counted. extra: of the distribution, with what it needs."""

    module: str
    state_bytes: int
    extra: str | None = None


OPTIMIZERS = {
    "adamw": Entry("adamw", 8),
    "adamw8bit": Entry("adamw8bit", 2, extra="8bit"),
    "adafactor": Entry("adafactor", 0),
    "muon": Entry("muon", 4),  # 8 of the few parameters outside the blocks
}
