"""What goes through a build: shards to be made, their inputs, and inputs that are read."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from tinyflux.precache.images import Picture


class Ready(NamedTuple):
    """An input that is read: what models take of it, and what of it is known already."""

    index: int
    origin: str
    seed: int = 0
    """Its key for everything random, signed 64-bit."""
    prompts: Sequence[str] = ()
    picture: Picture | None = None
    tensors: Mapping[str, Tensor] = MappingProxyType({})
    meta: Mapping = MappingProxyType({})
    """What its .json has, where it is a sample already."""
    content: str | None = None
    """A hash of image and captions, as they were read."""


class Task(NamedTuple):
    """An input of a shard. `read`, called in a thread, gives it ready to be encoded or raises Rejected."""

    index: int
    origin: str
    read: Callable[[], Ready]


class Work(NamedTuple):
    """A shard to be made."""

    number: int
    tasks: Sequence[Task]
    shape: tuple[int, int] | None = None
    """(h, w) of its latents, None where the tensors tell."""
