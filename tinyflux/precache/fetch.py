"""Remote files, downloaded once to the user's cache folder."""

import fcntl
import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import fsspec

from tinyflux.precache.sources import SourceError


def cache_folder() -> Path:
    """Where downloads are kept: TINYFLUX_CACHE, or ~/.cache/tinyflux."""
    return Path(os.environ.get("TINYFLUX_CACHE") or Path.home() / ".cache" / "tinyflux")


def _open(url: str):
    """(binary stream, its length if the server tells)."""
    if url.startswith(("http://", "https://")):
        stream = urllib.request.urlopen(url, timeout=60)  # seconds without a byte
        return stream, stream.headers.get("Content-Length")
    return fsspec.open(url, "rb").open(), None


def download(url: str) -> Path:
    """A local copy of a file at http(s)://, hf://, s3:// or whatever fsspec opens. Raises SourceError.

    Processes that want the same file wait for one of them.
    """
    name = url.rpartition("/")[2].partition("?")[0]
    path = cache_folder() / "sources" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(name + ".lock"), "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if path.is_file():
            return path
        part = path.with_name(name + ".part")
        try:
            stream, length = _open(url)
            with stream, open(part, "wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
        except ImportError as error:
            raise SourceError(f"{url}: {error}") from error
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            raise SourceError(f"{url}: cannot be downloaded: {error}") from error
        if length is not None and part.stat().st_size != int(length):
            raise SourceError(f"{url}: the download ended at {part.stat().st_size} of {length} bytes; run again")
        os.replace(part, path)
    return path
