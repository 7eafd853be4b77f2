"""Copy a source from the Hub, a bucket or a web server to a folder.

    python -m sharding.pull hf://datasets/USER/NAME/portraits data/portraits
    python -m sharding.pull hf://datasets/USER/NAME@REVISION/portraits data/portraits
    python -m sharding.pull s3://BUCKET/portraits data/portraits

Shards that are there with the right content are kept, so the same command resumes after a stop. Every file is checked
against the manifest, which is written last. The Hub's token is that of HF_TOKEN or of `hf auth login`.
"""

import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from tinyflux.shards.cache import NodeCache
from tinyflux.shards.clients import DownloadError
from tinyflux.shards.index import FILE as INDEX
from tinyflux.shards.manifest import Manifest, parse
from tinyflux.shards.remote import RemoteStore
from tinyflux.shards.source import open_source
from tinyflux.shards.writer import Shard
from tinyflux.util.files import atomic_write


@dataclass
class PullConfig:
    """What to pull, and to where."""

    url: tyro.conf.Positional[str]
    """hf://datasets/USER/REPO[@REVISION][/FOLDER], s3://, gs:// or http(s)://"""
    out: tyro.conf.Positional[Path]
    """Folder of the copy."""


def is_whole(path: Path, shard: Shard) -> bool:
    """Whether the file is the manifest's shard, by size and hash."""
    if not path.is_file() or path.stat().st_size != shard.bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256


def pull(url: str, out: Path) -> Manifest:
    """Copy a source. Raises ValueError where `out` has another source, DownloadError, OSError."""
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
    os.replace(store.fetch("null.safetensors", None, manifest.null_sha256), out / "null.safetensors")
    try:
        os.replace(store.fetch("rejected.jsonl"), out / "rejected.jsonl")
    except DownloadError as error:
        if not error.missing:
            raise  # a source may lack that file; a store that does not answer is a failure
    atomic_write(out / "manifest.json", store.manifest)
    for name in old - {shard.path for shard in manifest.shards}:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(incoming)
    open_source(out)
    print(f"{out}: {manifest.count} samples in {len(manifest.shards)} shards, {fetched} of them fetched")
    return manifest


def main(args: list[str] | None = None) -> int:
    """The command; `args` default to the process's own."""
    config = tyro.cli(PullConfig, prog="python -m sharding.pull", description=__doc__, args=args)
    try:
        pull(config.url, config.out)
        return 0
    except KeyboardInterrupt:
        print("stopped; run the same command to resume", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
