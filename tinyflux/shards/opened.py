"""The open shards of a run. Remote shards are downloaded ahead, and again if they are damaged."""

import logging
import threading
from collections import OrderedDict

from tinyflux.shards.format import ShardError
from tinyflux.shards.lookahead import LookAhead
from tinyflux.shards.plan import Plan
from tinyflux.shards.shardfile import ShardFile
from tinyflux.shards.source import Source

log = logging.getLogger(__name__)


class _Slot:
    def __init__(self):
        self.lock, self.file = threading.Lock(), None


class OpenShards:
    """The open shards: at most `limit`, the least recently used are closed first.

    opened: how often a remote shard was opened.
    """

    def __init__(self, sources: list[Source], limit: int = 64):
        self.sources, self.limit = sources, limit
        self.opened = 0
        self._late = 0  # of earlier look-aheads
        self._ahead: LookAhead | None = None
        self._lock = threading.Lock()
        self._slots: OrderedDict[tuple[int, int], _Slot] = OrderedDict()
        self._checked: set[tuple[int, int]] = set()  # shards whose checksum was compared after a fault
        self._remote = [any(layer.store.cache for layer in source.layers) for source in sources]
        self.caches = {layer.store.cache for source in sources for layer in source.layers} - {None}
        for cache in self.caches:
            cache.watch(self)

    def is_remote(self, source: int) -> bool:
        """Whether a source's shards are copied to the cache."""
        return self._remote[source]

    @property
    def late(self) -> int:
        """Number of remote shards that a reader had to wait for."""
        return self._late + (self._ahead.late if self._ahead else 0)

    def look_ahead(
        self,
        plan: Plan,
        rank: int,
        world: int,
        step: int,
        *,
        first: int,
        ranks_on_node: int,
        end_step: int | None = None,
    ) -> LookAhead | None:
        """Start a stream's downloads, for `get`. Returns None if no source is remote.

        ranks_on_node: how many ranks share the cache. Other arguments and errors are those of `LookAhead`.
        """
        if not self.caches:
            return None
        self._late = self.late
        self._ahead = LookAhead(
            self.sources,
            plan,
            rank,
            world,
            step,
            first=first,
            budget=min(cache.limit for cache in self.caches) // ranks_on_node,
            end_step=end_step,
        )
        return self._ahead

    def get(self, source: int, shard: int, ahead: LookAhead | None = None) -> ShardFile:
        """The open shard; threads that need the same shard share one opening.

        ahead: downloads it, if its source is remote. Raises as `Source.open` and `LookAhead.need`.
        """
        with self._lock:
            slot = self._slots.setdefault((source, shard), _Slot())
            self._slots.move_to_end((source, shard))
            while len(self._slots) > self.limit:
                self._slots.popitem(last=False)
        with slot.lock:
            if slot.file is None:
                slot.file = self._open(source, shard, ahead)
            return slot.file

    def _open(self, source: int, shard: int, ahead: LookAhead | None) -> ShardFile:
        for last in (False, True):
            if ahead is not None:
                ahead.need(source, shard)
            if self._remote[source]:
                with self._lock:
                    self.opened += not last
            try:
                file = self.sources[source].open(shard)
                if not file.is_damaged or last or not self._heal(source, shard):
                    return file
            except ShardError:
                if last or not self._heal(source, shard):
                    raise

    def _heal(self, source: int, shard: int) -> bool:
        """Check the files of a shard after a fault. Returns whether one was damaged and dropped from the cache."""
        with self._lock:
            if not self._remote[source] or (source, shard) in self._checked:
                return False
            self._checked.add((source, shard))
        files = self.sources[source].files(shard)
        return any([layer.store.heal(entry.path, entry.bytes, entry.sha256) for layer, entry in files])

    def heal(self, source: int, shard: int, file: ShardFile) -> bool:
        """After a fault in an open shard: whether to read it again, because its copy in the cache was damaged.

        The checksum is compared once; a copy that matches is kept. A local file is the only copy, also if it was
        replaced.
        """
        if not self._remote[source]:
            return False
        with self._lock:
            slot = self._slots.get((source, shard)) or _Slot()
        with slot.lock:
            if slot.file is not None and slot.file is not file:
                return True  # another thread did it
            if not file.is_unlinked and not self._heal(source, shard):
                return False
            slot.file = None
        return True

    def close_unlinked(self) -> None:
        """Close evicted files, which frees their disk space."""
        with self._lock:
            gone = [key for key, slot in self._slots.items() if slot.file is not None and slot.file.is_unlinked]
            for key in gone:
                del self._slots[key]
