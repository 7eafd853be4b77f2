"""Look-ahead: the remote shards that the plan uses next are fetched before they are needed, and evicted last.

Two threads walk the plan from the step that is being loaded, fetch what is missing in the order of its next use, and
date the cached files by their next use, so that the cache, which evicts the oldest, keeps what is needed soonest.
"""

import logging
import threading
import time
from collections import deque

from tinyflux.shards.plan import Plan
from tinyflux.shards.reader import StreamStats
from tinyflux.shards.remote import NoRoom, RemoteStore, Stopped
from tinyflux.shards.source import Source

log = logging.getLogger(__name__)

DOWNLOADS = 2  # at a time: more of them would delay the first in order
STEPS = 1024  # looked ahead at most
PORTION = 16  # steps walked at a time: readers wait for the lock meanwhile
RETRY = 60.0  # seconds until a shard whose download failed is tried again ahead of its use
POLL = 1.0  # seconds between two looks at a cache that other processes change too

Key = tuple[int, int]  # source, shard


class LookAhead:
    """The downloads of one rank, from `step` on, for steps before `end_step`, until `stop`, of remote sources alone.

    budget: bytes of the cache that the rank may fill ahead. timeout: seconds that `need` waits at most.
    stats: `late` counts there the shards that a reader had to wait for.
    """

    def __init__(
        self,
        sources: list[Source],
        plan: Plan,
        rank: int,
        world: int,
        step: int,
        *,
        budget: int,
        timeout: float,
        stats: StreamStats,
        end_step: int | None = None,
    ):
        self.sources, self.plan, self.rank, self.world = sources, plan, rank, world
        self.budget, self.timeout, self.stats = budget, timeout, stats
        self._remote = [isinstance(source.store, RemoteStore) for source in sources]
        self._all = sum(len(s.manifest.shards) for s, remote in zip(sources, self._remote, strict=True) if remote)
        self._end = float("inf") if end_step is None else end_step
        self._step, self._window = step, deque()  # of every step from this one on, the shards in slot order
        self._uses: dict[Key, deque[tuple[int, int]]] = {}  # (step, place) of each use in the window
        self._bytes = 0  # of all those shards
        self._wanted: dict[Key, None] = {}  # what readers wait for, first come first
        self._errors: dict[Key, Exception] = {}  # for those readers
        self._busy: set[Key] = set()
        self._later: dict[Key, float] = {}  # when to try again what failed or had no room
        self._stopped, self._change = threading.Event(), threading.Condition()
        self._threads = [threading.Thread(target=self._work, name="look-ahead", daemon=True) for _ in range(DOWNLOADS)]
        for thread in self._threads:
            thread.start()

    def need(self, source: int, shard: int) -> None:
        """Return once a shard is in the cache; what is waited for is fetched first.

        Raises what its download raised, TimeoutError, or Stopped after `stop`.
        """
        if not self._remote[source]:
            return
        key, path = (source, shard), self._path((source, shard))
        with self._change:
            if path.is_file():
                return
            self.stats.late += 1
            self._wanted[key] = None
            self._change.notify_all()
            deadline = time.monotonic() + self.timeout
            try:
                while not path.is_file() and any(thread.is_alive() for thread in self._threads):
                    if self._stopped.is_set():
                        raise Stopped("the stream was closed")
                    if key in self._errors:
                        raise self._errors[key]
                    left = deadline - time.monotonic()
                    if left <= 0:
                        url, name = self.sources[source].url, self._entry(key).name
                        raise TimeoutError(f"waited {self.timeout:g} s for {url}/{name} to be downloaded")
                    self._change.wait(min(left, POLL))
            finally:
                self._wanted.pop(key, None)
                self._errors.pop(key, None)

    def advance(self, step: int) -> None:
        """Everything before this step was read."""
        with self._change:
            if step == self._step:
                return
            while self._step < step:
                for key in self._window.popleft() if self._window else ():
                    self._uses[key].popleft()
                    if not self._uses[key]:
                        del self._uses[key]
                        self._bytes -= self._entry(key).bytes
                self._step += 1
            self._change.notify_all()

    def stop(self) -> None:
        """End the threads: readers are let go at once, a download ends at the next of its blocks."""
        self._stopped.set()
        with self._change:
            self._change.notify_all()

    def _entry(self, key: Key):
        return self.sources[key[0]].manifest.shards[key[1]]

    def _path(self, key: Key):
        return self.sources[key[0]].store.path(self._entry(key).path)

    def _work(self) -> None:
        while not self._stopped.is_set():
            with self._change:
                chosen = self._choose()
                if chosen is None:
                    if not self._walk():
                        self._change.wait(POLL)
                    continue
                key, due = chosen
                self._busy.add(key)
            self._fetch(key, due)

    def _fetch(self, key: Key, due: int | None) -> None:
        """Download a shard; a failure goes to who waits for it, or is tried again later."""
        source, entry = self.sources[key[0]], self._entry(key)
        error: Exception | None = RuntimeError(f"the thread that downloads {source.url}/{entry.name} died: see above")
        try:
            source.store.fetch(entry.path, entry.bytes, entry.sha256, due=due, stopped=self._stopped)
            error = None
        except (OSError, NoRoom, Stopped) as caught:
            error = caught
        finally:
            with self._change:
                self._busy.discard(key)
                if error is not None:
                    again = isinstance(error, (NoRoom, FileNotFoundError))  # the latter: the cache was deleted
                    self._later[key] = time.monotonic() + (POLL if again else RETRY)
                    if key in self._wanted and not again:
                        self._errors[key] = error
                self._change.notify_all()
        if isinstance(error, OSError) and not again:
            log.warning("look-ahead: %s", error)

    def _choose(self) -> tuple[Key, int | None] | None:
        """The shard to fetch next, and its age in the cache's order (None: it is needed now)."""
        for key in self._wanted:
            if key not in self._busy and key not in self._errors:
                return key, None
        now, total, chosen = time.time_ns(), 0, None
        for key, uses in sorted(self._uses.items(), key=lambda item: item[1][0]):
            total += self._entry(key).bytes
            if total > self.budget:
                break
            source = self.sources[key[0]]
            due = now - 100 * (uses[0][0] - self._step)  # no step is as short as 100 ns
            there = source.store.cache.date(self._path(key), due)
            later = self._later.get(key, 0.0) > time.monotonic()
            if chosen is None and not there and not later and key not in self._busy:
                chosen = key, due
        return chosen

    def _walk(self) -> bool:
        """Look a few steps further. False where nothing is gained: budget, sources, window or run end here."""
        ahead = len(self._window)
        if self._bytes >= self.budget or len(self._uses) == self._all or ahead >= min(STEPS, self._end - self._step):
            return False
        for _ in range(PORTION):
            step = self._step + len(self._window)
            if step >= self._end:
                break
            mine = self.plan.batch(step, self.rank, self.world, rows=False)
            pairs = dict.fromkeys(zip(mine.source.tolist(), mine.shard.tolist(), strict=True))
            keys = [key for key in pairs if self._remote[key[0]]]
            for place, key in enumerate(keys):
                if key not in self._uses:
                    self._uses[key] = deque()
                    self._bytes += self._entry(key).bytes
                self._uses[key].append((step, place))
            self._window.append(keys)
        return True
