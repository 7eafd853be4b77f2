"""Look-ahead: remote shards are downloaded before the plan needs them, and those needed next are evicted last.

Threads walk the plan from the current step on, download missing shards in the order of their next use, and date the
cached files by their next use. The cache evicts the oldest dates, so it keeps what is needed first. The cost of a step
does not depend on how far ahead the threads look.
"""

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from tinyflux.shards.cache import NoRoom
from tinyflux.shards.plan import Plan
from tinyflux.shards.source import Source
from tinyflux.shards.store import Store
from tinyflux.shards.writer import Shard
from tinyflux.util.files import Stopped

log = logging.getLogger(__name__)

DOWNLOADS = 2  # at a time: more would delay the one that is needed first
MOST_DOWNLOADS = 8  # for the first batch, which needs them all, and when readers had to wait
STEPS = 1024  # most steps to look ahead
PORTION = 16  # steps to walk at a time; a file gets a new date when its next use has moved by as many
RETRY = 60.0  # seconds until a failed download ahead of use is tried again
POLL = 1.0  # seconds between checks of the cache, which other processes change too
LOOKED_AT = 64  # shards per check

Key = tuple[int, int]  # source, shard


@dataclass
class _Needed:
    """A shard in the window: its remote files, and the (step, place) of each of its next uses."""

    key: Key
    files: list[tuple[Store, Shard]]
    bytes: int
    uses: deque[tuple[int, int]] = field(default_factory=deque)
    there: bool = False
    dates: list[int] = field(default_factory=list)  # of its files in the cache
    dated: int = 0  # the step of these dates

    def paths(self) -> list[Path]:
        return [store.path(shard.path) for store, shard in self.files]


class LookAhead:
    """Downloads of one rank's remote shards for the steps from `step` to `end_step`, until `stop`.

    first: samples in the rank's first batch; their shards are downloaded before all others. budget: bytes of the cache
    that the rank may fill ahead. Raises ValueError if the shards of one step exceed the budget.
    """

    def __init__(
        self,
        sources: list[Source],
        plan: Plan,
        rank: int,
        world: int,
        step: int,
        *,
        first: int,
        budget: int,
        end_step: int | None = None,
    ):
        self.sources, self.plan, self.rank, self.world = sources, plan, rank, world
        self.budget = budget
        self.late = 0
        """Number of shards that a reader had to wait for."""
        self._remote = [any(layer.store.cache for layer in source.layers) for source in sources]
        self._all = sum(len(s.manifest.shards) for s, remote in zip(sources, self._remote, strict=True) if remote)
        self._end = float("inf") if end_step is None else end_step
        self._step, self._window = step, deque()  # for each step from this one on, its shards in slot order
        self._needed: dict[Key, _Needed] = {}  # all shards of the window
        self._bytes = 0  # of these shards
        self._bytes_there, self._counted = 0, set()  # of those in the cache or being downloaded
        self._missing: list[tuple[int, int, Key]] = []  # heap of shards that may be missing, by next use
        self._last: list[tuple[int, Key]] = []  # heap of cached shards, latest next use first
        self._wanted: dict[Key, None] = {}  # shards that readers wait for, first come first served
        self._errors: dict[Key, Exception] = {}  # for these readers
        self._busy: set[Key] = set()
        self._later: dict[Key, float] = {}  # when to retry failed downloads
        self._pause = 0.0  # until when there is no room for later shards
        self._walking, self._polled, self._cursor, self._base = False, 0.0, 0, 0
        self._caches = {layer.store.cache for source in sources for layer in source.layers} - {None}
        self._stopped, self._change = threading.Event(), threading.Condition()
        self._add([self._shards_of(step)] if step < self._end else [])
        if self._bytes > budget:
            raise ValueError(
                f"data.cache_gb is too small: rank {rank} reads {len(self._needed)} shards at once, which have "
                f"{self._bytes / 1e9:.3g} GB, and may use {budget / 1e9:.3g} GB of its node's cache. Set data.cache_gb "
                "three times as large, or raise data.slots_per_stream"
            )
        self._first = {key for key, n in self._needed.items() if n.uses[0][1] < first}  # not downloaded yet
        self._threads = [
            threading.Thread(target=self._work, name=f"look-ahead {i}", daemon=True) for i in range(MOST_DOWNLOADS)
        ]
        for thread in self._threads:
            thread.start()

    def need(self, source: int, shard: int) -> None:
        """Wait until a shard is in the cache. Shards that a reader waits for are downloaded first.

        There is no other limit than the download's: its error says most. Raises it, or Stopped after `stop`.
        """
        if not self._remote[source]:
            return
        needed = self._of((source, shard))
        key, paths = needed.key, needed.paths()
        if all(path.is_file() for path in paths):
            return
        with self._change:
            self.late += 1
            self._wanted[key] = None
            self._later.pop(key, None)
            self._change.notify_all()
            try:
                while not all(path.is_file() for path in paths):
                    if self._stopped.is_set():
                        raise Stopped("the stream was closed")
                    if key in self._errors:
                        raise self._errors[key]
                    self._change.wait(POLL)
            finally:
                self._wanted.pop(key, None)
                self._errors.pop(key, None)

    def advance(self, step: int) -> None:
        """All steps before this one have been read."""
        with self._change:
            if step <= self._step:
                return
            while self._step < step:
                for key in self._window.popleft() if self._window else ():
                    needed = self._needed[key]
                    needed.uses.popleft()
                    if not needed.uses:
                        self._forget(needed)
                    elif needed.there and needed.uses[0][0] - needed.dated >= PORTION:
                        self._look_at(needed)
                self._step += 1
            self._first.clear()
            self._change.notify_all()

    def stop(self) -> None:
        """End the threads: waiting readers return at once, a download ends when its next bytes arrive."""
        self._stopped.set()
        with self._change:
            self._change.notify_all()

    def _of(self, key: Key) -> _Needed:
        files = [(layer.store, shard) for layer, shard in self.sources[key[0]].files(key[1]) if layer.store.cache]
        return _Needed(key, files, sum(shard.bytes for _, shard in files))

    def _work(self) -> None:
        while not self._stopped.is_set():
            try:
                with self._change:
                    chosen = self._choose()
                    if chosen is None and not self._may_walk():
                        self._poll()
                        self._change.wait(POLL)
                        continue
                    self._walking = self._walking or chosen is None  # only one thread walks
                if chosen is None:
                    self._walk()
                else:
                    self._fetch(*chosen)
            except Exception:  # keep this thread alive for the next shards
                log.exception("look-ahead")
                self._stopped.wait(POLL)

    def _fetch(self, needed: _Needed, due: int | None) -> None:
        """Download a shard. If it fails, a waiting reader gets the error; without one, it is retried later."""
        error: Exception | None = None
        try:
            for store, shard in needed.files:
                date = due and store.cache.date_of(due)
                store.fetch(shard.path, shard.bytes, shard.sha256, due=date, stopped=self._stopped)
        except Exception as caught:  # noqa: BLE001  the waiting reader raises it
            error = caught
        key, again = needed.key, isinstance(error, (NoRoom, FileNotFoundError))  # the cache was deleted
        with self._change:
            self._busy.discard(key)
            self._first.discard(key)
            if error is not None:
                self._later[key] = time.monotonic() + (POLL if again else RETRY)
                if isinstance(error, NoRoom):
                    self._pause = self._later[key]
                if key in self._wanted and not again:
                    self._errors[key] = error
            if key in self._needed:
                self._look_at(self._needed[key])
            self._change.notify_all()
        if error is not None and not again and not isinstance(error, Stopped):
            log.warning("look-ahead: %s", error)

    def _choose(self) -> tuple[_Needed, int | None] | None:
        """The shard to download next, and the step that needs it (None: needed now)."""
        now, put_off, chosen = time.monotonic(), [], None
        for key in self._wanted:
            if key not in self._busy and key not in self._errors and self._later.get(key, 0.0) <= now:
                needed = self._needed.get(key) or self._of(key)
                self._begin(needed)
                return needed, None
        most = MOST_DOWNLOADS if self._first else min(MOST_DOWNLOADS, DOWNLOADS + self.late)
        while self._missing and len(self._busy) < most and chosen is None and self._pause <= now:
            *use, key = self._missing[0]
            needed = self._needed.get(key)
            if needed is None or needed.there or key in self._busy:
                heapq.heappop(self._missing)
            elif (*use,) != needed.uses[0]:  # a reader fetched it for that one
                heapq.heapreplace(self._missing, (*needed.uses[0], key))
            elif self._first and needed.key not in self._first:  # the first batch gets the whole bandwidth
                break
            elif self._later.get(needed.key, 0.0) > now:
                put_off.append(heapq.heappop(self._missing))
            elif not self._fits(needed):
                break
            elif self._dated(needed):
                heapq.heappop(self._missing)
                self._count(needed, True)
                self._first.discard(needed.key)
            else:
                heapq.heappop(self._missing)
                chosen = needed, needed.uses[0][0]
                self._begin(needed)
        for item in put_off:
            heapq.heappush(self._missing, item)
        return chosen

    def _fits(self, needed: _Needed) -> bool:
        """Whether the budget has room for a shard, if shards that are needed later are dropped."""
        while self._bytes_there + needed.bytes > self.budget:
            if not self._last or -self._last[0][0] <= needed.uses[0][0]:
                return False
            step, key = heapq.heappop(self._last)
            other = self._needed.get(key)
            if other is not None and other.there and other.dated == -step and key in self._counted:
                other.there = False
                self._count(other, False)
                heapq.heappush(self._missing, (*other.uses[0], key))
        return True

    def _begin(self, needed: _Needed) -> None:
        self._busy.add(needed.key)
        needed.there = False
        if needed.key in self._needed:
            self._count(needed, True)

    def _count(self, needed: _Needed, there: bool) -> None:
        if there != (needed.key in self._counted):
            self._counted ^= {needed.key}
            self._bytes_there += needed.bytes if there else -needed.bytes

    def _look_at(self, needed: _Needed) -> None:
        """Renew the date of a shard in the window. If it has left the cache, mark it as missing."""
        if self._dated(needed):
            self._count(needed, True)
        elif needed.key not in self._busy:
            self._count(needed, False)
            heapq.heappush(self._missing, (*needed.uses[0], needed.key))

    def _dated(self, needed: _Needed) -> bool:
        """Whether a shard is in the cache. If so, its files get the date of its next use."""
        needed.dated = needed.uses[0][0]
        needed.dates = [store.cache.date_of(needed.dated) for store, _ in needed.files]
        kept = [
            store.cache.keep(path, date)
            for (store, _), path, date in zip(needed.files, needed.paths(), needed.dates, strict=True)
        ]
        needed.there = all(kept)
        if needed.there:
            heapq.heappush(self._last, (-needed.dated, needed.key))
            if len(self._last) > 1000 + 4 * len(self._needed):
                self._last = [(-other.dated, key) for key, other in self._needed.items() if other.there]
                heapq.heapify(self._last)
        return needed.there

    def _forget(self, needed: _Needed) -> None:
        """A shard is no longer needed in the window."""
        del self._needed[needed.key]
        self._bytes -= needed.bytes
        self._later.pop(needed.key, None)
        self._count(needed, False)
        for (store, _), path, date in zip(needed.files, needed.paths(), needed.dates, strict=False):
            store.cache.release(path, date)

    def _may_walk(self) -> bool:
        """Whether to extend the window. Not if it has reached the budget, all shards, STEPS or the run's end."""
        ahead = len(self._window)
        more = ahead < min(STEPS, self._end - self._step) and len(self._needed) < self._all
        return more and self._bytes < self.budget and not self._walking

    def _walk(self) -> None:
        steps: list = []
        with self._change:
            begin = self._step + len(self._window)
        try:  # without holding the lock, so that readers need not wait
            steps = [self._shards_of(step) for step in range(begin, int(min(begin + PORTION, self._end)))]
        finally:
            with self._change:
                self._walking = False
                if begin == self._step + len(self._window):  # otherwise the readers have overtaken this thread
                    self._add(steps)
                self._change.notify_all()

    def _shards_of(self, step: int) -> list[tuple[int, Key]]:
        """(place, shard) of each remote shard that the rank needs at a step."""
        draws = self.plan.batch(step, self.rank, self.world, rows=False)
        pairs = list(zip(draws.source.tolist(), draws.shard.tolist(), strict=True))
        places = {key: place for place, key in reversed(list(enumerate(pairs))) if self._remote[key[0]]}
        return sorted((place, key) for key, place in places.items())

    def _add(self, steps: list[list[tuple[int, Key]]]) -> None:
        """Append steps to the window."""
        for shards in steps:
            step = self._step + len(self._window)
            for place, key in shards:
                if key not in self._needed:
                    self._needed[key] = self._of(key)
                    self._bytes += self._needed[key].bytes
                    heapq.heappush(self._missing, (step, place, key))
                self._needed[key].uses.append((step, place))
            self._window.append([key for _, key in shards])

    def _poll(self) -> None:
        """Check, for a few shards at a time, what other processes or people did to the cache."""
        now = time.monotonic()
        if now - self._polled < POLL:
            return
        self._polled = now
        for cache in self._caches:
            cache.close_unlinked()
        soon = itertools.islice(itertools.chain.from_iterable(self._window), LOOKED_AT)
        some = itertools.islice(self._needed, self._cursor, self._cursor + LOOKED_AT)
        base = {cache.date_of(0) for cache in self._caches}
        if base != self._base:  # the dates of all of them run out
            self._base, some = base, self._needed
            for layer in itertools.chain.from_iterable(source.layers for source in self.sources):
                for name in ("manifest.json", "index.safetensors", "null.safetensors") if layer.store.cache else ():
                    layer.store.cache.keep(layer.store.path(name), layer.store.cache.date_of(self._step))
        for key in list(dict.fromkeys([*soon, *some])):
            if self._needed[key].there:
                self._look_at(self._needed[key])
        self._cursor = self._cursor + LOOKED_AT if self._cursor < len(self._needed) else 0
