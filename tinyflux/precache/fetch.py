"""Remote files of a source: tars, which are kept while they are read, and single images."""

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

OUTAGE = 20.0  # seconds without a byte, over all tries of an image
DEADLINE = 300.0  # seconds for an image in total: a server may send a byte per minute
IMAGE_LIMIT = 1 << 28  # bytes of an image at a URL


def is_url(name: str) -> bool:
    """Whether an image's name in a list is a URL that can be downloaded."""
    return name.startswith(("http://", "https://"))


def read_url(url: str, most: int | None = None) -> bytes:
    """Download an image of at most IMAGE_LIMIT bytes, with retries if the server or the network fails.

    most: read only so many bytes from its start. Raises Rejected.
    """
    patience, end = remote.Patience(url, OUTAGE), time.monotonic() + DEADLINE

    def read() -> bytes:
        folder, name = remote.split(url)
        data = bytearray()
        with closing(HttpClient(folder).read(name, 0, None, OUTAGE)) as chunks:
            for chunk in chunks:
                data += chunk.data
                if time.monotonic() > end:
                    raise DownloadError(f"only {len(data)} bytes arrived in {DEADLINE:g} s")
                if most is not None and len(data) >= most:
                    break
                if len(data) > IMAGE_LIMIT:
                    raise Rejected(f"unreadable file: more than {IMAGE_LIMIT} bytes")
        return bytes(data[:most])

    try:
        return patience.of(read)
    except (DownloadError, ValueError) as error:
        raise Rejected(f"cannot be downloaded: {error}") from error


def download(url: str) -> Path:
    """A local copy of a file at a URL whose scheme is in CLIENTS. Raises SourceError.

    Processes that need the same file share one download.
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
