"""The data passed through a build: shards to build, their inputs, and read inputs."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from tinyflux.precache.images import Picture


class Ready(NamedTuple):
    """A read input: the models' inputs, and what is already known about it."""

    index: int
    origin: str
    seed: int = 0
    """The seed of its random draws, signed 64-bit."""
    prompts: Sequence[str] = ()
    picture: Picture | None = None
    tensors: Mapping[str, Tensor] = MappingProxyType({})
    meta: Mapping = MappingProxyType({})
    """The content of its .json, if it is already a sample."""
    content: str | None = None
    """A hash of the image and captions that were read."""


class Task(NamedTuple):
    """An input of a shard. `read`, called in a thread, returns it ready to encode or raises Rejected."""

    index: int
    origin: str
    read: Callable[[], Ready]


class Work(NamedTuple):
    """A shard to build."""

    number: int
    tasks: Sequence[Task]
    shape: tuple[int, int] | None = None
    """(h, w) of its latents, None if the tensors define it."""
