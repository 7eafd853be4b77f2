"""A source's inputs as in a build, for tests."""

import tempfile
from pathlib import Path

from tinyflux.precache.images import Rejected
from tinyflux.precache.kinds.base import Input, Source
from tinyflux.precache.listing import Counted


def inputs_of(source: Source, size: int = 64, seed: int = 0) -> list[Input]:
    """All inputs of a source, in the order of a build."""
    if (parts := source.parts()) is not None:
        return [item for name, _ in parts for item in source.inputs_of(name)]
    with tempfile.TemporaryDirectory() as folder:
        listing = Counted(Path(folder), source, seed, part_size=1)
        listing.size = size
        return list(listing.now())


def captions_of(source: Source, seed: int = 0) -> dict[str, list[str] | str]:
    """Origin -> captions, or the reason for the rejection."""
    found = {}
    for item in inputs_of(source):
        try:
            found[item.origin] = source.prompts(item, seed)
        except Rejected as reason:
            found[item.origin] = f"rejected: {reason}"
    return found
