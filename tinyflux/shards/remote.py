"""Remote sources: files of a store, each downloaded once to the node's cache and checked before use.

A download resumes a partial file, survives outages shorter than the cache's timeout, and is renamed into place when its
size, checksum or syntax is right.
"""

import errno
import hashlib
import json
import logging
import math
import random
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tinyflux.shards.cache import MIN_RATE, NodeCache
from tinyflux.shards.clients import CLIENTS, Client, DownloadError
from tinyflux.util import files
from tinyflux.util.files import Stopped
from tinyflux.util.urls import redacted

log = logging.getLogger(__name__)

FIRST_WAIT = 1.0  # seconds, doubled after each try
LONGEST_WAIT = 15.0  # seconds between two tries
LONGEST_ASKED = 60.0  # seconds, whatever the store asks for
SILENCE = 30.0  # seconds without a byte, or below MIN_RATE, after which a request is sent again
LARGEST = {"json": 1 << 24, "jsonl": 1 << 30, "safetensors": 1 << 30}  # most bytes of a file of unknown size
SMALL = 64 << 20  # files up to this many bytes are checked whenever they are opened; shards only after a fault
_NEVER = threading.Event()
T = TypeVar("T")


def is_remote(url: str) -> bool:
    """Whether a source is read through the cache."""
    scheme, separator, _ = url.partition("://")
    return bool(separator) and scheme in CLIENTS


class Patience:
    """Retries with a `wait` between two tries, until no byte came for `outage` seconds, or `seconds` have passed.

    what: its name in messages. stopped: set when the result is no longer needed.
    """

    def __init__(self, what: str, outage: float, seconds: float | None = None, stopped: threading.Event = _NEVER):
        self.what, self.outage, self.stopped = what, outage, stopped
        self.seconds = outage if seconds is None else seconds
        self.began = self.came = time.monotonic()
        self.tries, self.failures = 0, 0

    def wait(self, error: DownloadError) -> None:
        """Sleep before the next try. Raises DownloadError if another try is useless, or Stopped."""
        self.tries += 1
        self.failures += 1
        if not error.again:
            raise DownloadError(f"{self.what}: {error}", status=error.status) from error
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(self.failures - 1, 30)) * random.uniform(0.5, 1)
        wait = max(wait, min(error.after, LONGEST_ASKED))
        now, end = time.monotonic(), min(self.began + self.seconds, self.came + self.outage)
        if now >= end:
            spent = f"{self.tries} tries in {now - self.began:.0f} s"
            raise DownloadError(f"{self.what}: gave up after {spent}: {error}; is the store up?") from error
        wait = min(wait, end - now)
        log.warning("%s: %s; try %d in %.1f s", self.what, error, self.tries + 1, wait)
        if self.stopped.wait(wait):
            raise Stopped(self.what) from error

    def progress(self) -> None:
        """Bytes arrived: reset the outage. Raises DownloadError if the time is over, or Stopped."""
        self.failures, self.came = 0, time.monotonic()
        if self.stopped.is_set():
            raise Stopped(self.what)
        if self.came - self.began > self.seconds:
            raise DownloadError(f"{self.what}: not downloaded within {self.seconds:.0f} s; is the store up?")

    def of(self, action: Callable[[], T]) -> T:
        """The result of an action, retried until it succeeds. Raises as `wait`."""
        while True:
            try:
                return action()
            except DownloadError as error:
                self.wait(error)


class RemoteFiles:
    """Files under a URL; `fetch` downloads them to `folder` of a cache."""

    def __init__(self, url: str, client: Client, cache: NodeCache, folder: Path):
        self.url, self.cache = redacted(url.rstrip("/")), cache
        self._client, self._folder = client, folder

    def path(self, name: str) -> Path:
        """The path of a file's local copy, whether or not it exists."""
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
        """A local copy of a file, checked against size and checksum if given. Raises as `NodeCache.get`.

        An existing small copy is checked again, and downloaded again if it is damaged.
        """
        fill = partial(self._fill, name, size, sha256, stopped)
        valid = partial(self._holds, name, size, sha256)
        what = f"{self.url}/{name}"
        return self.cache.get(self.path(name), size, fill, what=what, valid=valid, due=due, stopped=stopped)

    def heal(self, name: str, size: int, sha256: str) -> bool:
        """Check a copy after a fault. If it is damaged, drop it, so that the next `fetch` replaces it. Returns whether
        it was damaged."""
        path = self.path(name)
        if not path.is_file() or self._is_whole(path, name, size, sha256):
            return False
        self.cache.drop(path)
        return True

    def _holds(self, name: str, size: int | None, sha256: str | None, path: Path) -> bool:
        return name.endswith(".tar") or (size or 0) > SMALL or self._is_whole(path, name, size, sha256)

    def _is_whole(self, path: Path, name: str, size: int | None, sha256: str | None) -> bool:
        if fault := _fault(path, name, size, sha256):
            log.warning("%s/%s: the copy in the cache is damaged, downloading it again: %s", self.url, name, fault)
        return not fault

    def _fill(self, name: str, size: int | None, sha256: str | None, stopped: threading.Event, part: Path) -> None:
        """Download to `part`, which may already have the first bytes. Raises DownloadError, Stopped."""
        patience = Patience(f"{self.url}/{name}", self.cache.timeout, self.cache.deadline(size), stopped)
        for last in (False, True):  # a killed process may leave a wrong checksum, a proxy a wrong syntax
            fault = self._download(name, size, sha256, patience, part)
            if not fault:
                return
            part.unlink()
            if not last:
                log.warning("%s: %s; downloading it again", patience.what, fault)
        said = "its content is not what the manifest says, so one of the two was replaced: " if sha256 else ""
        raise DownloadError(f"{patience.what}: {said}{fault}", wrong=True)

    def _download(self, name: str, size: int | None, sha256: str | None, patience: Patience, part: Path) -> str:
        """The fault of a download, "" if there is none. Raises DownloadError, Stopped."""
        digest = hashlib.sha256()  # computed while downloading, so that a large file is not read again
        with open(part, "a+b") as file:
            file.seek(0)
            while size is not None and (data := file.read(1 << 20)):
                digest.update(data)
            while file.tell() != size:
                if size is None:
                    file.seek(0)
                    file.truncate()
                try:
                    self._request(name, size, patience, file, digest)
                except DownloadError as error:
                    if error.status == 416:
                        return f"it has {file.tell()} bytes instead of {size}"
                    patience.wait(error)
                    continue
                if size is None:
                    break
        if size is None or sha256 is None:
            return _fault(part, name, size, sha256)
        return "" if digest.hexdigest() == sha256 else "its sha256 differs"

    def _request(self, name: str, size: int | None, patience: Patience, file: BinaryIO, digest: Any) -> None:
        """One request for the missing bytes of a file. Raises DownloadError, Stopped."""
        done = file.tell()
        silence, began, received = min(SILENCE, self.cache.timeout), time.monotonic(), 0
        limit = size if size is not None else LARGEST.get(name.rpartition(".")[2], math.inf)
        with closing(self._client.read(name, done, size, silence)) as chunks:
            for chunk in chunks:
                received += len(chunk.data)
                self.cache.count(len(chunk.data))
                data = chunk.data[max(0, done - chunk.start) :]  # a server without ranges sends the whole file
                if chunk.start > done or done + len(data) > limit:
                    raise DownloadError(f"it has more than {limit} bytes: is it a different file from the manifest's?")
                file.write(data)
                digest.update(data)
                done += len(data)
                patience.progress()
                seconds = time.monotonic() - began
                if seconds > silence and received < MIN_RATE * seconds:
                    raise DownloadError(f"only {received} bytes arrived in {seconds:.0f} s", again=True)
        if size is not None and done < size:
            raise DownloadError(f"the response ended at byte {done} of {size}", again=True)


class RemoteStore(RemoteFiles):
    """The files of a source at a URL whose scheme is in CLIENTS, pinned to one revision.

    revision: the one that an earlier store reported, to read the same content again; default: the current one. On the
    Hub it is the commit, elsewhere the SHA-256 of manifest.json. Raises DownloadError, ValueError.
    """

    def __init__(self, url: str, cache: NodeCache, revision: str | None = None):
        client = client_of(url, cache, revision)
        super().__init__(url, client, cache, _folder_of(url, client.pin or revision or "", cache))
        if client.pin is not None:
            self.revision = client.pin
            self.manifest = self.fetch("manifest.json").read_bytes()
        elif revision is not None:
            self.revision = revision
            try:
                self.manifest = self.fetch("manifest.json", None, revision).read_bytes()
            except DownloadError as error:
                if not error.wrong:
                    raise
                message = f"source {self.url}: its manifest is not that of revision {revision}: it was replaced"
                raise ValueError(message) from error
        else:
            cache.folder.mkdir(parents=True, exist_ok=True)
            part = cache.folder / f".{secrets.token_hex(8)}.0.part"
            try:
                self._fill("manifest.json", None, None, _NEVER, part)
                self.manifest = part.read_bytes()
                self.revision = hashlib.sha256(self.manifest).hexdigest()
                self._folder = _folder_of(url, self.revision, cache)
                cache.publish(part, self.path("manifest.json"))
            finally:
                part.unlink(missing_ok=True)


def client_of(url: str, cache: NodeCache, revision: str | None = None) -> Client:
    """The client of a URL. Raises ValueError if its scheme is not in CLIENTS, DownloadError."""
    scheme = url.partition("://")[0]
    if (make := CLIENTS.get(scheme)) is None:
        raise ValueError(f"{redacted(url)}: scheme {scheme!r} is not accepted; known are {', '.join(CLIENTS)}")
    return Patience(redacted(url), cache.timeout).of(partial(make, url, revision))


def _folder_of(url: str, revision: str, cache: NodeCache) -> Path:
    shown = redacted(url.rstrip("/"))
    key = hashlib.sha256(f"{shown}\n{revision}".encode()).hexdigest()[:16]
    return cache.folder / f"{shown.rpartition('/')[2]}-{key}"


def download(url: str, cache: NodeCache) -> Path:
    """A local copy of one file at a URL whose scheme is in CLIENTS. Raises ValueError, DownloadError, TimeoutError."""
    path = copy_of(url, cache)
    if cache.use(path):
        return path
    folder, name = split(url)
    client = client_of(folder, cache)

    def size() -> int | None:
        with closing(client.read(name, 0, None, SILENCE)) as chunks:
            return next(chunks).total

    found = Patience(redacted(url), cache.timeout).of(size)
    return RemoteFiles(folder, client, cache, path.parent).fetch(name, found)


def copy_of(url: str, cache: NodeCache) -> Path:
    """The path where `download` puts a file."""
    folder, name = split(url)
    return _folder_of(folder, url.partition("?")[2], cache) / name


def split(url: str) -> tuple[str, str]:
    """The URL of a file's folder, with the query, and the file's name."""
    path, question, query = url.partition("?")
    folder, _, name = path.rpartition("/")
    return f"{folder}{question}{query}", name


def _fault(path: Path, name: str, size: int | None, sha256: str | None) -> str:
    """The fault of a file, "" if there is none: its size, its checksum, or without one its syntax."""
    length = path.stat().st_size
    if size is not None and length != size:
        return f"it has {length} bytes instead of {size}"
    try:
        if sha256 is not None:
            return "" if sha256 == files.sha256(path) else "its sha256 differs"
        if check := _syntax(name):
            check(path)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"it cannot be read: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        with open(path, "rb") as file:
            return f"it is not what its name says ({error}): it starts with {file.read(40)!r}"
    return ""


def _syntax(name: str) -> Callable[[Path], Any] | None:
    return _SYNTAX.get(name.rpartition(".")[2])


def _json(path: Path) -> None:
    if not isinstance(json.loads(path.read_bytes()), dict):
        raise ValueError("not an object")


def _json_lines(path: Path) -> None:
    with open(path, "rb") as file:
        for line in file:
            json.loads(line)


def _safetensors(path: Path) -> None:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if length < 100 << 20 else None
    ends = [entry["data_offsets"][1] for key, entry in (header or {}).items() if key != "__metadata__"]
    if not ends or path.stat().st_size != 8 + length + max(ends):
        raise ValueError("its header does not fit its size")


_SYNTAX: dict[str, Callable[[Path], Any]] = {"json": _json, "jsonl": _json_lines, "safetensors": _safetensors}
