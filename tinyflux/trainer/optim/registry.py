"""The optimizers by name. To add one: a file beside this with a function `build`, and a line in OPTIMIZERS.

`build(model, config)` returns a `torch.optim.Optimizer` of the parameters that are trained, which may be DTensors. Its
state must exist before the first step, since checkpoints are loaded into those tensors (`adamw.py` shows how). Two
hooks are optional: `plain_state(parameter)`, the tensors to save of a state that is not plain tensors, and
`skips_on_device = True` in the class itself, for a kernel that reads `found_inf` and leaves the weights alone.
"""

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
