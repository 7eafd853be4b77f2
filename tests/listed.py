"""What a source lists, as a build takes it: for tests."""

import tempfile
from pathlib import Path

from tinyflux.precache.images import Rejected
from tinyflux.precache.kinds.base import Input, Source
from tinyflux.precache.listing import Counted


def inputs_of(source: Source, size: int = 64, seed: int = 0) -> list[Input]:
    """Everything that a source holds, in the order of a build."""
    if (parts := source.parts()) is not None:
        return [item for name, _ in parts for item in source.inputs_of(name)]
    with tempfile.TemporaryDirectory() as folder:
        listing = Counted(Path(folder), source, seed, part_size=1)
        listing.size = size
        return list(listing.now())


def captions_of(source: Source, seed: int = 0) -> dict[str, list[str] | str]:
    """Origin -> captions, or the reason why not."""
    found = {}
    for item in inputs_of(source):
        try:
            found[item.origin] = source.prompts(item, seed)
        except Rejected as reason:
            found[item.origin] = f"rejected: {reason}"
    return found
