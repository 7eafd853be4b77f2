"""Recipes: which inputs a build has, and how an input becomes a sample. `build` runs any recipe."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property

from torch import Tensor

from tinyflux.precache.config import BuildConfig, Place
from tinyflux.precache.images import Rejected
from tinyflux.precache.kinds.base import Input, Source
from tinyflux.precache.ledger import Ledger, LedgerError
from tinyflux.precache.listing import Counted, Listing, Parted
from tinyflux.precache.work import Ready, Task, Work
from tinyflux.shards.manifest import Base
from tinyflux.util.buckets import BUCKETS

SLICE = 16  # inputs of a part that is sorted into several shapes, in multiples of --shard-size
OF_A_SLICE, OF_A_TAR = 100, 1000  # shard numbers reserved for such a part, and for a part that is not counted before


class Recipe(ABC):
    """The inputs of a build and how they are processed. Subclasses define the kinds of builds."""

    base: Base | None = None
    """The base, for an overlay."""
    timesteps: tuple[float, ...] = BUCKETS
    """Timesteps of the teachers' features."""

    def __init__(self, config: BuildConfig, ledger: Ledger, place: Place):
        self.config, self.ledger, self.place = config, ledger, place

    @abstractmethod
    def asked(self, begun: dict) -> dict:
        """All settings that affect the bytes, except models; `begun`: the settings of a resumed build."""

    @abstractmethod
    def check(self, begun: dict) -> None:
        """Tell the ledger the listed parts. Raises LedgerError if the build cannot be resumed with these settings."""

    @abstractmethod
    def probe(self) -> None:
        """Raises FileNotFoundError or ValueError if there are no inputs, before any model is loaded."""

    @abstractmethod
    def load(self, begun: dict) -> dict[str, dict]:
        """Load the models. Returns the fingerprint of each group. Raises ValueError, OSError."""

    @abstractmethod
    def take_inputs(self) -> None:
        """List the inputs, or compare them with the listing. Must be called under the lock. Raises LedgerError."""

    def changes(self) -> str:
        """How the inputs have changed since the build's start, and what to do; empty if they have not."""
        return ""

    @property
    def truncated(self) -> Mapping[str, int]:
        """For each text model, the number of truncated captions."""
        return {}

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds that each model ran."""
        return {}

    @abstractmethod
    def null(self) -> dict[str, Tensor] | None:
        """T5 states and CLIP vector of the empty prompt; None if the build has no texts."""

    @abstractmethod
    def works(self, part: int) -> list[Work]:
        """The shards of a part."""

    @abstractmethod
    def done_with(self, part: int) -> None:
        """All shards of a part are written."""

    @abstractmethod
    def encode(self, group: list[list[Ready]]) -> list[Mapping]:
        """The tensors of each batch, on the CPU: for each name, one tensor per sample."""

    @abstractmethod
    def pack(self, ready: Ready, tensors: dict[str, Tensor]) -> dict:
        """A sample as members of its tar."""

    def rejected(self, index: int, origin: str, reason: Rejected) -> dict:
        """The entry of a rejected input. Raises ValueError if rejects are not allowed."""
        return {"index": index, "origin": origin, "reason": str(reason)}


class Listed(Recipe):
    """A recipe whose inputs are those of a source, listed by part."""

    size = 64
    """Side in pixels of rendered images."""
    several_shapes = False

    def __init__(self, config: BuildConfig, source: Source, ledger: Ledger, place: Place, *, strict: bool = False):
        super().__init__(config, ledger, place)
        self.source, self.strict = source, strict

    @cached_property
    def listing(self) -> Listing:
        """The inputs by part."""
        config, folder = self.config, self.ledger.notes / "inputs"
        if self.source.parts() is not None:
            self.ledger.per_part = OF_A_TAR
            return Parted(folder, self.source, config.seed, config.limit)
        self.ledger.per_part = OF_A_SLICE if self.several_shapes else 1
        part_size = config.shard_size * (SLICE if self.several_shapes else 1)
        return Counted(folder, self.source, config.seed, config.limit, part_size=part_size)

    def check(self, begun: dict) -> None:
        self.listing.load()
        self._tell_parts()

    def _tell_parts(self) -> None:
        self.ledger.parts, self.ledger.total = range(self.listing.parts), self.listing.total

    def probe(self) -> None:
        source, out = self.source, self.ledger.out
        if source.parts() is None:
            next(iter(source.records(self.size, self.config.seed)), None)
        elif source.path.is_dir() and out.resolve().is_relative_to(source.path.resolve()):
            raise LedgerError(f"--out {out}: is inside {source.path}, whose tars are inputs; choose another --out")

    def take_inputs(self) -> None:
        listing, ledger = self.listing, self.ledger
        listing.size = self.size
        if not listing.load():
            listing.begin()
        elif not listing.checked_by_another() and (
            changes := listing.changes(self.same, built=self.built if ledger.alone else None, append=self.config.append)
        ):
            if not (ledger.alone and ledger.begun_nothing()):
                hint = "add them with --append" if changes.only_new else "choose another --out"
                raise LedgerError(
                    f"{ledger.out}: the inputs have changed since the build was started: {changes}. "
                    f"Restore them, or {hint}"
                )
            listing.forget()
            listing.begin()
        self._tell_parts()
        if passed := getattr(self.source, "ignored", None):
            print(f"[{self.source.name}] skipped: {', '.join(f'{n} {what}' for what, n in passed.most_common(12))}")

    def changes(self) -> str:
        self.listing.size = self.size
        changes = self.listing.changes(self.same)
        if not changes:
            return ""
        if self.strict:
            raise LedgerError(
                f"{self.ledger.out}: the inputs differ from those of its build: {changes}. "
                "Give the same inputs in the same order, or choose another folder"
            )
        options = ["--append adds the new ones"] if changes.new.count else []
        if not changes.only_new:
            options.append("another --out builds the current source; --only prompt encodes changed captions")
        return f"the source has changed since: {changes}. {'; '.join(options)}"

    def built(self, index: int) -> bool:
        """Whether an input may be in a shard that is finished."""
        numbers = self.ledger.shards_of(index // self.listing.stride)
        return numbers is not None and any(self.ledger.finished(number) for number in numbers)

    def same(self, index: int, item: Input) -> bool:
        """Whether an input has the content that was built or rejected, although its stamp differs."""
        return False

    def rejected(self, index: int, origin: str, reason: Rejected) -> dict:
        if self.strict:
            raise ValueError(f"input {index} of {self.source.name!r}: {reason}")
        return super().rejected(index, origin, reason)

    def works(self, part: int) -> list[Work]:
        chunks, most = self.cut_part(part, self.listing.rows(part)), self.ledger.per_part
        if len(chunks) > most:
            change = "raise" if most == OF_A_TAR else "lower"  # with fewer inputs a slice has fewer shapes
            raise LedgerError(f"part {part} has {len(chunks)} shards, at most {most}: {change} --shard-size")
        if most > 1 and self.ledger.plan(part) is None:  # the recipe has no plan of its own
            self.ledger.note_plan(part, {"shards": len(chunks)})
        return [
            Work(part * most + n, [self.task(index, item, shape) for index, item in rows])
            for n, (shape, rows) in enumerate(chunks)
        ]

    def done_with(self, part: int) -> None:
        self.listing.done_with(part)

    def cut_part(self, part: int, rows: list[tuple[int, Input]]) -> list[tuple[int, list[tuple[int, Input]]]]:
        """(number of the shape, inputs) of each shard of a part."""
        size = self.config.shard_size
        return [(0, rows[start : start + size]) for start in range(0, len(rows), size)]

    @abstractmethod
    def task(self, index: int, item: Input, shape: int) -> Task:
        """How an input is read."""
