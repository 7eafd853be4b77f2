"""A node's folder of downloaded files, shared by all its processes: each is downloaded once, the oldest are evicted.

A file's date (mtime) is its place in the eviction order. A used file has the date of its last use. A file that a
look-ahead needs has a date in the future: the sooner it is needed, the later the date. When the look-ahead's process
ends, the file becomes an ordinary used file within LEASE.
"""

import errno
import heapq
import os
import shutil
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tinyflux.shards.clients import DownloadError
from tinyflux.util.files import Stopped, cache_folder, locked

TIMEOUT = 300.0  # seconds that a store may be down
MIN_RATE = 16 << 10  # bytes per second; a slower download is aborted
LEASE = 1800 * 10**9  # ns
AUDIT = 3600.0  # seconds between two counts of all files
LEFTOVER = 86400.0  # seconds after which a killed process's partial download is not resumed
BUSY = 600.0  # a download that got bytes within so many seconds is not evicted
PAUSE = 1.0  # seconds that other processes get to close evicted files
_LOCKS = 4096  # number of lock files: at least the number of parallel downloads, far fewer than files
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_NEVER = threading.Event()


class NoRoom(Exception):
    """The cache is full of files that are needed earlier."""


class NodeCache:
    """A folder of downloaded files with a size limit in bytes, shared by all processes of a node.

    timeout: seconds that a download may take, in addition to the time for its bytes at MIN_RATE.
    """

    def __init__(self, folder: str | Path | None = None, limit: int = 100 << 30, timeout: float = TIMEOUT):
        self.folder, self.limit = Path(folder) if folder else cache_folder() / "shards", limit
        self.timeout = timeout
        self._fetched = 0
        self._counting = threading.Lock()
        self._evicting = threading.Lock()
        self._oldest: list[tuple[int, str]] | None = None  # heap of (date, path) as far as this process knows
        self._looked, self._looking = float("-inf"), 0.0  # when all files were last listed, and the duration
        self._listed = 0  # number of files then
        self._holders: weakref.WeakSet = weakref.WeakSet()

    @property
    def fetched(self) -> int:
        """Bytes downloaded by this process."""
        return self._fetched

    def count(self, length: int) -> None:
        """Count downloaded bytes."""
        with self._counting:
            self._fetched += length

    def watch(self, holder) -> None:
        """Call `holder.close_unlinked()` whenever files are evicted: an open file still takes disk space."""
        self._holders.add(holder)

    def deadline(self, size: int | None) -> float:
        """Seconds that a download of this size may take."""
        return self.timeout + (size or 0) / MIN_RATE

    def get(
        self,
        path: Path,
        size: int | None,
        fill: Callable[[Path], None],
        *,
        what: str,
        valid: Callable[[Path], bool] = lambda path: True,
        due: int | None = None,
        stopped: threading.Event = _NEVER,
    ) -> Path:
        """`path` under the cache's folder. If it is missing or invalid, `fill` writes it to a temporary path beside it.

        due: its date, if it is downloaded ahead of use; it then evicts no file with a later date. After an error, the
        next call resumes the partial file. Raises what `fill` raises, DownloadError if the disk is full, TimeoutError,
        NoRoom, and Stopped once `stopped` is set.
        """
        if self.use(path) and valid(path):
            return path
        lock = self.folder / ".locks" / f"{zlib.crc32(os.fsencode(path)) % _LOCKS:03x}"
        waits_for = f"another process to download {what}"
        with locked(lock, timeout=self.deadline(size), what=waits_for, stopped=stopped):
            if self.use(path):
                if valid(path):
                    return path
                self.drop(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = _part(path, size)
            left = _length(part)  # left by a killed process; already counted
            self._reserve(0 if left is not None else size or 0, due, on_disk=(size or 0) - (left or 0))
            try:
                self._filled(part, size or 0, fill, what, stopped)
                if size is None:
                    self._reserve(part.stat().st_size, due)
                os.replace(part, path)
            except BaseException:
                if size is None or not _length(part):  # nothing to resume
                    part.unlink(missing_ok=True)
                    self._reserve(-(size or 0), None)
                raise
        with self._evicting, suppress(FileNotFoundError):
            self._known(path)
        return path

    def _filled(self, part: Path, size: int, fill: Callable, what: str, stopped: threading.Event) -> None:
        for last in (False, False, True):
            try:
                return fill(part)
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                if last:
                    part.unlink(missing_ok=True)
                    message = f"no room in the cache {self.folder} for {what} ({size} bytes): "
                    raise DownloadError(f"{message}free space or choose another folder with data.cache_dir") from error
            self.close_unlinked()
            if stopped.wait(PAUSE):
                raise Stopped(what)
            self._reserve(0, None, on_disk=size - (_length(part) or 0))

    def publish(self, part: Path, path: Path) -> None:
        """Move a finished temporary file to its final path."""
        self._reserve(part.stat().st_size - (_length(path) or 0), None)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, path)

    def use(self, path: Path) -> bool:
        """Whether a file is there; it was used now."""
        now = time.time_ns()
        try:
            if not now < os.stat(path).st_mtime_ns < now + 4 * LEASE:  # else it is kept
                os.utime(path, ns=(now, now))
        except FileNotFoundError:
            return False
        return True

    def keep(self, path: Path, date: int) -> bool:
        """Whether a file exists. If so, it gets this date (from `date_of`)."""
        try:
            os.utime(path, ns=(date, date))
        except FileNotFoundError:
            return False
        return True

    def release(self, path: Path, date: int) -> None:
        """This process no longer needs a file. A date that another process has set is kept."""
        try:
            if os.stat(path).st_mtime_ns == date:
                os.utime(path)
                with self._evicting:
                    self._known(path)
        except FileNotFoundError:
            pass

    def date_of(self, step: int) -> int:
        """The date of a file that a run needs at this step, counted from its start; valid for LEASE."""
        return (time.time_ns() // LEASE + 3) * LEASE - 1000 * step  # the same in all processes

    def drop(self, path: Path) -> None:
        """Remove a damaged file."""
        length = _length(path)
        path.unlink(missing_ok=True)
        if length is not None:
            self._reserve(-length, None)

    def close_unlinked(self) -> None:
        """Close this process's descriptors of evicted files."""
        for holder in list(self._holders):
            holder.close_unlinked()

    def _reserve(self, size: int, due: int | None, on_disk: int | None = None) -> None:
        """Add `size` bytes to the total, and evict files until the total fits the limit and `on_disk` fits the disk.

        The node's lock is held only for the evicted files, not for a listing of all. Raises NoRoom if a file with a
        date later than `due` would have to be evicted.
        """
        evicted, now = False, time.time_ns()
        try:
            first = now if due is None else min(now, due)  # first the files that no look-ahead keeps
            for before, last in ((first, False), (due, False), (due, True)):
                with self._evicting:
                    if self._oldest is None or (before == due and self._may_look()):
                        self._look()
                    with self._total() as total:
                        fits, removed = self._evict(total, size, size if on_disk is None else on_disk, before)
                        evicted = evicted or removed
                        if fits or (last and before is None):
                            total[0] += size
                            return
            raise NoRoom(str(self.folder))
        finally:
            if evicted:
                self.close_unlinked()

    def _evict(self, total: list[int], size: int, on_disk: int, before: int | None) -> tuple[bool, bool]:
        """(whether there is enough room, whether a file was evicted). Evicts only files with a date before `before`."""
        evicted = False
        while total[0] + size > self.limit or shutil.disk_usage(self.folder).free < on_disk:
            if size <= 0 >= on_disk or not self._oldest:
                return size <= 0 >= on_disk, evicted
            date, name = heapq.heappop(self._oldest)
            try:
                stat = os.stat(name)
            except FileNotFoundError:
                continue
            if _order(stat.st_mtime_ns) != date:  # it was used in the meantime
                heapq.heappush(self._oldest, (_order(stat.st_mtime_ns), name))
                continue
            if before is not None and date >= before:
                heapq.heappush(self._oldest, (date, name))
                return False, evicted
            base = os.path.basename(name)
            if base.startswith(".") and time.time() - stat.st_mtime < BUSY:  # it is being written
                continue
            Path(name).unlink(missing_ok=True)
            total[0] -= _planned(base, stat.st_size)
            evicted = True
        return True, evicted

    def _may_look(self) -> bool:
        """Whether to list all files again: others may have added some since all that were listed have gone, or it was
        long ago."""
        gone = self._listed and not self._oldest
        return gone or time.monotonic() - self._looked > max(1.0, 20 * self._looking)

    def _look(self) -> None:
        """List all files, without the node's lock."""
        began = time.monotonic()
        self._oldest = [(_order(stat.st_mtime_ns), entry.path) for entry, stat in _files(self.folder)]
        heapq.heapify(self._oldest)
        self._listed = len(self._oldest)
        self._looked = time.monotonic()
        self._looking = self._looked - began

    def _known(self, path: Path) -> None:
        """Add a file to the eviction candidates."""
        if self._oldest is not None:
            heapq.heappush(self._oldest, (_order(os.stat(path).st_mtime_ns), os.fspath(path)))
            if len(self._oldest) > 1 << 20:  # most of them are duplicates
                self._oldest = None

    @contextmanager
    def _total(self) -> Iterator[list[int]]:
        """[bytes of all files, including running downloads], as a list to be changed under the node's lock."""
        note = self.folder / ".total"
        with locked(self.folder / ".lock", timeout=self.timeout, what=f"the eviction lock of {self.folder}"):
            try:
                count, counted = note.read_text().split()
                total = [int(count)]
                known = 0 <= time.time() - float(counted) < AUDIT
            except (FileNotFoundError, ValueError):
                known = False
            if not known:  # recount hourly: killed processes and manual deletions make it wrong
                total, counted = [self._audit()], str(time.time())
            before = total[0] if known else None
            yield total
            if total[0] != before:
                note.write_text(f"{max(0, total[0])} {counted}")

    def _audit(self) -> int:
        total, now = 0, time.time()
        for entry, stat in _files(self.folder):
            if entry.name.startswith(".") and now - stat.st_mtime > LEFTOVER:
                os.unlink(entry.path)
            else:
                total += _planned(entry.name, stat.st_size)
        return total


def _part(path: Path, size: int | None) -> Path:
    """The temporary path of a download; its name contains the final size."""
    return path.with_name(f".{path.name}.{size or 0}.part")


def _planned(name: str, length: int) -> int:
    """Bytes that a file takes, or will take when its download is complete."""
    return max(length, int(name.split(".")[-2])) if name.startswith(".") else length


def _length(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _order(date: int) -> int:
    """A date's place in the eviction order: dates that no look-ahead can have set come first."""
    return date if date < time.time_ns() + 4 * LEASE else 0


def _files(folder: str | Path) -> Iterator[tuple[os.DirEntry, os.stat_result]]:
    """The files of all sources, including running downloads."""
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders += [entry.path] if not entry.name.startswith(".") else []
                    elif not entry.name.startswith(".") or entry.name.endswith(".part"):
                        try:
                            stat = entry.stat(follow_symlinks=False)
                        except FileNotFoundError:  # another process has just moved or evicted it
                            continue
                        yield entry, stat
        except FileNotFoundError:
            continue
