"""Where the files of sources live, and the shards that are open now."""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from tinyflux.shards.remote import RemoteStore
from tinyflux.shards.shardfile import ShardFile

if TYPE_CHECKING:  # a source has a store
    from tinyflux.shards.source import Source


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


class OpenShards:
    """The shards of a run's sources that are open now: at most `limit`, the least recently used dropped first.

    `opened` counts how often a remote one was opened.
    """

    def __init__(self, sources: "list[Source]", limit: int = 64):
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
