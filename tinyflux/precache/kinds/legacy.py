"""Kind "cache": a legacy cache, a folder of encodings.pt, lune.pt and sol.pt; converted without any models."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from tinyflux.precache.kinds.base import Input, Source, Text, digest
from tinyflux.precache.legacy import LegacyCache


@dataclass(frozen=True, kw_only=True)
class LegacyFolder(Source):
    """A folder with encodings.pt, and optionally lune.pt and sol.pt."""

    location: Text
    recipe: ClassVar[str] = "from_legacy:FromLegacy"
    null: Text | None = None
    """A null.safetensors made with the same T5 and CLIP; None is zeros."""
    keeps_order = True

    @cached_property
    def rows(self) -> LegacyCache:
        """Its tensors. Raises FileNotFoundError, ValueError."""
        return LegacyCache(self.folder())

    def inputs(self, size: int, seed: int) -> Iterator[Input]:
        fields = [(name, field.dtype, field.shape) for name, field in self.rows.fields.items()]
        for i in range(self.rows.count):
            yield Input(f"{self.name}/{i}", digest(fields, self.rows.prompt(i)), i)
