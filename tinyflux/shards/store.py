"""Where sources live: opening one by its path, and its shards as files with a table of samples."""

import hashlib
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor

from tinyflux.shards.adopt import adopt, origin_of
from tinyflux.shards.cache import SCHEMES, NodeCache, RemoteStore
from tinyflux.shards.format import GROUPS, SUFFIX, Field, ShardError, decode_member, member_limit, read_member, scan
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.writer import Shard

ACCEPTED = "a folder, file:///folder, hf://datasets/USER/REPO[@REVISION][/FOLDER], s3://, gs:// or http(s)://"


class ShardFile:
    """An open shard: `samples` in row order, read by position, so any number of threads may share it.

    A shard that is cut short or damaged keeps the samples before the fault, and `fault` says what it was.
    Raises FileNotFoundError, or ShardError where the file is another one than the manifest describes.
    The descriptor lives as long as the object: eviction never pulls a file from under a reader.
    """

    def __init__(self, path: str | Path, shard: Shard):
        self.path = os.fspath(path)
        self._fd = os.open(self.path, os.O_RDONLY)
        self.count = shard.count
        self.samples, self.fault = scan(self._fd, self.path)
        if self.fault is None:
            size, count = os.fstat(self._fd).st_size, len(self.samples)
            # a tar's size is rounded to 10 KiB, so that another build's shard may well have the same
            if size != shard.bytes or count > shard.count or not self._has_origins_of(shard):
                why = f"is not the shard of the manifest ({size} bytes with {count} samples"
                why = f"{why}, expected {shard.bytes} with {shard.count}): it was replaced, or the manifest was"
                raise ShardError(self.path, why=why)

    def _has_origins_of(self, shard: Shard) -> bool:
        """Whether the first, middle or last sample is the one that the manifest says; one may be damaged."""
        if not self.samples:
            return False
        hashes, last = shard.origin_hashes, len(self.samples) - 1
        return any(origin_of(self._fd, self.samples[row]) == hashes[row] for row in (0, last // 2, last))

    def __del__(self):
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def key(self, row: int) -> str:
        """The sample key of a row. Raises ShardError for a row behind the shard's fault."""
        if row >= len(self.samples):
            why = self.fault.why if self.fault else f"has {len(self.samples)} samples, the manifest says {self.count}"
            raise ShardError(self.path, self.fault.key if self.fault else "", f"no row {row}: {why}")
        return self.samples[row].key

    def decode(self, row: int, groups: dict[str, dict[str, Field]], out: dict[str, np.ndarray] | None = None):
        """Decode the groups of a row into `out` (see `format.decode_member`), or return {name: tensor}."""
        key, tensors = self.key(row), {}
        for group, fields in groups.items():
            place = self.samples[row].members.get(group + SUFFIX)
            if place is None:
                raise ShardError(self.path, key, f"member {group}{SUFFIX} is missing")
            offset, size = place
            if size > member_limit(fields):
                raise ShardError(self.path, key, f"member {group}{SUFFIX} has {size} bytes, far more than its fields")
            tensors |= decode_member(read_member(self._fd, offset, size), fields, out, (self.path, key)) or {}
        return tensors

    def read(self, row: int, extension: str) -> bytes:
        """The bytes of a member such as "json" or "jpg". Raises ShardError where it is missing."""
        place = self.samples[row].members.get(extension)
        if place is None:
            raise ShardError(self.path, self.key(row), f"member {extension} is missing")
        return read_member(self._fd, *place)


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
