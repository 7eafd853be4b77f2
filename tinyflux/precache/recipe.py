"""Recipes: which inputs a build has, and how a sample is made of one of them. `build` runs them all."""

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

SLICE = 16  # times --shard-size: inputs of a part that is sorted into several shapes
OF_A_SLICE, OF_A_TAR = 100, 1000  # numbers of shards that such a part has, and one that is not counted beforehand


class Recipe:
    """What a build is made of, and how. Subclasses say what differs between the kinds of builds."""

    base: Base | None = None
    """The source that the build adds to."""
    timesteps: tuple[float, ...] = BUCKETS
    """What the teachers' features are kept at."""

    def __init__(self, config: BuildConfig, ledger: Ledger, place: Place):
        self.config, self.ledger, self.place = config, ledger, place

    def asked(self, begun: dict) -> dict:
        """What decides the bytes, apart from the models; `begun`: the settings of the build that is resumed."""
        raise NotImplementedError

    def check(self, begun: dict) -> None:
        """Tell the ledger the parts that were noted. Raises LedgerError where the build cannot be resumed as asked."""
        raise NotImplementedError

    def probe(self) -> None:
        """Raises FileNotFoundError, ValueError where there is nothing to build of, before any model is loaded."""

    def load(self, begun: dict) -> dict[str, dict]:
        """Load what samples are made with. Returns the fingerprint of each group. Raises ValueError, OSError."""
        raise NotImplementedError

    def take_inputs(self) -> None:
        """Note the inputs, or compare them with what was noted. Must be called under the lock. Raises LedgerError."""

    def changes(self) -> str:
        """What of the inputs is not as it was when the build began, and what to do; empty where nothing is."""
        return ""

    @property
    def truncated(self) -> Mapping[str, int]:
        """By text model, how many captions were longer than it takes."""
        return {}

    @property
    def seconds(self) -> Mapping[str, float]:
        """How long each model ran."""
        return {}

    def null(self) -> dict[str, Tensor] | None:
        """T5 states and CLIP vector of the empty prompt; None where the build makes no texts."""
        raise NotImplementedError

    def works(self, part: int) -> list[Work]:
        """The shards of a part."""
        raise NotImplementedError

    def done_with(self, part: int) -> None:
        """All shards of a part are written."""

    def encode(self, group: list[list[Ready]]) -> list[Mapping]:
        """The tensors of each batch, on the CPU: for each name one tensor a sample."""
        raise NotImplementedError

    def pack(self, ready: Ready, tensors: dict[str, Tensor]) -> dict:
        """A sample as members of its tar."""
        raise NotImplementedError

    def rejected(self, index: int, origin: str, reason: Rejected) -> dict:
        """The entry of an input that is left out. Raises ValueError where none may be."""
        return {"index": index, "origin": origin, "reason": str(reason)}


class Listed(Recipe):
    """A recipe whose inputs are those of a source, listed by part."""

    size = 64
    """Side in pixels that images are drawn with, where the source draws them."""
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
        if self.source.parts() is None:
            next(iter(self.source.records(self.size, self.config.seed)), None)

    def take_inputs(self) -> None:
        listing, ledger = self.listing, self.ledger
        listing.size = self.size
        if not listing.load():
            listing.begin()
        elif not listing.checked_by_another() and (
            changes := listing.changes(self.same, built=self.built, append=self.config.append)
        ):
            if not ledger.begun_nothing():
                hint = "take them in with --append" if changes.only_new else "choose another --out"
                raise LedgerError(
                    f"{ledger.out}: the inputs are not those that the build was begun with: {changes}. "
                    f"Put them back as they were, or {hint}"
                )
            listing.forget()
            listing.begin()
        self._tell_parts()
        if passed := getattr(self.source, "ignored", None):
            print(f"[{self.source.name}] passed over: {', '.join(f'{n} {what}' for what, n in passed.most_common(12))}")

    def changes(self) -> str:
        self.listing.size = self.size
        changes = self.listing.changes(self.same)
        if not changes:
            return ""
        if self.strict:
            raise LedgerError(
                f"{self.ledger.out}: the inputs are not those that it was built of: {changes}. "
                "Give the same ones in the same order, or choose another folder"
            )
        options = ["--append takes in the new ones"] if changes.new.count else []
        if not changes.only_new:
            options.append("another --out builds the source as it is now; --only prompt takes changed captions")
        return f"the source has changed since: {changes}. {'; '.join(options)}"

    def built(self, index: int) -> bool:
        """Whether an input may be in a shard that is finished."""
        numbers = self.ledger.shards_of(index // self.listing.stride)
        return numbers is not None and any(self.ledger.finished(number) for number in numbers)

    def same(self, index: int, item: Input) -> bool:
        """Whether an input has the content that was built, though its stamp is another."""
        return False

    def rejected(self, index: int, origin: str, reason: Rejected) -> dict:
        if self.strict:
            raise ValueError(f"input {index} of {self.source.name!r}: {reason}")
        return super().rejected(index, origin, reason)

    def works(self, part: int) -> list[Work]:
        chunks, most = self.cut_part(part, self.listing.rows(part)), self.ledger.per_part
        if len(chunks) > most:
            raise LedgerError(f"part {part} has {len(chunks)} shards, at most {most}: raise --shard-size")
        if most > 1 and self.ledger.plan(part) is None:  # the recipe has none of its own
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

    def task(self, index: int, item: Input, shape: int) -> Task:
        """How an input is read."""
        raise NotImplementedError
