"""Where sources live: opening one by its path, and its shards as files with a table of samples."""

import hashlib
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from tinyflux.shards.discover import adopt
from tinyflux.shards.format import GROUPS, Field
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.remote import SCHEMES, NodeCache, RemoteStore
from tinyflux.shards.shardfile import ShardFile

ACCEPTED = "a folder, file:///folder, hf://datasets/USER/REPO[@REVISION][/FOLDER], s3://, gs:// or http(s)://"


class LocalStore:
    """The files of a source in a local folder."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def fetch(self, name: str, size: int | None = None, sha256: str | None = None) -> Path:
        """The path of a file; it is not read here. Raises FileNotFoundError."""
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        return path


@dataclass
class Source:
    """A source of a run. `url` as configured; `null` the empty prompt's `t5_embeds` [L, D] and `clip_pooled` [D];
    `dataset_id` may differ from the manifest's; `revision` pins the content: a Hub commit, or the manifest's SHA-256;
    `groups` are the groups of tensors that the run reads."""

    url: str
    store: LocalStore | RemoteStore
    manifest: Manifest
    null: dict[str, Tensor]
    dataset_id: int
    revision: str
    groups: tuple[str, ...] = tuple(GROUPS)

    @property
    def name(self) -> str:
        return self.manifest.source

    @property
    def fields(self) -> dict[str, dict[str, Field]]:
        """The fields of each group that is read and that the source has."""
        return {group: fields for group, fields in self.manifest.groups.items() if group in self.groups}

    def open(self, shard: int) -> ShardFile:
        """Open a shard by its index. Raises FileNotFoundError, ShardError."""
        entry = self.manifest.shards[shard]
        for tries_left in (2, 1, 0):
            try:
                return ShardFile(self.store.fetch(entry.name, entry.bytes, entry.sha256), entry)
            except FileNotFoundError:  # a cache that was emptied between the two calls
                if not tries_left or isinstance(self.store, LocalStore):
                    raise


def open_source(
    url: str | Path, dataset_id: int | None = None, cache: NodeCache | None = None, revision: str | None = None
) -> Source:
    """Open a source: read and check its manifest and null embeddings, nothing else.

    A local folder of shards without a manifest is read through once (see `adopt`). dataset_id overrides the
    manifest's. cache: where remote shards go. revision: of a `Source`, to get the same content again.
    Raises ValueError (ManifestError for the manifest), FileNotFoundError, and DownloadError for remote ones.
    """
    url = os.fspath(url)
    scheme, colon, _ = url.partition("://" if "://" in url else ":")
    if colon == "://" and scheme in SCHEMES:
        store = RemoteStore(url, cache or NodeCache(), revision)
        manifest, pinned = Manifest.from_json(store.manifest, f"{url}/manifest.json"), store.revision
    else:
        if colon and scheme != "file" and not os.path.exists(url):
            raise ValueError(f"source {url!r}: scheme {scheme!r} is not accepted; a source is {ACCEPTED}")
        store = LocalStore(os.path.abspath(url.removeprefix("file://")))
        if not store.root.is_dir():
            raise FileNotFoundError(f"source {url!r}: there is no folder {store.root}; a source is {ACCEPTED}")
        has_manifest = (store.root / "manifest.json").is_file()
        manifest = Manifest.load(store.root) if has_manifest else adopt(store.root, dataset_id)
        pinned = hashlib.sha256(manifest.to_json().encode()).hexdigest()
        if revision not in (None, pinned):
            raise ValueError(f"source {url}: its manifest is not the one of revision {revision}: it was rebuilt")
    null = _null(store.fetch("null.safetensors"), manifest)
    return Source(url, store, manifest, null, manifest.dataset_id if dataset_id is None else dataset_id, pinned)


def _null(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    try:
        null = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not readable: {error}") from error
    for name in ("t5_embeds", "clip_pooled"):
        shape = manifest.fields[name].shape
        if name not in null or tuple(null[name].shape) != shape:
            has = tuple(null[name].shape) if name in null else "missing"
            raise ValueError(f"{path}: {name} is {has}, the manifest's samples have {shape}")
        if not null[name].isfinite().all():
            raise ValueError(f"{path}: {name} has NaN or infinity")
    return null


class OpenShards:
    """The shards of a run's sources that are open now: at most `limit`, the least recently used dropped first.

    `opened` counts how often a remote one was opened.
    """

    def __init__(self, sources: list[Source], limit: int = 64):
        self.sources, self.limit = sources, limit
        self.opened = 0
        self.ahead = None  # the LookAhead of the stream that runs, if any
        self._lock = threading.Lock()
        self._slots: OrderedDict[tuple[int, int], _Slot] = OrderedDict()

    def get(self, source: int, shard: int) -> ShardFile:
        """The open shard; threads that want the same one wait for one opening. Raises as Source.open does."""
        ahead = self.ahead  # as it was before any waiting: one that is stopped meanwhile lets go
        with self._lock:
            slot = self._slots.setdefault((source, shard), _Slot())
            self._slots.move_to_end((source, shard))
            while len(self._slots) > self.limit:
                self._slots.popitem(last=False)
        with slot.lock:
            if slot.file is None:
                if ahead is not None:
                    ahead.need(source, shard)
                slot.file = self.sources[source].open(shard)
                if isinstance(self.sources[source].store, RemoteStore):
                    with self._lock:
                        self.opened += 1
            return slot.file


class _Slot:
    def __init__(self):
        self.lock, self.file = threading.Lock(), None
