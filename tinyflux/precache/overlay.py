"""`--only`: build more groups, or other captions, for the rows of a finished source, as its overlay.

Shards, counts and keys are the base's; all other groups stay in the base and are not copied.
"""

import io
import json
import os
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyflux.precache import models
from tinyflux.precache.config import BuildConfig, Place
from tinyflux.precache.from_images import FromImages
from tinyflux.precache.images import Rejected, content_hash, preview
from tinyflux.precache.kinds.base import ImageSource, Input
from tinyflux.precache.ledger import Ledger, LedgerError
from tinyflux.precache.listing import Counted, Parted
from tinyflux.precache.work import Ready, Task, Work
from tinyflux.shards.format import encode_sample, origin_hash, parse_key, sample_key
from tinyflux.shards.manifest import Base, Manifest, diff_fingerprints, shard_name
from tinyflux.shards.shardfile import ShardFile
from tinyflux.util.settings import did_you_mean

LIKENESS = 4.0  # mean difference (of 255) of previews of one image: library versions give less, other images more


class Overlay(FromImages):
    """Builds an overlay for `sharding.build --only` from a source and its finished base.

    Raises FileNotFoundError; LedgerError if the base cannot have such an overlay.
    """

    def __init__(self, config: BuildConfig, source: ImageSource, ledger: Ledger, place: Place):
        super().__init__(config, source, ledger, place)
        self.groups, self.inputs = groups_of(config.only), None
        where = config.old or f"data/{source.name}"
        if "://" in where:
            raise LedgerError(f"--from {where}: must be a local folder; get a copy with python -m sharding.pull")
        self.folder = Path(where)
        if not (self.folder / "manifest.json").is_file():
            raise FileNotFoundError(f"--from {where}: not a finished source: there is no manifest.json")
        if ledger.out.resolve() == self.folder.resolve():
            raise LedgerError(f"--out {ledger.out}: is the base itself, which must not change; choose another folder")
        self.manifest = manifest = Manifest.load(self.folder)
        if manifest.base is not None:
            raise LedgerError(f"--from {where}: is an overlay; name its base, {manifest.base.location}")
        if (manifest.source, manifest.dataset_id) != (source.name, source.dataset_id):
            raise LedgerError(
                f"--from {where}: is [{manifest.source}] with dataset_id {manifest.dataset_id}, not that of "
                f"[{source.name}]"
            )
        there = next((group.timesteps for group in manifest.groups.values() if group.timesteps), None)
        if there is not None:  # a build gives all teachers the same timesteps
            if config.timesteps not in (None, len(there)):
                raise LedgerError(f"--timesteps {config.timesteps}: the teachers of {self.folder} have {len(there)}")
            self.timesteps = there
        self.shards = {self._number(shard.name): k for k, shard in enumerate(manifest.shards)}
        if not self.shards:
            raise LedgerError(f"--from {where}: its manifest lists no shards")
        self.base_ledger = Ledger(self.folder, source.name, source.dataset_id)
        """What is known of the base's build."""
        ledger.subfolders = self.base_ledger.subfolders = manifest.subfolders
        self.base = Base(os.path.relpath(self.folder.resolve(), ledger.out.resolve()), manifest.sha256)

    def _number(self, name: str) -> int:
        number = name.removeprefix(f"{self.source.name}-").removesuffix(".tar")
        if not number.isdigit() or shard_name(self.source.name, int(number)) != name:
            raise LedgerError(f"--from {self.folder}: {name} is not a shard name that a build gives")
        return int(number)

    @property
    def of_images(self) -> bool:
        """Whether images are needed, not only captions."""
        return set(self.groups) != {"text"}

    @cached_property
    def notes(self) -> dict:
        """The settings of the base's build, as far as they are known."""
        path = self.base_ledger.notes / "config.json"
        return json.loads(path.read_bytes())["settings"] if path.is_file() else {}

    def asked(self, begun: dict) -> dict:
        self.settings = super().asked(begun or self.notes)["settings"]
        for name in ("lune", "sol", "preview", "shapes"):  # the base decides these
            del self.settings[name]
        return {"settings": self.settings, "only": {"groups": sorted(self.groups), "base": self.manifest.sha256}}

    def check(self, begun: dict) -> None:
        models.check_revisions(self.config, begun.get("producers", {}), self.ledger.out)
        self._tell_parts()

    def _tell_parts(self) -> None:
        self.ledger.parts, self.ledger.total = sorted(self.shards), self.manifest.count

    def probe(self) -> None:
        if self.of_images or self.source.parts() is None:
            super().probe()

    def load(self, begun: dict) -> dict[str, dict]:
        from tinyflux.precache.extract import load_for, models_of

        kept = {name: group.producer for name, group in self.manifest.groups.items() if name not in self.groups}
        needed = set(models_of(self.groups))
        known = {name: {m: v for m, v in each.items() if m in needed} for name, each in kept.items()}
        device = models.device_of(self.config, self.settings, self.place)
        self.zoo = models.zoo_of(self.config, device, begun.get("producers") or known)
        self.size = self.source.size or self.zoo.image_size
        torch.set_num_threads(self.settings["threads"])
        load_for(self.zoo, self.groups)
        if self.config.compile:
            self.zoo.compile()
        made = models.producers_of(self.zoo, self.groups, self.pictures, self.config)
        differing = []
        for new in made.values():
            for old in kept.values():
                both = new.keys() & old.keys()
                differing += diff_fingerprints({k: old[k] for k in both}, {k: new[k] for k in both})
        if differing:
            lines = "\n  ".join(dict.fromkeys(differing))
            raise LedgerError(
                f"{self.folder}: the new groups would not match the base (old against new):\n"
                f"  {lines}\nUse the old settings, or build the source again"
            )
        return made

    def take_inputs(self) -> None:
        self._tell_parts()
        self.inputs = self._inputs()

    def _inputs(self) -> dict[str, Input] | None:
        """The source's current inputs by origin; None if the base's listing is enough."""
        if "text" not in self.groups and self.listing.load():
            return None
        source = self.source
        if source.parts() is None:
            listing = Counted(self.ledger.notes / "inputs", source, self.config.seed, part_size=1)
            listing.size = self.size
            found = {item.origin: item for item in listing.now()}
        else:
            found = {item.origin: item for name, _ in source.parts() for item in source.inputs_of(name)}
        file = self.open(min(self.shards))
        origins = [file.meta(row)["origin"] for row in range(file.count)]
        if not any(origin in found for origin in origins):
            raise LedgerError(f"[{source.name}] has none of the images of {file.path}, such as {origins[0]}: moved?")
        return found

    @cached_property
    def listing(self):
        """The base's inputs, as listed by its build."""
        folder = self.folder / ".build" / "inputs"
        if self.source.parts() is not None:
            return Parted(folder, self.source, self.config.seed)
        return Counted(folder, self.source, self.config.seed, part_size=self.notes.get("shard_size", 1))

    def open(self, number: int) -> ShardFile:
        """A shard of the base. Raises FileNotFoundError, ShardError."""
        shard = self.manifest.shards[self.shards[number]]
        return ShardFile(self.folder / shard.path, shard, self.manifest.groups)

    @property
    def pictures(self) -> dict:
        return super().pictures | {"shapes": self.manifest.groups["latents"].producer.get("shapes")}

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        factor = self.zoo.factor
        return [(h * factor, w * factor) for h, w in self.manifest.shapes]

    @property
    def several_shapes(self) -> bool:
        return len(self.manifest.shapes) > 1

    def works(self, part: int) -> list[Work]:
        file, tasks, note = self.open(part), [], self.base_ledger.note_of(part)
        contents = note["contents"] if note else {}
        latent = self.manifest.shapes.index(self.manifest.shards[self.shards[part]].shape)
        if file.fault:
            raise file.fault
        for row in range(file.count):
            index, meta = parse_key(file.key(row))[1], file.meta(row)
            content = contents.get(str(index))
            tasks.append(Task(index, meta["origin"], partial(self.reread, file, row, index, meta, latent, content)))
        return [Work(part, tasks, self.manifest.shards[self.shards[part]].shape)]

    def reread(self, file: ShardFile, row: int, index: int, meta: dict, shape: int, content: str | None) -> Ready:
        """Read a sample of the base and its image again, in a thread. `content`: the hash of its image and captions, if
        it is known. Raises Rejected."""
        seed, item = self.seed_of(index), self._item(index, meta["origin"])
        prompts = self.source.prompts(item, seed) if "text" in self.groups else meta["prompts"]
        picture = None
        if self.of_images:
            image = self.source.read_image(item)
            picture = self.cut(image, seed, self.shapes[shape])
            found, was = [[list(picture.size), list(picture.crop)], [meta["size"], meta["crop"]]]
            if found != was:
                raise Rejected(f"image has changed: size and crop are {found}, were {was}")
            if (shown := file.preview(row)) is not None:
                if not alike(preview(picture.pixels), shown):
                    raise Rejected("image has changed: it looks unlike the preview")
            elif content not in (None, content_hash(image, meta["prompts"])):
                raise Rejected("image has changed: its bytes have another hash")
        elif self.source.by_number and content is not None:
            if content_hash(self.source.read_image(item), meta["prompts"]) != content:
                raise Rejected("image has changed: its bytes have another hash")
        return Ready(index, meta["origin"], seed, prompts, picture, meta=meta)

    def done_with(self, part: int) -> None:
        """Keep the files of the images, because shards of other parts may need them."""

    def changes(self) -> str:
        return ""

    def _item(self, index: int, origin: str) -> Input:
        if self.inputs is None:
            part, row = divmod(index, self.listing.stride)
            item = self.listing.rows(part)[row][1]
            if item.origin == origin:
                return item
            raise Rejected(f"the base's listing has another image with this number, {item.origin}")
        if origin not in self.inputs:
            raise Rejected("image is gone: the source has none of this origin now")
        return self.inputs[origin]

    def rejected(self, index: int, origin: str, reason: Rejected) -> dict:
        raise ValueError(
            f"{origin} (sample {sample_key(self.source.dataset_id, index)} of {self.folder}): {reason}. An overlay"
            " needs all rows of its base: restore the image, or build the source again"
        )

    def null(self) -> dict[str, Tensor] | None:
        return super().null() if "text" in self.groups else None

    def pack(self, ready: Ready, tensors: dict[str, Tensor]) -> dict:
        meta = {**ready.meta, "prompts": list(ready.prompts)} if "text" in self.groups else None
        key = sample_key(self.source.dataset_id, ready.index)
        return encode_sample(key, tensors, meta, origin=origin_hash(ready.origin))


def groups_of(only: Iterable[str]) -> tuple[str, ...]:
    """The groups of --only: teachers by their group, captions as `prompt`. Raises ValueError."""
    from tinyflux.precache.extract import EXTRACTORS

    known = {"prompt" if group == "text" else group: group for group in EXTRACTORS if group != "latents"}
    for name in only:
        if name not in known:
            raise ValueError(f"--only {name}: {did_you_mean(name, known)}")
    return tuple(group for name, group in known.items() if name in only)


def alike(a: bytes, b: bytes) -> bool:
    """Whether these are previews of the same image."""
    if a == b:
        return True
    first, second = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) for data in (a, b))
    return first.shape == second.shape and float(np.abs(first - second).mean()) <= LIKENESS
