"""The files of a source: in a folder, or in a remote store behind the node's cache."""

import hashlib
import os
import threading
from functools import cached_property
from pathlib import Path
from typing import Protocol

from tinyflux.shards.cache import NodeCache
from tinyflux.shards.clients import CLIENTS
from tinyflux.shards.remote import RemoteStore, is_remote

ACCEPTED = f"a folder, file:///folder or a URL ({', '.join(f'{scheme}://' for scheme in CLIENTS)})"
_NEVER = threading.Event()


class Store(Protocol):
    """The files of a source."""

    url: str
    """The URL, without secrets."""
    cache: NodeCache | None
    """The cache for local copies; None if files are read in place."""
    manifest: bytes | None
    """The bytes of manifest.json, None if there is none."""
    revision: str | None
    """The version of the content: a Hub commit, or the SHA-256 of manifest.json."""

    def path(self, name: str) -> Path:
        """A file's path on this machine, whether or not it exists."""
        ...

    def fetch(
        self,
        name: str,
        size: int | None = None,
        sha256: str | None = None,
        *,
        due: int | None = None,
        stopped: threading.Event = _NEVER,
    ) -> Path:
        """A local copy of a file. Raises FileNotFoundError if the store has no such file, or DownloadError."""
        ...

    def heal(self, name: str, size: int, sha256: str) -> bool:
        """Check a copy after a fault. If it is damaged, drop it, so that the next `fetch` replaces it. Returns whether
        it was damaged."""
        ...


class LocalStore:
    """The files of a source in a local folder."""

    cache = None

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.url = os.fspath(root)

    @cached_property
    def manifest(self) -> bytes | None:
        path = self.root / "manifest.json"
        return path.read_bytes() if path.is_file() else None

    @property
    def revision(self) -> str | None:
        return None if self.manifest is None else hashlib.sha256(self.manifest).hexdigest()

    def path(self, name: str) -> Path:
        return self.root / name

    def fetch(
        self,
        name: str,
        size: int | None = None,
        sha256: str | None = None,
        *,
        due: int | None = None,
        stopped: threading.Event = _NEVER,
    ) -> Path:
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        return path

    def heal(self, name: str, size: int, sha256: str) -> bool:
        return False  # it is the only copy


def open_store(url: str | Path, cache: NodeCache | None = None, revision: str | None = None) -> Store:
    """The store at a folder or URL. cache: for local copies. revision: of an earlier store, to get the same content.

    Raises ValueError, FileNotFoundError, DownloadError.
    """
    url = os.fspath(url)
    if is_remote(url):
        return RemoteStore(url, cache or NodeCache(), revision)
    scheme, colon, _ = url.partition("://" if "://" in url else ":")
    if colon and scheme != "file" and not os.path.exists(url):
        raise ValueError(f"source {url!r}: scheme {scheme!r} is not accepted; a source is {ACCEPTED}")
    store = LocalStore(os.path.abspath(url.removeprefix("file://")))
    if not store.root.is_dir():
        raise FileNotFoundError(f"source {url!r}: there is no folder {store.root}; a source is {ACCEPTED}")
    return store
