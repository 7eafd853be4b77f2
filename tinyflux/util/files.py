"""Files: atomic writes, locks between processes, hashes."""

import errno
import fcntl
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NEVER = threading.Event()


class NoLocks(OSError):
    """The file system has no locks, like many NFS and Lustre mounts."""


class Stopped(Exception):
    """The result is no longer needed."""


def cache_folder() -> Path:
    """The folder of downloads and derived files: $TINYFLUX_CACHE, or tinyflux in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyflux"
    return Path(os.environ.get("TINYFLUX_CACHE") or default)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        error.filename = os.fspath(path)  # an error of a read has none
        raise


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced(path: str | Path, temporary: str | Path | None = None) -> Iterator[Path]:
    """Yields a temporary path beside `path`; if the block succeeds, the file written there replaces `path`.

    File and folder are fsynced, so a crash leaves the old file or the new one. temporary: a fixed name, so that the
    next writer overwrites what a killed one left. If the disk is full, the OSError says so.
    """
    path = Path(path)
    temporary = Path(temporary or path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp"))
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        message = f"{error.strerror} while writing {path}; what was finished before is intact. Make room and run again"
        raise OSError(error.errno, message) from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a small file atomically; text is written as UTF-8."""
    with replaced(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def locked(
    path: str | Path, *, timeout: float = float("inf"), what: str = "", stopped: threading.Event = _NEVER
) -> Iterator[None]:
    """Hold a lock file; the kernel frees it when its holder dies. It also excludes threads of the same process.

    timeout: seconds to wait, 0 for a single try. what: the name of the awaited thing in the error. Raises TimeoutError,
    Stopped when that event is set, NoLocks if the file system has no locks.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        deadline = time.monotonic() + timeout
        while not _try_lock(file, path):
            if time.monotonic() >= deadline:
                waited = f"waited {timeout:g} s for " if timeout else ""
                raise TimeoutError(f"{waited}{what or 'another process'} (lock {path})")
            if stopped.wait(0.05):
                raise Stopped(what)
        yield


def _try_lock(file, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocks(error.errno, f"{path}: {error.strerror}: this file system has no locks") from error
        raise
    return True
