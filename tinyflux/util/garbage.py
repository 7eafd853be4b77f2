"""Garbage collection at fixed steps on all ranks: a collection on one rank makes all others wait."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

YOUNG, ALL = 50, 5000  # steps between collections of young objects and of all objects


@contextmanager
def collected_by_steps() -> Iterator[Callable[[int], None]]:
    """Turn automatic collections off for a `with` block. Yields a function to call after each step."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # exclude all existing objects from collections: they stay alive anyway
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
