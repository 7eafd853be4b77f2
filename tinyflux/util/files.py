"""Files: written whole or not at all, locked between processes, hashed."""

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
    """Nobody waits for the result any more."""


def cache_folder() -> Path:
    """The folder of downloads and derived files: $TINYFLUX_CACHE, or tinyflux in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyflux"
    return Path(os.environ.get("TINYFLUX_CACHE") or default)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced(path: str | Path, temporary: str | Path | None = None) -> Iterator[Path]:
    """A temporary path beside `path`: the file that the block writes there replaces `path` if the block succeeds.

    File and folder are fsynced, so a crash leaves the old file or the new one. temporary: its name, if the next writer
    should overwrite what a killed one left. If the disk is full, the OSError says so.
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
    """Write a small file, whole or not at all; text is written as UTF-8."""
    with replaced(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def locked(
    path: str | Path, *, timeout: float = float("inf"), what: str = "", stopped: threading.Event = _NEVER
) -> Iterator[None]:
    """Hold a lock file; the kernel frees it when its holder dies. Threads of one process exclude each other too.

    timeout: seconds to wait, 0 for a single try. what: names what is waited for in the error. Raises TimeoutError,
    Stopped once that event is set, NoLocks where the file system has no locks.
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
