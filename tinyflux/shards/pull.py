"""A copy of a remote source in a folder: every file checked, the manifest written last."""

import os
import shutil
from pathlib import Path

from tqdm import tqdm

from tinyflux.shards.cache import NodeCache
from tinyflux.shards.clients import DownloadError
from tinyflux.shards.index import FILE as INDEX
from tinyflux.shards.manifest import Manifest, parse
from tinyflux.shards.remote import RemoteStore
from tinyflux.shards.source import open_source
from tinyflux.shards.writer import Shard
from tinyflux.util import files


def is_whole(path: Path, shard: Shard) -> bool:
    """Whether the file is the manifest's shard, by size and hash."""
    if not path.is_file() or path.stat().st_size != shard.bytes:
        return False
    return files.sha256(path) == shard.sha256


def pull(url: str, out: Path) -> tuple[Manifest, int]:
    """Copy a source. Returns its manifest and how many shards were fetched.

    Raises ValueError where `out` has another source, DownloadError, OSError.
    """
    out.mkdir(parents=True, exist_ok=True)
    incoming = out / ".pull"
    store = RemoteStore(url, NodeCache(incoming, limit=1 << 62))
    where = f"{url}/manifest.json"
    entry = parse(store.manifest, where)["index"]
    index = store.fetch(INDEX, entry["bytes"], entry["sha256"])
    manifest = Manifest.from_parts(store.manifest, index, where)
    old: set[str] = set()
    if (out / "manifest.json").is_file():
        there = Manifest.load(out)
        old = {shard.path for shard in there.shards}
        if (there.source, there.dataset_id) != (manifest.source, manifest.dataset_id):
            raise ValueError(
                f"{out} holds {there.source!r} with dataset id {there.dataset_id}, {url} is {manifest.source!r} with "
                f"{manifest.dataset_id}: choose another folder"
            )
    fetched = 0
    for shard in tqdm(manifest.shards, manifest.source, unit="shard"):
        if not is_whole(out / shard.path, shard):
            (out / shard.path).parent.mkdir(exist_ok=True)
            os.replace(store.fetch(shard.path, shard.bytes, shard.sha256), out / shard.path)
            fetched += 1
    os.replace(index, out / INDEX)
    if manifest.null_sha256:  # an overlay without texts has none
        os.replace(store.fetch("null.safetensors", None, manifest.null_sha256), out / "null.safetensors")
    try:
        os.replace(store.fetch("rejected.jsonl"), out / "rejected.jsonl")
    except DownloadError as error:
        if not error.missing:
            raise  # a source may lack that file; a store that does not answer is a failure
    files.atomic_write(out / "manifest.json", store.manifest)
    for name in old - {shard.path for shard in manifest.shards}:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(incoming)
    open_source(out)
    return manifest, fetched
