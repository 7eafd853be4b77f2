"""The inputs of a build, listed when it starts: divided into parts, stored in files, never all in memory.

.build/inputs/runs.json               number of inputs that each listing added, and their first part
.build/inputs/0/000000.jsonl.zst      inputs of the first listing, PER_FILE per file, in the order of their numbers
.build/inputs/parts.json              or, if parts are listed one by one: their names and stamps
.build/inputs/000012.jsonl.zst        and the inputs of part 12, after a rank has listed it
"""

import hashlib
import heapq
import json
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path

import zstandard

from tinyflux.precache.kinds.base import Input, Source, SourceError
from tinyflux.util.files import atomic_write

PER_FILE = 1 << 14
IN_MEMORY = 200_000  # inputs to sort in memory; more are sorted in files
PART_STRIDE = 10**6  # input numbers reserved for a part that is not counted before


class Names:
    """A number of inputs, and the names of a few."""

    def __init__(self):
        self.count, self.some = 0, []

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.some) < 3:
            self.some.append(name)

    def __str__(self) -> str:
        return f"{self.count} ({', '.join(sorted(self.some))}{', ...' if self.count > len(self.some) else ''})"


class Changes:
    """How the inputs of a source differ from those at the start of its build."""

    def __init__(self):
        self.new, self.changed, self.gone = Names(), Names(), Names()

    def __bool__(self) -> bool:
        return any((self.new.count, self.changed.count, self.gone.count))

    @property
    def only_new(self) -> bool:
        """Whether there are new inputs, but no changed or missing ones."""
        return bool(self.new.count) and not self.changed.count and not self.gone.count

    def __str__(self) -> str:
        return ", ".join(f"{names} {what}" for what, names in vars(self).items() if names.count)


def sorted_in_files(rows: Iterable, key: Callable, folder: Path, in_memory: int = IN_MEMORY) -> Iterator:
    """Sort rows of plain values, with at most `in_memory` in memory. Uses temporary files in `folder`."""
    rows, runs = iter(rows), []
    while batch := list(islice(rows, in_memory)):
        batch.sort(key=key)
        if not runs and len(batch) < in_memory:
            yield from batch
            return
        run = tempfile.TemporaryFile("w+", dir=folder)
        run.writelines(json.dumps(row) + "\n" for row in batch)
        run.seek(0)
        runs.append(run)
    yield from heapq.merge(*(map(json.loads, run) for run in runs), key=key)


def in_order(source: Source, seed: int) -> Callable[[str], bytes]:
    """The sort key of inputs of folders and tables: a hash of their stem, the seed and the dataset id.

    So class folders do not become class shards, and images with the same stem stay together.
    """
    key = f"{seed} {source.dataset_id} ".encode()
    return lambda stem: hashlib.blake2b(key + stem.encode(errors="surrogatepass"), digest_size=16).digest()


class Parts(ABC):
    """Inputs in numbered parts. Only the rank that builds a part reads its inputs."""

    parts = 0
    """Number of parts."""

    @abstractmethod
    def rows(self, k: int) -> list[tuple[int, Input]]:
        """The inputs of part k with their numbers."""

    @abstractmethod
    def done_with(self, k: int) -> None:
        """All shards of part k are written: its source can delete temporary files."""


class Listing(Parts):
    """The inputs of a source, listed in files when the build starts."""

    total: int | None = None
    """Number of all inputs, None if it is not known from the start."""
    stride = PART_STRIDE
    """Input numbers reserved for each part."""

    def __init__(self, folder: Path, source: Source, seed: int, limit: int | None = None):
        self.folder, self.source, self.seed, self.limit = folder, source, seed, limit
        self.size = 64
        """Side in pixels of rendered images."""
        self.created = time.time()

    @abstractmethod
    def begin(self) -> None:
        """List the inputs, or only the parts. Raises SourceError, FileNotFoundError."""

    @abstractmethod
    def forget(self) -> None:
        """Delete the listing."""

    @abstractmethod
    def load(self) -> bool:
        """Load an earlier listing. Returns whether there is one."""

    @abstractmethod
    def changes(
        self, same: Callable[[int, Input], bool], *, built: Callable[[int], bool] | None = None, append: bool = False
    ) -> Changes:
        """How the source differs from the listing.

        same: tells whether an input is unchanged although its stamp differs. built: tells whether an input is in a
        finished shard; inputs that are not may change, and the listing is updated. append: new inputs become new parts,
        if nothing else has changed. With `built` or `append`, must be called under the ledger's lock.
        """

    def checked_by_another(self) -> bool:
        """Whether another process has compared since this one started, so that this one need not."""
        mark = self.folder / "checked"
        return mark.is_file() and mark.stat().st_mtime > self.created

    def mark_checked(self) -> None:
        atomic_write(self.folder / "checked", "")


class Counted(Listing):
    """Inputs that are all listed when the build starts: of folders, tables, and sources that keep their order."""

    def __init__(self, *args, part_size: int, **options):
        super().__init__(*args, **options)
        self.part_size = self.stride = part_size
        self.per_file = max(1, PER_FILE // part_size)  # parts
        self.runs: list[tuple[int, int]] = []  # (first part, inputs) of each listing
        self._read = lru_cache(maxsize=4)(self._read_file)

    def load(self) -> bool:
        path = self.folder / "runs.json"
        self.runs = [tuple(run) for run in json.loads(path.read_bytes())] if path.is_file() else []
        return bool(self.runs)

    @property
    def parts(self) -> int:
        return self.runs[-1][0] + -(-self.runs[-1][1] // self.part_size) if self.runs else 0

    @property
    def total(self) -> int:
        return sum(inputs for _, inputs in self.runs)

    def rows(self, k: int) -> list[tuple[int, Input]]:
        run = max(r for r, (first, _) in enumerate(self.runs) if first <= k)
        k_in_run = k - self.runs[run][0]
        rows = self._read(run, k_in_run // self.per_file)
        start = k_in_run % self.per_file * self.part_size
        return list(enumerate(rows[start : start + self.part_size], k * self.part_size))

    def done_with(self, k: int) -> None:
        """Nothing is kept for a part."""

    def forget(self) -> None:
        self.runs = []
        self._read.cache_clear()

    def begin(self) -> None:
        """List all inputs. Raises SourceError if there are none, or two have the same name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._add(islice(self.now(), self.limit)):
            raise SourceError(f"[{self.source.name}] {self.source.kind} {self.source.where}: no images found")
        self.mark_checked()

    def changes(
        self, same: Callable[[int, Input], bool], *, built: Callable[[int], bool] | None = None, append: bool = False
    ) -> Changes:
        changes, updates = Changes(), {}
        room = float("inf") if self.limit is None else self.limit - self.total
        with tempfile.TemporaryFile("w+", dir=self.folder) as new:
            for noted, now in self._join():
                if noted is None:
                    if changes.new.count < room:
                        changes.new.add(now.origin)
                        new.write(json.dumps(now) + "\n")
                elif now is None or self.source.keeps_order and noted[1].origin != now.origin:
                    changes.gone.add(noted[1].origin)
                elif noted[1].stamp != now.stamp:
                    if built is not None and not built(noted[0]):
                        updates[noted[0]] = now
                    elif not same(noted[0], now):
                        changes.changed.add(now.origin)
            if updates:
                self._update(updates)
            if append and changes.only_new:
                new.seek(0)
                self._add(Input(*json.loads(line)) for line in new)
                changes = Changes()
        self.mark_checked()
        return changes

    def _update(self, items: dict[int, Input]) -> None:
        """Update the listing for inputs that changed before they were built."""
        for run, (first, _) in enumerate(self.runs):
            per_file, begin = self.per_file * self.part_size, first * self.part_size
            for number in {(index - begin) // per_file for index in items if index >= begin}:
                path, start = self._file(run, number), begin + number * per_file
                if path.is_file():
                    rows = [items.get(index, item) for index, item in enumerate(read_rows(path), start)]
                    write_rows(path, rows)
        self._read.cache_clear()

    def now(self) -> Iterator[Input]:
        """The inputs that the source has now, in order."""
        if self.source.keeps_order:
            yield from self.source.inputs(self.size, self.seed)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        order, before = in_order(self.source, self.seed), None
        records = self.source.records(self.size, self.seed)
        for stem, rows in groupby(sorted_in_files(records, lambda row: order(row[0]), self.folder), itemgetter(0)):
            for item in sorted(self.source.join(stem, rows)):
                if item.origin == before:
                    raise SourceError(
                        f"[{self.source.name}] {item.origin}: is listed twice; each image needs its own name"
                    )
                before = item.origin
                yield item

    def _noted(self) -> Iterator[tuple[int, Input]]:
        """The inputs that were listed with their numbers, in order."""
        runs = [enumerate(self._read_run(run), first * self.part_size) for run, (first, _) in enumerate(self.runs)]
        if self.source.keeps_order:
            return chain(*runs)
        order = in_order(self.source, self.seed)
        return heapq.merge(*runs, key=lambda row: (order(self.source.stem(row[1])), row[1].origin))

    def _join(self) -> Iterator[tuple[tuple[int, Input] | None, Input | None]]:
        """(listed input, current input) for each name, None for a missing one."""
        noted, now = self._noted(), self.now()
        if self.source.keeps_order:
            while True:
                pair = next(noted, None), next(now, None)
                if pair == (None, None):
                    return
                yield pair
        order, stem = in_order(self.source, self.seed), self.source.stem
        a, b = next(noted, None), next(now, None)
        while a or b:
            left = a and (order(stem(a[1])), a[1].origin)
            right = b and (order(stem(b)), b.origin)
            if right is None or left is not None and left < right:
                yield a, None
                a = next(noted, None)
            elif left is None or right < left:
                yield None, b
                b = next(now, None)
            else:
                yield a, b
                a, b = next(noted, None), next(now, None)

    def _add(self, inputs: Iterable[Input]) -> int:
        """Write inputs as new parts after the others; returns their number."""
        run, first, n = len(self.runs), self.parts, 0
        inputs = iter(inputs)
        while block := list(islice(inputs, self.per_file * self.part_size)):
            path = self._file(run, n // (self.per_file * self.part_size))
            path.parent.mkdir(exist_ok=True)
            write_rows(path, block)
            n += len(block)
        if n:
            self.runs.append((first, n))
            atomic_write(self.folder / "runs.json", json.dumps(self.runs))
        return n

    def _read_file(self, run: int, number: int) -> list[Input]:
        return read_rows(self._file(run, number))

    def _file(self, run: int, number: int) -> Path:
        return self.folder / str(run) / f"{number:06d}.jsonl.zst"

    def _read_run(self, run: int) -> Iterator[Input]:
        for number in range(-(-self.runs[run][1] // (self.per_file * self.part_size))):
            yield from self._read_file(run, number)


class Parted(Listing):
    """Inputs that come in natural parts, such as tars: each part is listed by the rank that builds it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.noted: list[list] = []  # name, stamp, first and last row of each part
        self._read = lru_cache(maxsize=2)(self._read_part)

    def load(self) -> bool:
        path = self.folder / "parts.json"
        self.noted = json.loads(path.read_bytes()) if path.is_file() else []
        return bool(self.noted)

    @property
    def parts(self) -> int:
        return len(self.noted)

    def rows(self, k: int) -> list[tuple[int, Input]]:
        return list(enumerate(self._read(k), k * PART_STRIDE))

    def forget(self) -> None:
        for path in self.folder.glob("[0-9]*"):
            path.unlink()
        self.noted = []
        self._read.cache_clear()

    def begin(self) -> None:
        """List the parts. Raises SourceError if there are none, or two have the same name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._add(self.now()):
            raise SourceError(f"[{self.source.name}] {self.source.kind} {self.source.where}: no images found")
        self.mark_checked()

    def changes(
        self, same: Callable[[int, Input], bool], *, built: Callable[[int], bool] | None = None, append: bool = False
    ) -> Changes:
        changes, now = Changes(), dict(self.now())
        noted = {name: stamp for name, stamp, *_ in self.noted}
        for name, stamp in noted.items():
            if name not in now:
                changes.gone.add(name)
            elif now[name] != stamp:
                changes.changed.add(name)
        new = [(name, stamp) for name, stamp in now.items() if name not in noted]
        cut, _, _, rest = self.noted[-1]
        more = [*(name for name, _ in new), *([f"more of {cut}"] if rest is not None else [])]
        if more and (self.limit is None or self.limit > sum(len(self._read(k)) for k in range(self.parts))):
            for name in more:
                changes.new.add(name)
        if append and changes.only_new:
            self._add([*([(cut, noted[cut])] if rest is not None else []), *new], rest or 0)
            changes = Changes()
        self.mark_checked()
        return changes

    def now(self) -> list[tuple[str, str]]:
        parts = self.source.parts()
        if len(dict(parts)) < len(parts):
            names = [name for name, _ in parts]
            twice = next(name for name in names if names.count(name) > 1)
            raise SourceError(f"[{self.source.name}] {twice}: is listed twice; each part needs its own name")
        return parts

    def _add(self, parts: list[tuple[str, str]], start: int = 0) -> int:
        """Add parts after the others, up to the limit; returns the number of all parts."""
        left = None if self.limit is None else self.limit - sum(len(self._read(k)) for k in range(self.parts))
        for name, stamp in parts:
            if left is not None and left <= 0:
                break
            self.noted.append([name, stamp, start, None])
            if left is not None:  # list parts only up to the limit, in the process that starts the build
                rows = len(self._list(len(self.noted) - 1))
                self.noted[-1][3] = start + left if rows > left else None
                left -= rows
            start = 0
        atomic_write(self.folder / "parts.json", json.dumps(self.noted))
        return len(self.noted)

    def done_with(self, k: int) -> None:
        self.source.done_with(self.noted[k][0])

    def _read_part(self, k: int) -> list[Input]:
        path = self.folder / f"{k:06d}.jsonl.zst"
        if path.is_file():
            return read_rows(path)
        rows = self._list(k)
        if len(rows) > PART_STRIDE:
            raise SourceError(f"{self.noted[k][0]}: has {len(rows)} images, but a part may have at most {PART_STRIDE}")
        write_rows(path, rows)
        return read_rows(path)

    def _list(self, k: int) -> list[Input]:
        name, _, start, stop = self.noted[k]
        return list(self.source.inputs_of(name))[start:stop]


class Few(Parts):
    """The first inputs of a listing, as one part."""

    parts = 1

    def __init__(self, listing: Listing, n: int):
        self._rows = list(islice((row for k in range(listing.parts) for row in listing.rows(k)), n))

    def rows(self, k: int) -> list[tuple[int, Input]]:
        return self._rows

    def done_with(self, k: int) -> None:
        """Nothing is kept for a part."""


def write_rows(path: Path, rows: Iterable[Input]) -> None:
    """Write inputs to a file of the listing."""
    text = "".join(json.dumps(item) + "\n" for item in rows)
    atomic_write(path, zstandard.compress(text.encode()))


def read_rows(path: Path) -> list[Input]:
    """The inputs in a file of the listing."""
    return [Input(*json.loads(line)) for line in zstandard.decompress(path.read_bytes()).decode().splitlines()]
