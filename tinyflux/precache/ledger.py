"""A build in progress: the files in `.build/` of the output folder, and how ranks share them.

config.json        settings and fingerprint; a resume must agree with them
inputs/            the inputs: see listing.py
plans/000012.json  how part 12 is cut into shards, if that is not known from the start
000012.json        shard 12 is finished: its manifest entry, its fields, and its rejected inputs
locks              byte k + 1 is locked by the process that writes part k, byte 0 while the files above are changed;
                   all processes of a build share byte BUILDING

Ranks need no process group: each takes its own parts first, then unfinished parts that no process holds. The kernel
drops a dead process's locks, so its parts are free again. The process that finishes the last part writes the manifest.
On a file system without locks, each rank builds only its own parts.
"""

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tinyflux.shards.discover import tars
from tinyflux.shards.manifest import Base, Manifest, ManifestError, diff_fingerprints, shard_path
from tinyflux.shards.schema import Field, grouped
from tinyflux.shards.writer import Shard
from tinyflux.util.buckets import BUCKETS
from tinyflux.util.files import atomic_write, sha256

BUILDING = 1 << 30
"""The byte of the lock file that all processes of a build share."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class LedgerError(ValueError):
    """The output folder does not match what is asked; the message lists the differences."""


class Ledger:
    """The output folder of one source."""

    def __init__(self, out: Path, source: str, dataset_id: int, rank: int = 0, world: int = 1):
        self.out, self.source, self.dataset_id, self.rank, self.world = out, source, dataset_id, rank, world
        self.notes = out / ".build"
        self.parts: Sequence[int] = ()
        """Numbers of the parts that ranks share; set by the recipe."""
        self.per_part = 1
        """Shard numbers reserved for each part; if more than one, a plan gives the real number of shards."""
        self.subfolders = False
        self.locks = True
        self.alone = True
        """Whether no other process was building when this one began. Others have read the listing, so it must stay."""
        self.total: int | None = None
        """Number of all inputs, None if it is not known from the start."""
        self._done: dict[int, tuple[int, int]] = {}  # finished shards: samples and rejects
        self._fd = -1

    @property
    def manifest(self) -> Path:
        return self.out / "manifest.json"

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.out / shard_path(self.source, number, self.subfolders)

    def config(self) -> dict | None:
        """The settings and fingerprint of the build in this folder, if there is one.

        Raises LedgerError if it contains a source or tars of another origin, which a build could overwrite.
        """
        path = self.notes / "config.json"
        if path.is_file():
            return json.loads(path.read_bytes())
        if self.manifest.exists():
            raise LedgerError(
                f"{self.out}: contains a finished source without the notes of its build ({path}), so nothing can be "
                "added to it; choose another --out"
            )
        if not self.notes.exists() and (found := tars(self.out)):
            raise LedgerError(f"{self.out}: contains {found[0].name}, not from this build; choose another --out")
        return None

    def check(self, asked: dict) -> None:
        """Raises LedgerError, listing the differences, if settings or fingerprint are not those of the build's start.

        A build without a finished shard starts over instead.
        """
        begun = self.config() or asked
        if differences := diff_fingerprints({key: begun.get(key) for key in asked}, asked):
            if self.begun_nothing():
                return
            lines = "\n  ".join(differences)
            raise LedgerError(
                f"{self.out}: the build was started with other settings (old against new):\n  {lines}\n"
                "Use the old settings, or choose another --out"
            )

    def begun_nothing(self) -> bool:
        """Whether no shard is finished yet."""
        return not self.manifest.exists() and next(self.notes.glob("[0-9]*.json"), None) is None

    def start_over(self) -> None:
        """Delete the state of a build without a finished shard. Must be called under the lock."""
        for name in ("inputs", "plans"):
            shutil.rmtree(self.notes / name, ignore_errors=True)
        (self.notes / "config.json").unlink(missing_ok=True)

    def begin(self, config: dict, base: Base | None = None) -> None:
        """Write the config of a new build, or check that of a resumed one. Must be called under the lock.

        base: for an overlay; written so that a lost manifest can be rebuilt, and not compared.
        """
        self.alone = self._try(fcntl.LOCK_EX | fcntl.LOCK_NB, BUILDING)
        self._try(fcntl.LOCK_SH, BUILDING)
        begun = self.config()
        if begun is not None and diff_fingerprints({key: begun.get(key) for key in config}, config):
            self.check(config)
            if not self.alone:
                raise LedgerError(f"{self.out}: another process is building here with other settings; stop it first")
            self.start_over()
            begun = None
        if begun is None:
            noted = config | ({"base": asdict(base)} if base else {})
            atomic_write(self.notes / "config.json", json.dumps(noted, indent=1))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """A lock for everything except shards; one process holds it at a time."""
        if self._fd < 0:
            self.notes.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.notes / "locks", os.O_RDWR | os.O_CREAT, 0o666)
        self._try(fcntl.LOCK_EX, 0)
        if not self.locks and self.rank and not (self.notes / "config.json").exists():
            self._wait_for(self.notes / "config.json")
        try:
            yield
        finally:
            self._try(fcntl.LOCK_UN, 0)

    def close(self) -> None:
        """Drop all locks of this process."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _try(self, how: int, byte: int) -> bool:
        """Lock or unlock a byte. Returns whether it is held. If the file system has no locks, prints that once."""
        if not self.locks:
            return True
        try:
            fcntl.lockf(self._fd, how, 1, byte)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.locks = False
            if self.world > 1:
                print(f"{self.out}: this file system has no locks: each of {self.world} ranks builds only its share")
        return True

    def _wait_for(self, path: Path, seconds: float = 3600) -> None:
        """Wait until rank 0 has started the build. Raises LedgerError."""
        end = time.monotonic() + seconds
        while not path.exists():
            if time.monotonic() > end:
                raise LedgerError(f"{self.out}: rank 0 has not started the build in {seconds:g} s; is it running?")
            time.sleep(0.2)

    def plan(self, part: int) -> dict | None:
        """A part's plan: how it is cut into shards. None if there is none yet."""
        path = self.notes / "plans" / f"{part:06d}.json"
        return json.loads(path.read_bytes()) if path.is_file() else None

    def note_plan(self, part: int, plan: dict) -> None:
        """Write a part's plan: {"shards": number of shards, ...}."""
        path = self.notes / "plans" / f"{part:06d}.json"
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, json.dumps(plan))

    def shards_of(self, part: int) -> range | None:
        """The numbers of a part's shards, None if it has no plan yet."""
        if self.per_part == 1:
            return range(part, part + 1)
        plan = self.plan(part)
        return plan and range(part * self.per_part, part * self.per_part + plan["shards"])

    def note_of(self, number: int) -> dict | None:
        """The note of a shard, if it is finished and its file is there."""
        path = self.notes / f"{number:06d}.json"
        if not path.is_file():
            return None
        note = json.loads(path.read_bytes())
        file = self.path(number)
        if note["shard"] and not (file.is_file() and file.stat().st_size == note["shard"]["bytes"]):
            return None
        return note

    def finished(self, number: int) -> bool:
        """Whether a shard is finished and its file is there."""
        if number not in self._done:
            if (note := self.note_of(number)) is None:
                return False
            self._done[number] = (note["shard"]["count"] if note["shard"] else 0, len(note["rejected"]))
        return True

    def part_finished(self, part: int) -> bool:
        """Whether all shards of a part are finished."""
        numbers = self.shards_of(part)
        return numbers is not None and all(self.finished(number) for number in numbers)

    def unfinished(self) -> list[int]:
        """The parts that are not finished."""
        return [part for part in self.parts if not self.part_finished(part)]

    @property
    def done(self) -> tuple[int, int]:
        """Samples and rejects of the shards that are known to be finished."""
        return sum(samples for samples, _ in self._done.values()), sum(rejects for _, rejects in self._done.values())

    def look(self) -> None:
        """Look for shards that other ranks have finished."""
        noted = {int(path.stem) for path in self.notes.glob("[0-9]*.json")}
        for number in noted - self._done.keys():
            self.finished(number)

    def complete(self) -> bool:
        """Whether the build is done: all parts are finished, all files exist, and the manifest lists the shards."""
        if not self.manifest.exists() or not (self.out / "rejected.jsonl").exists() or self.unfinished():
            return False
        try:
            manifest = Manifest.load(self.out)
        except (ManifestError, FileNotFoundError):
            return False
        if manifest.null_sha256 and not (self.out / "null.safetensors").exists():
            return False
        listed = {shard.name: shard.sha256 for shard in manifest.shards}
        return listed == {note["shard"]["name"]: note["shard"]["sha256"] for note in self.all_notes() if note["shard"]}

    def claim(self) -> Iterator[int]:
        """Parts for this process, its own share first; each stays locked until `release`."""
        own, others = [], []
        for i, part in enumerate(self.parts):
            (own if i % self.world == self.rank else others).append(part)
        yield from filter(self._take, own)
        if self.locks:
            yield from filter(self._take, reversed(others))  # from the end: other ranks start at the front

    def _take(self, part: int) -> bool:
        if self.part_finished(part) or not self._try(fcntl.LOCK_EX | fcntl.LOCK_NB, part + 1):
            return False
        if self.part_finished(part):
            self.release(part)
            return False
        return True

    def release(self, part: int) -> None:
        """Unlock a part."""
        self._try(fcntl.LOCK_UN, part + 1)

    def note(
        self,
        number: int,
        *,
        shard: Shard | None,
        fields: dict[str, Field],
        rejected: list[dict],
        contents: dict[int, str],
        pixels: list[int],
        remarks: dict[str, int],
    ) -> None:
        """Record a shard as finished; `shard` is None if all its inputs were rejected.

        contents: hashes of its inputs by number. pixels: (pixels kept, pixels of the originals). remarks: problems of
        accepted images, with counts.
        """
        note = {
            "shard": shard and shard.to_dict(),
            "fields": {name: asdict(field) for name, field in fields.items()},
            "rejected": rejected,
            "contents": contents,
            "pixels": pixels,
            "remarks": remarks,
        }
        atomic_write(self.notes / f"{number:06d}.json", json.dumps(note))

    def all_notes(self) -> Iterator[dict]:
        """The notes of all shards, in order."""
        for part in self.parts:
            for number in self.shards_of(part):
                yield json.loads((self.notes / f"{number:06d}.json").read_bytes())

    def merge(
        self, producers: dict[str, dict], timesteps: tuple[float, ...] = BUCKETS, base: Base | None = None
    ) -> Manifest | None:
        """Write rejected.jsonl and then the manifest from the notes of all shards. Returns None if all was rejected.

        producers: the fingerprint of each group; timesteps: the teachers' grid. Raises LedgerError if a shard has other
        fields than the first.
        """
        with self.lock():
            fields, shards, rejected = None, [], []
            for note in self.all_notes():
                rejected += note["rejected"]
                if not note["shard"]:
                    continue
                fields = fields or note["fields"]
                if note["fields"] != fields:
                    raise LedgerError(f"{note['shard']['name']}: has fields {note['fields']}, the first shard {fields}")
                shards.append(Shard.from_dict(note["shard"]))
            rejected.sort(key=lambda entry: entry["index"])
            lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected)
            atomic_write(self.out / "rejected.jsonl", lines)
            if not shards:
                return None
            fields = {name: Field(field["dtype"], tuple(field["shape"])) for name, field in fields.items()}
            null = self.out / "null.safetensors"
            manifest = Manifest.of(
                self.source,
                self.dataset_id,
                grouped(fields, timesteps, producers),
                shards,
                null_sha256=sha256(null) if null.is_file() else None,
                base=base,
                subfolders=self.subfolders,
            )
            for leftover in self.out.rglob(".*.tmp"):  # of writers that were killed
                leftover.unlink()
            manifest.save(self.out)
            return manifest
