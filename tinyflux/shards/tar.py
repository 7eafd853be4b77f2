"""Tar files of samples: where the members of each sample lie, scanned straight from the headers."""

import os
import struct
import tarfile
import zlib
from typing import NamedTuple

from tinyflux.shards.format import ShardError


class Sample(NamedTuple):
    """Where a sample lies in its shard: member extension -> (offset, size) in bytes."""

    key: str
    members: dict[str, tuple[int, int]]


def read_member(fd: int, offset: int, size: int) -> bytes:
    """The bytes of a member; shorter only where the file is."""
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_USTAR = struct.Struct("100s24x12s12x8sc100x5s83x155s12x")  # name, size, checksum, type, magic, prefix


def _header(head: bytes) -> tuple[str, int, bytes]:
    """(name, size, type) from one ustar header block. Raises ValueError."""
    name, size, checksum, kind, magic, prefix = _USTAR.unpack(head)
    size, checksum = size.rstrip(b" \0"), checksum.strip(b" \0")
    if magic != b"ustar" or not checksum.isdigit():
        raise ValueError("not a tar header")
    # the low half of Adler-32 is 1 + the sum of the bytes, modulo 65521: the header checksum at the speed of C
    total = zlib.adler32(head[:148] + b" " * 8 + head[156:]) & 0xFFFF
    if total != (int(checksum, 8) + 1) % 65521:
        raise ValueError("the tar header's checksum is wrong")
    if not size.isdigit():  # base-256 sizes of GNU tar
        return "", 0, b"L"
    name = name.rstrip(b"\0").decode()
    return f"{prefix.rstrip(bytes(1)).decode()}/{name}" if prefix[0] else name, int(size, 8), kind


def _plain_members(fd: int):
    """(name, offset, size) of each file of a ustar archive; LookupError where a header needs the tarfile module."""
    offset, end = 0, os.fstat(fd).st_size
    while True:
        head = os.pread(fd, _BLOCK, offset)
        if len(head) < _BLOCK:
            raise ValueError(f"cut short: ends at byte {end} without the end-of-archive blocks")
        if head == _ZEROS:
            break
        try:
            name, size, kind = _header(head)
        except ValueError as error:  # also undecodable names and digits that are not octal
            raise ValueError(f"{error} (at byte {offset})") from error
        if kind not in b"0\0" + b"1234567":
            raise LookupError(kind)
        if offset + _BLOCK + size > end:
            raise ValueError(f"cut short: {name} ends at byte {offset + _BLOCK + size}, the file at {end}")
        if kind in b"0\0":
            yield name, offset + _BLOCK, size
        offset += _BLOCK + (size + _BLOCK - 1 & -_BLOCK)
    if os.pread(fd, _BLOCK, offset + _BLOCK) != _ZEROS:
        raise ValueError(f"cut short: one end-of-archive block at byte {offset}, a tar ends with two")


def _any_members(fd: int):
    """The same for archives with pax or GNU headers, by way of tarfile."""
    end = 0
    try:
        with os.fdopen(os.dup(fd), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + (member.size + _BLOCK - 1 & -_BLOCK)
                if end > os.fstat(fd).st_size or member.issparse():
                    raise ValueError(f"{member.name} is sparse or cut short")
                if member.isfile():
                    yield member.name, member.offset_data, member.size
    except tarfile.TarError as error:
        raise ValueError(f"not a readable tar: {error}") from error
    if os.pread(fd, 2 * _BLOCK, end) != 2 * _ZEROS:
        raise ValueError(f"cut short: no end-of-archive blocks at byte {end}")


def _group(members) -> tuple[list[Sample], str, str]:
    """Samples in file order up to the first fault, the key at the fault, and what it was ("" if nothing)."""
    samples, seen, key = [], set(), ""
    try:
        for name, offset, size in members:
            folder, slash, base = name.removeprefix("./").rpartition("/")
            stem, dot, extension = base.partition(".")
            if not stem or not dot:
                continue  # as in webdataset: hidden files and files without an extension belong to no sample
            if (current := folder + slash + stem) != key:
                key = current
                if key in seen:
                    raise ValueError("the key occurs twice, or its members are not adjacent")
                seen.add(key)
                samples.append(Sample(key, {}))
            if extension in samples[-1].members:
                raise ValueError(f"member .{extension} occurs twice")
            samples[-1].members[extension] = (offset, size)
    except ValueError as error:
        return samples, key, str(error)
    return samples, "", ""


def scan(fd: int, shard: str) -> tuple[list[Sample], ShardError | None]:
    """Samples of an open tar in file order, and the fault that ended the scan early, if one did.

    `shard` names the file in the error. Plain ustar headers are read directly, other tars through tarfile.
    """
    try:
        samples, key, why = _group(_plain_members(fd))
    except LookupError:
        samples, key, why = _group(_any_members(fd))
    return samples, ShardError(shard, key, why) if why else None


def scan_tar(path) -> list[Sample]:
    """Samples of a tar file in file order. Raises ShardError where it is cut short, damaged or no tar."""
    fd = os.open(path, os.O_RDONLY)
    try:
        samples, fault = scan(fd, os.fspath(path))
    finally:
        os.close(fd)
    if fault:
        raise fault
    return samples
