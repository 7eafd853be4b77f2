"""Check a source, set bad shards aside, and rebuild a manifest."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from tinyflux.shards.discover import Found, assemble, examine, tars
from tinyflux.shards.format import ShardError, member_name, origin_hash, parse_key
from tinyflux.shards.manifest import Base, Manifest, ManifestError, base_of, groups_of, parse, read_small
from tinyflux.shards.schema import Group
from tinyflux.shards.shardfile import ShardFile
from tinyflux.shards.source import Source, base_url, check_null, open_file, open_layers
from tinyflux.util import files


class Check:
    """Checks one source, or one overlay against its base, with `workers` threads.

    deep: also hash every shard and decode every tensor. `faults` has one line per fault, `bad` the names of the shards
    with faults. Raises as `open_layers` if the source cannot be opened.
    """

    def __init__(self, url: str, *, deep: bool = False, workers: int = 1):
        layers = open_layers(url)
        self.source = Source(url, layers, {}, layers[0].manifest.dataset_id, layers[-1].manifest.sha256)
        self.manifest, self.deep, self.workers = layers[-1].manifest, deep, workers
        self.faults: list[str] = []
        self.bad: set[str] = set()
        self._keys: list[np.ndarray] = []  # for each shard, the indices in its keys

    def around(self) -> None:
        """Check everything besides the shards: the empty prompt, unlisted shards, an overlay's index."""
        layer = self.source.layers[-1]
        if self.manifest.null_sha256:
            try:
                check_null(layer)
            except (ValueError, FileNotFoundError) as error:
                self.faults.append(f"null.safetensors: {error}")
        if layer.store.cache is None:
            known = {shard.path for shard in self.manifest.shards}
            found = [path.relative_to(layer.store.path("")).as_posix() for path in tars(layer.store.path(""))]
            self.faults += [f"{path}: not in the manifest" for path in found if path not in known]
        base = self.source.manifest
        if base is not self.manifest:
            for shard, below in zip(self.manifest.shards, base.shards, strict=True):
                if not np.array_equal(shard.origins, below.origins):
                    self.faults.append(f"{shard.path}: the index has other origin hashes for it than the base's")

    def shards(self) -> Iterator[None]:
        """Check the shards one after the other."""
        with ThreadPoolExecutor(self.workers) as pool:
            checked = pool.map(partial(check_shard, self.source, deep=self.deep), range(len(self.manifest.shards)))
            for k, (found, keys, of_base) in enumerate(checked):
                if of_base:
                    self.faults.append(of_base)
                if found:
                    self._blame(k, found)
                self._keys.append(keys)
                yield
        self._repeated()

    def _blame(self, k: int, found: list[str]) -> None:
        shard = self.manifest.shards[k]
        self.faults += [f"{shard.path}{fault}" for fault in found]
        self.bad.add(shard.name)

    def _repeated(self) -> None:
        """Find keys that occur in two shards, for example in a shard that was copied."""
        keys = np.concatenate([np.empty(0, np.int64), *self._keys])
        owner = np.repeat(np.arange(len(self._keys)), [len(part) for part in self._keys])
        order = np.argsort(keys, kind="stable")
        for i in np.flatnonzero(keys[order][1:] == keys[order][:-1]).tolist():
            first, second = (int(owner[order[j]]) for j in (i, i + 1))
            if first != second and self.manifest.shards.name(second) not in self.bad:
                key = f"{self.manifest.dataset_id:04d}_{int(keys[order[i]]):09d}"
                self._blame(second, [f", sample {key}: is also in {self.manifest.shards[first].path}"])


def check_shard(source: Source, k: int, deep: bool) -> tuple[list[str], np.ndarray, str]:
    """(the faults of one shard, each with its place; the indices in its keys, int64; a fault of its base)."""
    nothing, file, of_base = np.empty(0, np.int64), None, ""
    for layer, shard in source.files(k):
        of_base = of_base or (f"{file.path}, of the base: {file.fault.why}" if file is not None and file.fault else "")
        try:
            file = open_file(layer, shard, file)
        except (OSError, ShardError) as error:
            why = error.why if isinstance(error, ShardError) else error.strerror or str(error)
            if isinstance(error, FileNotFoundError):
                why = "No such file"
            if layer is source.layers[-1]:
                return [f": {why}"], nothing, of_base
            return [], nothing, f"{layer.url}/{shard.path}, of the base: {why}"
    if file.base is not None and file.count and not (file.fault or of_base or any(file.samples)):
        return [": has none of the samples of its base's shard"], nothing, ""
    faults, indices = [f": {file.fault.why}"] if file.fault else [], []
    for row in range(file.count):
        try:
            indices.append(check_sample(file, row, layer.manifest, deep))
        except ShardError as error:
            said = file.samples[row] is None and (file.fault or of_base)
            if not said:
                faults.append(f", sample {error.key or row}: {error.why}")
    try:
        if deep and files.sha256(file.path) != shard.sha256:
            faults.append(": its sha256 is not the manifest's")
    except OSError as error:
        faults.append(f": cannot be read: {error.strerror}")
    return faults, np.array(indices, np.int64), of_base


def check_sample(file: ShardFile, row: int, manifest: Manifest, deep: bool) -> int:
    """The index in a row's key. Raises ShardError for a missing or extra member, or, if `deep`, for a bad one."""
    key, members = file.sample(row)
    captions = int(file.shard.captions[row])

    def fault(why: str) -> ShardError:
        return ShardError(file.path, key, why)

    wanted = set() if file.base is not None and "text" not in manifest.groups else {"json"}
    for name, group in manifest.groups.items():
        wanted |= {member_name(name, i) for i in range(captions)} if group.repeated else {member_name(name)}
    if missing := wanted - set(members):
        raise fault(f"lacks {', '.join(sorted(missing))}")
    if extra := set(members) - wanted - {"jpg", "json"}:
        raise fault(f"has {', '.join(sorted(extra))}, which the manifest does not know")
    if "text" in manifest.groups and not captions:
        raise fault("has no caption")
    try:
        dataset_id, index = parse_key(key)
    except ValueError as error:
        raise fault(str(error)) from error
    if dataset_id != manifest.dataset_id:
        raise fault(f"its dataset id is {dataset_id}, the manifest's {manifest.dataset_id}")
    if not deep:
        return index
    for name, group in manifest.groups.items():
        for caption in range(captions if group.repeated else 1):
            file.decode(row, caption=caption, groups=(name,))
    if "json" in members:
        meta = file.meta(row)
        if meta.get("index") != index:
            raise fault(f"its .json has index {meta.get('index')!r:.40}")
        if "text" in manifest.groups and len(meta["prompts"]) != captions:
            raise fault(f"its .json has {len(meta['prompts'])} prompts, the index says {captions}")
        if origin_hash(meta["origin"]) != int(file.origins[row]):
            raise fault("the index has another origin hash for it")
    return index


def set_aside(folder: Path, bad: set[str]) -> None:
    """Move bad shards to `bad/` and remove them from the manifest; an overlay's manifest keeps them, like its base."""
    manifest = Manifest.load(folder)
    (folder / "bad").mkdir(exist_ok=True)
    for shard in manifest.shards:
        if shard.name in bad and (folder / shard.path).exists():
            os.replace(folder / shard.path, folder / "bad" / shard.name)
    if manifest.base is None:
        manifest.without(bad).save(folder)


def rebuild(folder: Path) -> Manifest:
    """Write the manifest again from the readable shards.

    Fingerprints, timesteps and an overlay's base come from manifest.json if only the index is lost, else from the
    build's notes in `.build/`. Raises ValueError if there is no intact shard, or an overlay's base cannot be opened;
    FileNotFoundError without null.safetensors.
    """
    known, base = _known(folder)
    found: list[Found] = []
    unreadable = []
    for path in tars(folder):
        try:
            found.append(examine(path))
        except (ValueError, OSError) as error:
            unreadable.append(f"{path.name} ({error})")
    if not found:
        raise ValueError(f"{folder}: no manifest can be rebuilt: no intact shard; {', '.join(unreadable) or 'no tar'}")
    if base is not None:
        below = open_layers(base_url(os.fspath(folder), base.location))[0].manifest
        shapes = {shard.name: shard.shape for shard in below.shards}  # few groups depend on the latent shape
        for entry in found:
            entry.shard = replace(entry.shard, shape=shapes.get(entry.shard.name, entry.shard.shape))
    try:
        manifest = assemble(folder, found, known=known, base=base)
    except ManifestError as error:
        if base is None and "text" not in found[0].groups:
            raise ValueError(
                f"{folder}: no manifest can be rebuilt: this is an overlay, and neither manifest.json nor .build/ names"
                " its base: run the build command again, or restore manifest.json from a copy"
            ) from error
        raise
    manifest.save(folder)
    return manifest


def _known(folder: Path) -> tuple[dict[str, Group], Base | None]:
    """Groups and base of a source without a usable manifest."""
    try:
        data = parse(read_small(folder / "manifest.json"), str(folder / "manifest.json"))
        return groups_of(data), base_of(data)
    except (ManifestError, FileNotFoundError):
        notes = folder / ".build" / "config.json"
        data = json.loads(notes.read_bytes()) if notes.is_file() else {}
        groups = {name: Group({}, producer=producer) for name, producer in data.get("producers", {}).items()}
        return groups, base_of({"base": data.get("base")})
