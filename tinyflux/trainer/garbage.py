"""Garbage collection by the clock of steps: a collection that one rank starts on its own makes all others wait."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

YOUNG, ALL = 50, 5000  # steps between collections of young objects and of all


@contextmanager
def collected_by_steps() -> Iterator[Callable[[int], None]]:
    """No automatic collections for the length of a `with` block; it gives a function to call after each step."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is there now stays: it need not be looked through again
    gc.disable()

    def after(step: int) -> None:
        if step % YOUNG == 0:
            gc.collect(2 if step % ALL == 0 else 1)

    try:
        yield after
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
