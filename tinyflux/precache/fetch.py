"""Remote files of a source: tars, kept while they are worked on, and single images."""

import time
from contextlib import closing
from functools import lru_cache
from pathlib import Path

from tinyflux.precache.images import Rejected
from tinyflux.precache.kinds.base import SourceError
from tinyflux.shards import remote
from tinyflux.shards.cache import NodeCache
from tinyflux.shards.clients import DownloadError, HttpClient
from tinyflux.util.files import cache_folder

OUTAGE = 20.0  # seconds without a byte, and those of all tries of an image
DEADLINE = 300.0  # seconds for an image in all: a server may send a byte a minute
IMAGE_LIMIT = 1 << 28  # bytes of an image at a URL


def is_url(name: str) -> bool:
    """Whether a list names an image by a URL that is read here."""
    return name.startswith(("http://", "https://"))


def read_url(url: str, most: int | None = None) -> bytes:
    """An image at a URL, of at most IMAGE_LIMIT bytes; tried again where the server or the network fails.

    most: bytes of its beginning that are enough. Raises Rejected.
    """
    patience, end = remote.Patience(url, OUTAGE), time.monotonic() + DEADLINE

    def read() -> bytes:
        folder, name = remote.split(url)
        data = bytearray()
        with closing(HttpClient(folder).read(name, 0, None, OUTAGE)) as chunks:
            for chunk in chunks:
                data += chunk.data
                if time.monotonic() > end:
                    raise DownloadError(f"only {len(data)} bytes came in {DEADLINE:g} s")
                if most is not None and len(data) >= most:
                    break
                if len(data) > IMAGE_LIMIT:
                    raise Rejected(f"unreadable file: more than {IMAGE_LIMIT} bytes")
        return bytes(data[:most])

    try:
        return patience.of(read)
    except (DownloadError, ValueError) as error:
        raise Rejected(f"cannot be fetched: {error}") from error


def download(url: str) -> Path:
    """A local copy of a file at http(s)://, hf://, s3:// or gs://. Raises SourceError.

    Processes that want the same file wait for one of them.
    """
    try:
        return remote.download(url, _cache(cache_folder()))
    except (OSError, ValueError) as error:
        raise SourceError(f"{url}: cannot be downloaded: {error}") from error


def forget(url: str) -> None:
    """Remove the local copy of a file."""
    cache = _cache(cache_folder())
    cache.drop(remote.copy_of(url, cache))


@lru_cache
def _cache(root: Path) -> NodeCache:
    return NodeCache(root / "sources", limit=1 << 62)
