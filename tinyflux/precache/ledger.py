"""A build in progress: what lies under `.build/` in the output folder, and how ranks share it.

config.json        settings and producer fingerprint; a rerun must agree with them
inputs.jsonl.zst   one line an input, in the order of their ordinals: [origin, stamp], or null where none is
000012.json        shard 12 is finished: its manifest entry, its fields, and the inputs it left out
locks              byte k + 1 is locked by the process that writes shard k, byte 0 while the files above are changed

Ranks need no process group: each takes its own shards first, then whatever nobody has finished or holds. The kernel
drops a dead process's locks, so its shards are free again. Whoever finishes the last shard writes the manifest.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import zstandard

from tinyflux.precache.inputs import Input
from tinyflux.shards.manifest import Manifest, ManifestError, diff_fingerprints, shard_name
from tinyflux.shards.schema import Field, grouped
from tinyflux.shards.writer import Shard
from tinyflux.util.buckets import BUCKETS
from tinyflux.util.files import atomic_write, sha256


class JobError(ValueError):
    """The output folder cannot be built into as asked; the message says what differs."""


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


class Job:
    """The output folder of one source."""

    def __init__(self, out: Path, source: str, dataset_id: int):
        self.out, self.source, self.dataset_id = out, source, dataset_id
        self.notes = out / ".build"
        self._done: dict[int, dict] = {}
        self._fd = -1

    @property
    def manifest(self) -> Path:
        return self.out / "manifest.json"

    def config(self) -> dict | None:
        """The settings and fingerprint that this folder was begun with, if it was. Raises JobError."""
        path = self.notes / "config.json"
        if path.is_file():
            return json.loads(path.read_bytes())
        if self.manifest.exists():
            raise JobError(
                f"{self.out}: holds a finished source but not the notes of its build ({path}), so nothing can be "
                "added to it here; choose another --out"
            )
        return None

    def check(self, asked: dict) -> None:
        """Raises JobError that lists how settings and fingerprint differ from those the build was begun with."""
        begun = self.config() or asked
        if differences := diff_fingerprints({key: begun.get(key) for key in asked}, asked):
            lines = "\n  ".join(differences)
            raise JobError(
                f"{self.out}: was begun with other settings (there, against those asked for now):\n  {lines}\n"
                "Ask for the same ones, or choose another --out"
            )

    def begin(self, config: dict, inputs: list[Input], shard_size: int, append: bool = False) -> list[Input | None]:
        """Start the build, or go on with one of the same config and inputs. Returns the inputs by ordinal.

        `append` takes inputs that are new since then: they go last, from the next shard on, so that no finished shard
        changes; the ordinals that this skips have None. Raises JobError where config or inputs differ.
        """
        self._open()
        with self.lock():
            if self.config() is None:
                self._write_inputs([(item.origin, item.stamp) for item in inputs])
                atomic_write(self.notes / "config.json", json.dumps(config, indent=1).encode())
            self.check(config)
            ordered = self._order(inputs, shard_size if append else 0)
        self.sizes = [
            sum(item is not None for item in ordered[start : start + shard_size])
            for start in range(0, len(ordered), shard_size)
        ]
        self.shard_size, self.shards, self.total = shard_size, len(self.sizes), sum(self.sizes)
        return ordered

    def begin_like(self, config: dict, sizes: list[int], inputs: bytes | None) -> None:
        """Start, or go on with, a build that follows another's: `sizes` of its shards, the notes of its inputs.

        Raises JobError where the config differs.
        """
        self._open()
        with self.lock():
            if self.config() is None:
                if inputs is not None:
                    atomic_write(self.notes / "inputs.jsonl.zst", inputs)
                atomic_write(self.notes / "config.json", json.dumps(config, indent=1).encode())
            self.check(config)
        self.shard_size, self.sizes, self.shards, self.total = 0, sizes, len(sizes), sum(sizes)

    def _open(self) -> None:
        self.notes.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.notes / "locks", os.O_RDWR | os.O_CREAT, 0o666)

    def _write_inputs(self, rows: list[tuple[str, str] | None]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        atomic_write(self.notes / "inputs.jsonl.zst", zstandard.compress(text.encode()))

    def read_inputs(self) -> list[tuple[str, str] | None]:
        """(origin, stamp) of each input by ordinal, None where none is. Raises JobError where that was not noted."""
        path = self.notes / "inputs.jsonl.zst"
        if not path.is_file():
            raise JobError(f"{self.out}: has no {path.name} in {self.notes}: it can be read, but not be added to")
        text = zstandard.decompress(path.read_bytes()).decode()
        return [row and tuple(row) for row in map(json.loads, text.splitlines())]

    def _order(self, inputs: list[Input], append_from: int) -> list[Input | None]:
        now: dict[tuple[str, str], list[Input]] = {}
        for item in inputs:
            now.setdefault((item.origin, item.stamp), []).append(item)
        ordered, gone = [], []
        for row in self.read_inputs():
            if row is not None and not now.get(row):
                gone.append(row[0])
            else:
                ordered.append(row and now[row].pop(0))
        unused = {id(item) for items in now.values() for item in items}
        new = [item for item in inputs if id(item) in unused]
        if gone or new and not append_from:
            names = [item.origin for item in new]
            found = [f"{_some(names)} {what}" for names, what in ((gone, "gone or changed"), (names, "new")) if names]
            hint = "choose another --out" if gone else "take them in with --append"
            raise JobError(
                f"{self.out}: the inputs are not those that the build was begun with: {'; '.join(found)}. "
                f"Put them back as they were, or {hint}"
            )
        if new:
            ordered += [None] * (-len(ordered) % append_from) + new
            self._write_inputs([item and (item.origin, item.stamp) for item in ordered])
        return ordered

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by one process at a time, for what is not a shard."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, 0)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, 0)

    def finished(self, k: int) -> dict | None:
        """The note of shard k, if it is finished and its file is there."""
        if k not in self._done:
            path = self.notes / f"{k:06d}.json"
            if not path.is_file():
                return None
            note = json.loads(path.read_bytes())
            file = self.out / shard_name(self.source, k)
            if note["shard"] and not (file.is_file() and file.stat().st_size == note["shard"]["bytes"]):
                return None
            self._done[k] = note
        return self._done[k]

    def complete(self, shard_size: int) -> bool:
        """Whether there is nothing left to do: all shards are finished, there, and in the manifest."""
        if not self.manifest.exists():
            return False
        return self.complete_of(-(-len(self.read_inputs()) // shard_size))

    def complete_of(self, shards: int) -> bool:
        """The same of so many shards."""
        if not self.manifest.exists():
            return False
        notes = [self.finished(k) for k in range(shards)]
        try:
            listed = [shard.to_dict() for shard in Manifest.load(self.out).shards]
        except ManifestError:
            return False
        return all(notes) and listed == [note["shard"] for note in notes if note["shard"]]

    def claim(self, rank: int, world: int) -> Iterator[int]:
        """Shards for this process to write, its own share first; each stays locked until it is noted."""
        own = [k for k in range(self.shards) if k % world == rank]
        # from the far end: the other ranks begin at the near one
        others = [k for k in reversed(range(self.shards)) if k % world != rank]
        for k in own + others:
            if self.finished(k):
                continue
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, k + 1)
            except BlockingIOError:
                continue
            if not self.finished(k):
                yield k

    def note(self, k: int, shard: Shard | None, fields: dict[str, Field], rejected: list[dict]) -> None:
        """Record shard k as finished; `shard` None where all its inputs were rejected."""
        note = {
            "shard": shard and shard.to_dict(),
            "fields": {name: asdict(field) for name, field in fields.items()},
            "rejected": rejected,
        }
        atomic_write(self.notes / f"{k:06d}.json", json.dumps(note).encode())
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, k + 1)

    def unfinished(self) -> list[int]:
        return [k for k in range(self.shards) if not self.finished(k)]

    def rejected(self) -> list[dict]:
        """What the finished shards left out: index, origin and reason of each input."""
        return [entry for k in sorted(self._done) for entry in self._done[k]["rejected"]]

    def merge(self, producers: dict[str, dict]) -> Manifest | None:
        """Write rejected.jsonl and, last, manifest.json from the notes of all shards; None if all was rejected.

        producers: the fingerprint of each group.
        """
        with self.lock():
            lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.rejected())
            atomic_write(self.out / "rejected.jsonl", lines.encode())
            done = [self._done[k] for k in range(self.shards) if self._done[k]["shard"]]
            if not done:
                return None
            fields = done[0]["fields"]
            for note in done:
                if note["fields"] != fields:
                    raise JobError(f"{note['shard']['name']}: has fields {note['fields']}, the first shard {fields}")
            fields = {name: Field(field["dtype"], tuple(field["shape"])) for name, field in fields.items()}
            manifest = Manifest.of(
                self.source,
                self.dataset_id,
                grouped(fields, BUCKETS, producers),
                [Shard.from_dict(note["shard"]) for note in done],
                null_sha256=sha256(self.out / "null.safetensors"),
            )
            for leftover in (*self.out.glob(".*.tmp"), *self.notes.glob(".*.tmp")):  # of writers that were killed
                leftover.unlink()
            manifest.save(self.out)
            return manifest
