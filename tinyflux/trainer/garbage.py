"""Garbage collection at fixed steps: a collection that one rank starts on its own makes all others wait."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

YOUNG, ALL = 50, 5000  # steps between collections of young objects and of all


@contextmanager
def collected_by_steps() -> Iterator[Callable[[int], None]]:
    """Turn automatic collections off for a `with` block. Yields a function to call after each step."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # objects that exist now stay: collections need not visit them
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
