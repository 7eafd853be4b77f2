"""`--only`: some fields of a finished source made anew, all others copied, into a new source beside the old one.

Shards, keys and rejects are the old source's. A member that is not made anew is copied byte for byte; what a full build
with the same models would have written comes out.
"""

import hashlib
import io
import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from tinyflux.precache.engine import Engine, Ready
from tinyflux.precache.extract import EXTRACTORS, models_of, whole
from tinyflux.precache.images import Picture, Rejected, preview
from tinyflux.precache.inputs import Input, caption
from tinyflux.precache.ledger import Job, JobError
from tinyflux.precache.sources import SourceSpec
from tinyflux.shards.format import ShardError, encode_sample, member_name, parse_key, sample_key
from tinyflux.shards.manifest import Manifest, diff_fingerprints, shard_name
from tinyflux.shards.schema import GROUP_OF, SCHEMA, Field, flat
from tinyflux.shards.shardfile import ShardFile
from tinyflux.util import rng

FIELDS = {"lune": "lune", "sol": "sol", "prompt": "text"}
"""What --only takes, and the part of a sample that it is."""
LIKENESS = 4.0  # of 255, on average: more than libraries' versions change a preview by, less than another image does


class Old:
    """The finished source that fields are taken from. Raises FileNotFoundError, ValueError."""

    def __init__(self, place: str, spec: SourceSpec):
        if "://" in place:
            raise JobError(f"--from {place}: must be a folder here; fetch it with python -m sharding.pull")
        folder = Path(place)
        if not (folder / "manifest.json").is_file():
            raise FileNotFoundError(f"--from {folder}: no finished source is there, for it has no manifest.json")
        self.folder, self.manifest = folder, Manifest.load(folder)
        name, dataset_id = self.manifest.source, self.manifest.dataset_id
        if (name, dataset_id) != (spec.name, spec.dataset_id):
            raise JobError(f"--from {folder}: is [{name}] with dataset_id {dataset_id}, not that of [{spec.name}]")
        self.identity = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
        self.shards = {}
        for shard in self.manifest.shards:
            number = shard.name.removeprefix(f"{name}-").removesuffix(".tar")
            if not number.isdigit() or shard_name(name, int(number)) != shard.name:
                raise JobError(f"--from {folder}: {shard.name} is not named as a build names shards")
            self.shards[int(number)] = shard
        if not self.shards:
            raise JobError(f"--from {folder}: its manifest lists no shards")
        config, inputs = folder / ".build" / "config.json", folder / ".build" / "inputs.jsonl.zst"
        self.settings: dict = json.loads(config.read_bytes())["settings"] if config.is_file() else {}
        self.inputs = inputs.read_bytes() if inputs.is_file() else None
        self.rejected = self._rejected()

    @property
    def parts(self) -> set[str]:
        """The parts of a sample that it has."""
        return set(self.manifest.groups)

    @property
    def sizes(self) -> list[int]:
        """Samples and rejects of each shard, by its number."""
        last = max((*self.shards, *self.rejected))
        return [
            (self.shards[k].count if k in self.shards else 0) + len(self.rejected.get(k, ())) for k in range(last + 1)
        ]

    def _rejected(self) -> dict[int, list[dict]]:
        """The rejects by the number of the shard that they would have been in."""
        path, found = self.folder / "rejected.jsonl", defaultdict(list)
        entries = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        if entries and (size := self.settings.get("shard_size")):
            for entry in entries:
                found[entry["index"] // size].append(entry)
        elif entries:  # without the notes of its build: after the last shard that begins before them
            numbers = sorted(self.shards)
            firsts = [parse_key(self.open(k).key(0))[1] for k in numbers]
            for entry in entries:
                found[numbers[max(0, bisect_right(firsts, entry["index"]) - 1)]].append(entry)
        return dict(found)

    def open(self, k: int) -> ShardFile:
        """Shard k. Raises FileNotFoundError, ShardError."""
        return ShardFile(self.folder / self.shards[k].path, self.shards[k], self.manifest.groups)

    def open_checked(self, k: int) -> ShardFile:
        """Shard k, every byte of it checked: what is copied from it gets a new checksum."""
        file = self.open(k)
        if file.fault is None:
            with open(file.path, "rb") as data:
                if hashlib.file_digest(data, "sha256").hexdigest() == self.shards[k].sha256:
                    return file
        why = file.fault.why if file.fault else "its sha256 is not the manifest's"
        raise ShardError(file.path, why=f"{why}, so nothing is copied from it; see python -m sharding.verify")

    def fingerprint(self, redo: set[str], made: dict, teacher_input: str) -> dict:
        """The fingerprint with `redo` made anew by the zoo whose fingerprint is `made`.

        Raises JobError where a model that is needed for both what is kept and what is made anew is not the same.
        """
        old, kept = whole(self.manifest.groups), set(models_of(self.parts - redo))
        new = set(models_of(redo))
        self.compare({name: made[name] for name in kept & new})
        every = models_of(EXTRACTORS)
        models = {name: made[name] if name in new else old.get(name) for name in every if name in kept | new}
        rest = {name: value for name, value in old.items() if name not in every}
        if "text" in redo:
            rest["t5_length"] = made["t5_length"]
        if redo & {"lune", "sol"}:
            rest["teacher_input"] = teacher_input
        return models | rest

    def compare(self, asked: dict) -> None:
        """Raises JobError with what of a fingerprint is not as in this source, though it must be."""
        made = whole(self.manifest.groups)
        old = {name: made.get(name) for name in asked}
        if differing := diff_fingerprints(old, asked):
            lines = "\n  ".join(differing)
            raise JobError(
                f"{self.folder}: what is made anew would not fit what is kept (there, against what is asked for):\n"
                f"  {lines}\nAsk for the same, or build the source anew"
            )


def needed(spec: SourceSpec, seed: int, dtype: str, size: int, old: Old, redo: set[str], teacher_input: str) -> dict:
    """What of the fingerprint must be as it was, for those parts to be made anew."""
    asked = {"seed": seed, "dtype": dtype}
    if redo & {"lune", "sol"}:
        asked |= {"resolution": size, "crop": spec.crop}
        if old.parts & {"lune", "sol"} - redo:
            asked["teacher_input"] = teacher_input
    return asked


@dataclass
class Refit(Engine):
    """An engine that makes the parts `redo` of the samples of `old` anew."""

    old: Old = None
    redo: set[str] = field(default_factory=set)
    items: dict[str, list[Input]] = field(default_factory=dict)
    """The source's inputs now, by origin."""
    nth: list[int] | None = None
    """The how-manieth of its origin an input was, by ordinal; None where the old source cannot tell."""

    def match(self, inputs: list[Input], rows: list[tuple[str, str] | None] | None) -> None:
        """Take in the source's inputs now and those that the old one was built of. Raises JobError."""
        for item in inputs:
            self.items.setdefault(item.origin, []).append(item)
        if rows is not None:
            seen, self.nth = Counter(), []
            for row in rows:
                self.nth.append(seen[row[0]] if row else 0)
                seen[row[0] if row else None] += 1
        first = self.old.open(min(self.old.shards))
        origins = [json.loads(first.read(row, "json"))["origin"] for row in range(len(first.samples))]
        if not any(origin in self.items for origin in origins):
            raise JobError(
                f"[{self.spec.name}] has none of the images of {first.path}, such as {origins[0]}: has it moved?"
            )

    def tasks(self, shards: Iterable[int], inputs: list, shard_size: int) -> Iterator[tuple]:
        """Every sample and every reject of the old source's shards."""
        for k in shards:
            entries = [(entry["index"], entry["origin"], entry["reason"]) for entry in self.old.rejected.get(k, ())]
            tasks = [(index, origin, partial(Rejected, reason)) for index, origin, reason in entries]
            if k in self.old.shards:
                file = self.old.open_checked(k)
                for row in range(file.count):
                    index, meta = parse_key(file.key(row))[1], json.loads(file.read(row, "json"))
                    tasks.append((index, meta["origin"], partial(self.reread, file, row, index, meta)))
            for index, origin, read in sorted(tasks, key=lambda task: task[0]):
                yield k, index, origin, read

    def reread(self, file: ShardFile, row: int, index: int, meta: dict) -> Ready | Rejected:
        """A sample as it is, in a thread, with what is needed to make parts of it anew."""
        seed = rng.signed_key(self.seed, self.spec.dataset_id, index)
        with self.stages.time("decode"):
            members = {extension: file.read(row, extension) for extension in file.sample(row).members}
            kept = {member_name(group, 0 if SCHEMA[group].repeated else None) for group in self.kept_groups}
            if missing := kept - members.keys():
                raise ShardError(file.path, file.key(row), f"member {min(missing)} is missing")
            try:
                items = self.items.get(meta["origin"])
                if not items:
                    raise Rejected("image is gone: the source has none of this origin now")
                prompt = meta["prompts"][0]
                if "text" in self.redo:
                    prompt = caption(self.spec, self._captioned(index, items), seed)
                picture = self._picture(items[0], seed, meta, members) if self.redo - {"text"} else None
            except Rejected as reason:
                return reason
        return Ready(index, meta["origin"], seed, prompt, picture, members)

    @property
    def kept_groups(self) -> set[str]:
        """The groups of members that are needed of every old sample."""
        return set(self.old.manifest.groups) - self.redo

    def _captioned(self, index: int, items: list[Input]) -> Input:
        """Of the inputs of one image the one that this sample was made of."""
        if self.nth is None:
            if len(items) > 1:
                raise JobError(
                    f"{self.old.folder}: has no notes of its build, which would tell which of the {len(items)} captions"
                    f" of {items[0].origin} a sample had: build the source anew"
                )
            return items[0]
        if self.nth[index] >= len(items):
            raise Rejected(f"missing caption: its image had caption {self.nth[index] + 1}, now there are {len(items)}")
        return items[self.nth[index]]

    def _picture(self, item: Input, seed: int, meta: dict, members: dict[str, bytes]) -> Picture:
        """The sample's image. Raises Rejected where it is not the one that the sample was made of."""
        picture = self.cut(item, seed)
        found, was = [[list(picture.size), list(picture.crop)], [meta["size"], meta["crop"]]]
        if found != was:
            raise Rejected(f"image has changed: size and crop are {found}, were {was}")
        if "jpg" in members and not alike(preview(picture.pixels), members["jpg"]):
            raise Rejected("image has changed: it looks unlike the sample's preview")
        return picture

    def members(self, ready: Ready, tensors: dict[str, Tensor]) -> dict:
        """The sample's members: the new ones and the rest as it was."""
        key, meta = sample_key(self.spec.dataset_id, ready.index), json.loads(ready.members["json"])
        if "text" in self.redo:
            meta |= {"prompts": [ready.prompt]}
        made = encode_sample(key, tensors, meta)
        if "text" not in self.redo:
            made["json"] = ready.members["json"]
        return ready.members | made | {"__shape__": self.old.manifest.shapes[0]}

    def finish(self, job: Job, k: int, pending: list, rejected: list[dict], fields: dict[str, Field]) -> None:
        """Write shard k and its note, in a thread."""
        known = flat(self.old.manifest.groups) | fields
        order = [name for name in GROUP_OF if name in known]
        super().finish(job, k, pending, rejected, {name: known[name] for name in order} if fields else {})


def with_entries(job: Job, shards: Iterable[int]) -> Iterator[int]:
    """The shards that have samples or rejects; the others are noted as finished."""
    for k in shards:
        if job.sizes[k]:
            yield k
        else:
            job.note(k, None, {}, [])


def alike(a: bytes, b: bytes) -> bool:
    """Are these previews of one picture?"""
    if a == b:
        return True
    first, second = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) for data in (a, b))
    return first.shape == second.shape and float(np.abs(first - second).mean()) <= LIKENESS
