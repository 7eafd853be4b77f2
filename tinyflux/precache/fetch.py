"""Remote files of a source: tars, kept while they are worked on, and single images."""

import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

from tinyflux.precache.images import Rejected
from tinyflux.precache.kinds.base import SourceError
from tinyflux.util.files import cache_folder, locked, replaced

TRIES = 4
TIMEOUT = 60  # seconds without a byte
DEADLINE = 300  # seconds for an image in all: a server may send a byte a minute
IMAGE_LIMIT = 1 << 28  # bytes of an image at a URL
_FAULTS = (urllib.error.URLError, http.client.HTTPException, OSError, ValueError)


def is_url(name: str) -> bool:
    """Whether a list names an image by a URL that is read here."""
    return name.startswith(("http://", "https://"))


def read_url(url: str, most: int | None = None) -> bytes:
    """An image at a URL, of at most IMAGE_LIMIT bytes; tried again where the server or the network fails.

    most: bytes of its beginning that are enough. Raises Rejected.
    """
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as stream:
                length = stream.headers.get("Content-Length")
                data = _read(stream, most or IMAGE_LIMIT + 1)
        except _FAULTS as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429):
                raise Rejected(f"cannot be fetched: {error}") from error
            if attempt == TRIES - 1:
                raise Rejected(f"cannot be fetched: {error}, {TRIES} times") from error
        else:
            if most is None and len(data) > IMAGE_LIMIT:
                raise Rejected(f"unreadable file: more than {IMAGE_LIMIT} bytes")
            if length is None or len(data) == min(int(length), most or IMAGE_LIMIT):
                return data
        time.sleep(0.2 * 2**attempt)
    raise Rejected(f"cannot be fetched: ends before its {length} bytes, {TRIES} times")


def _read(stream, most: int) -> bytes:
    """At most that many bytes. Raises Rejected where they take too long."""
    end, data = time.monotonic() + DEADLINE, bytearray()
    while len(data) < most and (some := stream.read1(min(1 << 16, most - len(data)))):
        data += some
        if time.monotonic() > end:
            raise Rejected(f"cannot be fetched: {len(data)} bytes in {DEADLINE} s")
    return bytes(data)


def _open(url: str):
    """(binary stream, its length if the server says it)."""
    if is_url(url):
        stream = urllib.request.urlopen(url, timeout=TIMEOUT)
        return stream, stream.headers.get("Content-Length")
    import fsspec

    return fsspec.open(url, "rb").open(), None


def _place(url: str) -> Path:
    name = url.rpartition("/")[2].partition("?")[0]
    return cache_folder() / "sources" / hashlib.sha256(url.encode()).hexdigest()[:16] / name


def download(url: str) -> Path:
    """A local copy of a file at http(s)://, hf://, s3:// or whatever fsspec opens. Raises SourceError.

    Processes that want the same file wait for one of them.
    """
    path = _place(url)
    if path.is_file():
        return path
    with locked(path.with_name(path.name + ".lock"), what=f"the download of {url}"):
        if path.is_file():
            return path
        try:
            with replaced(path, path.with_name(path.name + ".part")) as part:
                stream, length = _open(url)
                with stream, open(part, "wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 20)
                if length is not None and part.stat().st_size != int(length):
                    size = part.stat().st_size
                    raise SourceError(f"{url}: the download ended at {size} of {length} bytes; run again")
        except SourceError:
            raise
        except ImportError as error:
            raise SourceError(f"{url}: {error}") from error
        except _FAULTS as error:
            raise SourceError(f"{url}: cannot be downloaded: {error}") from error
    return path


def forget(url: str) -> None:
    """Remove the local copy of a file."""
    _place(url).unlink(missing_ok=True)
