"""Copy a remote source to a folder: every file is checked, the manifest is written last."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tinyflux.shards.cache import NodeCache
from tinyflux.shards.clients import DownloadError, repo_of
from tinyflux.shards.discover import tars
from tinyflux.shards.index import FILE as INDEX
from tinyflux.shards.index import number_of
from tinyflux.shards.manifest import Manifest, ManifestError, check_name, parse, read_small
from tinyflux.shards.remote import RemoteStore
from tinyflux.shards.source import base_url, open_source
from tinyflux.shards.writer import Shard
from tinyflux.util import files
from tinyflux.util.urls import redacted


def is_whole(path: Path, shard: Shard) -> bool:
    """Whether the file is the manifest's shard, by size and hash."""
    if not path.is_file() or path.stat().st_size != shard.bytes:
        return False
    return files.sha256(path) == shard.sha256


class Pulled(NamedTuple):
    """What a pull did. missing: if an overlay's base is not there, the base's URL and its expected folder."""

    manifest: Manifest
    fetched: int
    missing: tuple[str, Path] | None


def pull(url: str, out: Path, *, with_base: bool = False, revision: str | None = None) -> Pulled:
    """Copy a source or an overlay; with_base: also its base, to the path that it names. revision: see `Source`.

    Raises ValueError if `out` has another source or the base cannot be pulled, DownloadError, OSError.
    """
    out.mkdir(parents=True, exist_ok=True)
    incoming = out / ".pull"
    store = RemoteStore(url, NodeCache(incoming, limit=1 << 62), revision)
    where = f"{store.url}/manifest.json"
    entry = parse(store.manifest, where)["index"]
    index = store.fetch(INDEX, entry["bytes"], entry["sha256"])
    manifest = Manifest.from_parts(store.manifest, index, where)
    old, missing = _shards_there(out, store.url, manifest), None
    if manifest.base is not None and "://" not in manifest.base.location:
        below, there = base_url(url, manifest.base.location), Path(base_url(str(out), manifest.base.location))
        if there == Path(os.path.normpath(out)):
            raise ValueError(f"{out} is the place of the overlay's base, {redacted(below)}: choose another folder")
        if with_base:
            _check_beside(manifest.base.location, below)
            pin = store.revision if repo_of(url) else manifest.base.sha256
            pull(below, there, with_base=True, revision=pin)
        missing = None if (there / "manifest.json").is_file() else (redacted(below), there)
    fetched = 0
    for shard in tqdm(manifest.shards, manifest.source, unit="shard"):
        if not is_whole(out / shard.path, shard):
            (out / shard.path).parent.mkdir(exist_ok=True)
            os.replace(store.fetch(shard.path, shard.bytes, shard.sha256), out / shard.path)
            fetched += 1
    os.replace(index, out / INDEX)
    if manifest.null_sha256:  # an overlay without texts has no empty prompt
        os.replace(store.fetch("null.safetensors", None, manifest.null_sha256), out / "null.safetensors")
    try:
        os.replace(store.fetch("rejected.jsonl"), out / "rejected.jsonl")
    except DownloadError as error:
        if not error.lacks:
            raise  # a source may lack that file; a store that does not answer is a failure
    files.atomic_write(out / "manifest.json", store.manifest)
    for name in old - {shard.path for shard in manifest.shards}:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(incoming)
    if missing is None:
        open_source(out)
    return Pulled(manifest, fetched, missing)


def _shards_there(out: Path, url: str, manifest: Manifest) -> set[str]:
    """The shards of an earlier pull. Raises ValueError if the folder has another source."""
    if not (out / "manifest.json").is_file():
        return set()
    found = parse(read_small(out / "manifest.json"), str(out / "manifest.json"))
    names = [(at["source"], at["dataset_id"], bool(at["base"])) for at in (found, json.loads(manifest.to_json()))]
    if names[0] != names[1] or list(found["groups"]) != list(manifest.groups):
        what = [f"{'overlay on ' if base else ''}{name!r} with dataset id {number}" for name, number, base in names]
        groups = [", ".join(group for group in groups) for groups in (found["groups"], manifest.groups)]
        raise ValueError(
            f"{out} holds {what[0]} ({groups[0]}), {url} is {what[1]} ({groups[1]}): choose another folder"
        )
    try:
        return {shard.path for shard in Manifest.load(out).shards}
    except (ManifestError, FileNotFoundError):  # a pull was stopped between index and manifest
        paths = [path for path in tars(out) if number_of(manifest.source, path.name) is not None]
        return {path.relative_to(out).as_posix() for path in paths}


def _check_beside(location: str, url: str) -> None:
    """Raises ValueError if the base is not a folder beside the overlay: nothing is written anywhere else."""
    head, _, name = location.partition("/")
    if head != ".." or "/" in name:
        raise ValueError(
            f"the base is named as {location!r}, which is not a folder beside the overlay: pull it by itself, "
            f"python -m sharding.pull {redacted(url)} FOLDER, where FOLDER is the path that the overlay names"
        )
    check_name(name)
