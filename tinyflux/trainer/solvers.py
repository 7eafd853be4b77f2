"""Solvers of the sampling ODE dx/dt = v(x, t), from t=0 (noise) to t=1 (data): one function each.

A solver takes velocity(x, t), the noise x, the timesteps in order, and on_step(x, t), which is called after each step
and returns the x to continue with. To add a solver, write its function and add its line to `SOLVERS`.
This module does not import torch, because the commands' --help lists the names.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Velocity = Callable[[Tensor, float], Tensor]
    OnStep = Callable[[Tensor, float], Tensor]


def euler(velocity: "Velocity", x: "Tensor", times: list[float], on_step: "OnStep") -> "Tensor":
    """First order, one call a step (rectified flow: Liu et al., 2022, arXiv:2209.03003)."""
    for now, after in pairwise(times):
        x = on_step(x + velocity(x, now) * (after - now), after)
    return x


def heun(velocity: "Velocity", x: "Tensor", times: list[float], on_step: "OnStep") -> "Tensor":
    """Second order, two calls a step (Karras et al., 2022, arXiv:2206.00364, Algorithm 1)."""
    for now, after in pairwise(times):
        v = velocity(x, now)
        v = (v + velocity(x + v * (after - now), after)) / 2
        x = on_step(x + v * (after - now), after)
    return x


def midpoint(velocity: "Velocity", x: "Tensor", times: list[float], on_step: "OnStep") -> "Tensor":
    """Second order, two calls a step (DPM-Solver-2's choice of the inner point: Lu et al., 2022, arXiv:2206.00927)."""
    for now, after in pairwise(times):
        middle = (now + after) / 2
        v = velocity(x + velocity(x, now) * (middle - now), middle)
        x = on_step(x + v * (after - now), after)
    return x


def ab2(velocity: "Velocity", x: "Tensor", times: list[float], on_step: "OnStep") -> "Tensor":
    """Second order, one call a step: Adams-Bashforth on uneven steps, from the velocities of this step and the last
    (linear multistep sampling: Liu et al., 2022, arXiv:2202.09778). The first step is Euler's."""
    before, last = 0.0, None
    for now, after in pairwise(times):
        v = velocity(x, now)
        change = 0.0 if last is None else (v - last) * ((after - now) / (2 * (now - before)))
        x = on_step(x + (v + change) * (after - now), after)
        before, last = now, v
    return x


SOLVERS = {"euler": euler, "heun": heun, "midpoint": midpoint, "ab2": ab2}
