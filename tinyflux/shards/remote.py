"""Remote sources: files behind fsspec, each copied once to a cache that all processes of a node share.

A file is downloaded in blocks under a lock, checked, and renamed into place, so no half file is ever used; a killed
download goes on where it stopped. What was used longest ago is evicted first, where the look-ahead does not know
better; open files stay readable.
"""

import fcntl
import hashlib
import logging
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from tinyflux.util.files import cache_folder

log = logging.getLogger(__name__)

SCHEMES = ("hf", "s3", "gs", "http", "https")
BLOCK = 16 << 20  # bytes of one request
TRIES = 8  # failures in a row, about two minutes of waiting, before a download is given up
FIRST_WAIT = 1.0  # seconds, doubled with each try
LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for
LOCK_TIMEOUT = 1800.0  # seconds for another process to finish the same download
_NEVER = threading.Event()
_HUB = re.compile(r"hf://(datasets/[^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*?))?/?")


def is_remote(url: str) -> bool:
    """Whether a source is read through the cache."""
    scheme, separator, _ = url.partition("://")
    return bool(separator) and scheme in SCHEMES


def without_revision(url: str) -> str:
    """A Hub URL without its @REVISION; any other as it is."""
    match = _HUB.fullmatch(url)
    return "/".join(filter(None, (f"hf://{match[1]}", match[3]))) if match else url


class DownloadError(OSError):
    """A remote file could not be had; says which and what to look at."""


class NoRoom(Exception):
    """The cache is full of files that are needed sooner."""


class Stopped(Exception):
    """Nobody waits for the download any more."""


def _retry_after(error: BaseException) -> float:
    """Seconds that the server asked to wait, 0 if it didn't."""
    headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
    value = headers.get("Retry-After", "")
    return float(value) if value.replace(".", "", 1).isdigit() else 0.0


def _status(error: BaseException) -> int:
    return getattr(error, "status", 0) or getattr(getattr(error, "response", None), "status_code", 0)


def retrying(
    what: str, action: Callable[[], Any], errors: tuple[type[BaseException], ...], stopped: threading.Event = _NEVER
) -> Any:
    """The result of `action`, tried up to TRIES times with growing, jittered waits. Raises DownloadError, Stopped."""
    began = time.monotonic()
    for attempt in range(1, TRIES + 1):
        try:
            return action()
        except errors as error:
            status, last = _status(error), error
            missing = isinstance(error, FileNotFoundError) or status == 404
            if missing or isinstance(error, PermissionError) or (400 <= status < 500 and status not in (408, 429)):
                hint = "there is no such file" if missing else "check your access (token, credentials)"
                raise DownloadError(f"{what}: {hint}: {error}") from error
            if attempt < TRIES:
                wait = min(
                    LONGEST_WAIT, max(_retry_after(error), FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1))
                )
                log.warning("%s: %s; try %d of %d in %.1f s", what, error, attempt + 1, TRIES, wait)
                if stopped.wait(wait):
                    raise Stopped(what) from error
    spent = time.monotonic() - began
    raise DownloadError(f"{what}: gave up after {TRIES} tries in {spent:.0f} s: {last!r}; is the store up?") from last


class NodeCache:
    """A folder of downloaded files with a size limit in bytes, shared by all processes of a node."""

    def __init__(self, folder: str | Path | None = None, limit: int = 100 << 30):
        self.folder, self.limit = Path(folder) if folder else cache_folder() / "shards", limit
        self.fetched = 0  # bytes downloaded by this process

    def get(
        self,
        path: Path,
        size: int | None,
        sha256: str | None,
        read: Callable[[int, int | None], bytes],
        what: str,
        due: int | None = None,
        stopped: threading.Event = _NEVER,
    ) -> Path:
        """`path` under the cache's folder, downloaded if it isn't there.

        read: (start, stop) -> those bytes; where size is None the file is small, and (0, None) gives all of it.
        due: its `date`, where it is downloaded ahead; then it takes no room from files with a later one.
        Raises DownloadError, TimeoutError, NoRoom, and Stopped once that is set.
        """
        if _touch(path):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock"), f"another process to download {what}", stopped):
            if _touch(path):
                return path
            with self._room(size or 0, due):
                pass  # known before anything is downloaded
            part = path.with_name(f".{path.name}.part")
            try:
                for resume in (True, False):  # a wrong sum may come from what a killed process left
                    if self._download(part, size, sha256, read, resume, stopped):
                        with self._room(size or 0, due, written=True):  # another may have taken it meanwhile
                            os.replace(part, path)
                        return path
            except OSError as error:
                if error.errno not in (28, 122):  # disk or quota full
                    raise
                part.unlink(missing_ok=True)
                message = f"no room in the cache {self.folder} for {what} ({size} bytes): free space or choose another"
                raise DownloadError(error.errno, message) from error
        raise DownloadError(f"{what}: its content is not what the manifest says: it was replaced, or the manifest was")

    def date(self, path: Path, when: int) -> bool:
        """Give a file its place in the order of eviction, in ns; now is what was just used. False if it isn't there."""
        return _touch(path, when)

    def _download(
        self,
        part: Path,
        size: int | None,
        sha256: str | None,
        read: Callable,
        resume: bool,
        stopped: threading.Event,
    ) -> bool:
        resume = resume and size is not None and part.exists()
        with open(part, "r+b" if resume else "w+b") as file:
            digest, done = hashlib.sha256(), 0
            while block := file.read(BLOCK):
                digest.update(block)
                done += len(block)
            while size is None or done < size:
                if stopped.is_set():
                    raise Stopped(str(part))
                block = read(done, None if size is None else min(done + BLOCK, size))
                file.write(block)
                digest.update(block)
                done += len(block)
                self.fetched += len(block)
                if size is None:
                    break
            file.flush()
            os.fsync(file.fileno())
        good = (size is None or done == size) and (sha256 is None or digest.hexdigest() == sha256)
        if not good:
            part.unlink()
        return good

    @contextmanager
    def _room(self, size: int, due: int | None, written: bool = False) -> Iterator[None]:
        """Evict the oldest files until `size` bytes fit, and keep the room for the block.

        written: the bytes are on the disk already. Raises NoRoom where that takes a file later than `due`.
        """
        with _locked(self.folder / ".lock", f"the eviction lock of {self.folder}"):
            files = []
            for path in self.folder.glob("*/*"):
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                if not path.name.startswith(".") and path.is_file():
                    files.append((stat.st_mtime_ns, stat.st_size, path))
            total = sum(length for _, length, _ in files)
            for date, length, path in sorted(files):
                if total + size <= self.limit and shutil.disk_usage(self.folder).free >= (0 if written else size):
                    break
                if due is not None and date >= due:
                    raise NoRoom(str(path))
                path.unlink(missing_ok=True)
                total -= length
            yield


def _touch(path: Path, when: int | None = None) -> bool:
    when = time.time_ns() if when is None else when
    try:
        os.utime(path, ns=(when, when))
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: Path, waits_for: str, stopped: threading.Event = _NEVER) -> Iterator[None]:
    """Hold a lock file; the kernel frees it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"waited {LOCK_TIMEOUT:.0f} s for {waits_for} (lock {path})") from error
                if stopped.wait(0.05):
                    raise Stopped(waits_for) from error
        yield


class RemoteStore:
    """The files of a source under a URL of SCHEMES, pinned to one revision.

    revision: as an earlier store reported it, to read the same content again; default: what is there now. For the Hub
    it is the commit, elsewhere the SHA-256 of manifest.json. Raises DownloadError, ValueError.
    """

    def __init__(self, url: str, cache: NodeCache, revision: str | None = None):
        self.url, self.cache = url.rstrip("/"), cache
        scheme = url.partition("://")[0]
        self._errors: tuple[type[BaseException], ...] = (OSError, HTTPError)
        options: dict[str, Any] = {}
        # the Hub's files read ahead and keep what they read unless they are told not to
        self._reading: dict[str, Any] = {"cache_type": "none"} if scheme == "hf" else {}
        try:
            if scheme in ("http", "https"):
                import aiohttp

                self._errors += (aiohttp.ClientError,)
                options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}
            self._fs = fsspec.filesystem(scheme, **options)
        except ImportError as error:
            raise ValueError(f"source {url!r}: {scheme} needs a package that is not installed: {error}") from error
        self._root = self.url
        if scheme == "hf":
            match = _HUB.fullmatch(url)
            if match is None:
                raise ValueError(f"source {url!r}: a Hub source is hf://datasets/USER/REPO[@REVISION][/FOLDER]")
            repo, wanted, folder = match.groups()
            api = HfApi(endpoint=self._fs.endpoint, token=self._fs.token)
            name = repo.removeprefix("datasets/")
            self.revision = revision or retrying(url, lambda: api.dataset_info(name, revision=wanted).sha, self._errors)
            self._root = "/".join(filter(None, (f"{repo}@{self.revision}", folder)))
            self._folder = self._folder_of(self.revision)
            self.manifest = self.fetch("manifest.json").read_bytes()
        else:
            if revision is not None and (cached := self._folder_of(revision) / "manifest.json").is_file():
                self.manifest = cached.read_bytes()
            else:
                self.manifest = self._read("manifest.json", 0, None)
            self.revision = hashlib.sha256(self.manifest).hexdigest()
            if revision not in (None, self.revision):
                raise ValueError(f"source {url}: its manifest is not the one of revision {revision}: it was replaced")
            self._folder = self._folder_of(self.revision)

    def _folder_of(self, revision: str) -> Path:
        key = hashlib.sha256(f"{self.url}\n{revision}".encode()).hexdigest()[:16]
        return self.cache.folder / f"{self.url.rpartition('/')[2]}-{key}"

    def _read(self, name: str, start: int, stop: int | None, stopped: threading.Event = _NEVER) -> bytes:
        what = f"{self.url}/{name}"

        def once() -> bytes:
            if stop is None:
                return self._fs.cat_file(f"{self._root}/{name}", **self._reading)
            data = self._fs.cat_file(f"{self._root}/{name}", start=start, end=stop, **self._reading)
            if len(data) > stop - start:  # a server that ignores ranges sends the whole file
                data = data[start:stop]
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came instead of bytes {start} to {stop}")
            return data

        return retrying(what, once, self._errors, stopped)

    def path(self, name: str) -> Path:
        """Where the local copy of a file is or will be."""
        return self._folder / name

    def fetch(
        self,
        name: str,
        size: int | None = None,
        sha256: str | None = None,
        *,
        due: int | None = None,
        stopped: threading.Event = _NEVER,
    ) -> Path:
        """A local copy of a file, checked against size and sum where given. Raises as `NodeCache.get`."""

        def read(start: int, stop: int | None) -> bytes:
            return self._read(name, start, stop, stopped)

        return self.cache.get(self.path(name), size, sha256, read, f"{self.url}/{name}", due, stopped)
