"""Tar files of samples: finds the members of each sample by scanning the headers."""

import os
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tinyflux.shards.format import ShardError


class Sample(NamedTuple):
    """A sample's place in its shard: member extension -> (offset, size) in bytes."""

    key: str
    members: dict[str, tuple[int, int]]


def read_member(fd: int, offset: int, size: int) -> bytes:
    """The bytes of a member; shorter if the file is truncated."""
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_LONGEST_END = 20 * _BLOCK  # bytes: writers pad an archive to a multiple of this
_WINDOW = 1 << 20  # bytes to read at once when searching for an intact header
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


class Damage(str):
    """A fault in a tar; members may be lost there."""


def _plain_members(fd: int) -> Iterator[tuple[str, int, int] | Damage]:
    """(name, offset, size) of each file of a ustar archive, or Damage for an unreadable header.

    Raises LookupError if a header needs the tarfile module.
    """
    offset, end = 0, os.fstat(fd).st_size
    while True:
        head = os.pread(fd, _BLOCK, offset)
        if len(head) < _BLOCK:
            yield Damage(f"cut short: ends at byte {end} without the end-of-archive blocks")
            return
        if head == _ZEROS:
            if end - offset > _LONGEST_END and (found := _next_header(fd, offset + _BLOCK, end)) is not None:
                yield Damage(f"zeros in place of a tar header (at byte {offset})")
                offset = found
                continue
            if os.pread(fd, _BLOCK, offset + _BLOCK) != _ZEROS:
                yield Damage(f"cut short: one end-of-archive block at byte {offset}, a tar ends with two")
            return
        try:
            name, size, kind = _header(head)
        except ValueError as error:  # also undecodable names and digits that are not octal
            yield Damage(f"{error} (at byte {offset})")
            found = _next_header(fd, offset + _BLOCK, end)
            offset = end if found is None else found
            if found is None:
                return
            continue
        if kind not in b"0\0" + b"1234567":
            raise LookupError(kind)
        if offset + _BLOCK + size > end:
            yield Damage(f"cut short: {name} ends at byte {offset + _BLOCK + size}, the file at {end}")
            return
        if kind in b"0\0":
            yield name, offset + _BLOCK, size
        offset += _BLOCK + (size + _BLOCK - 1 & -_BLOCK)


def _next_header(fd: int, offset: int, end: int) -> int | None:
    """The offset of the next tar header, None if there is none."""
    while offset < end:
        data = os.pread(fd, _WINDOW, offset)
        for at in range(0, len(data) - _BLOCK + 1, _BLOCK):
            if data[at + 257 : at + 262] == b"ustar":
                try:
                    _header(data[at : at + _BLOCK])
                except ValueError:
                    continue
                return offset + at
        offset += _WINDOW
    return None


def _any_members(fd: int) -> Iterator[tuple[str, int, int] | Damage]:
    """The same with tarfile, for archives with pax or GNU headers. Ends at the first damage."""
    end = 0
    try:
        with os.fdopen(os.dup(fd), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + (member.size + _BLOCK - 1 & -_BLOCK)
                if member.size < 0 or end > os.fstat(fd).st_size or member.issparse():
                    yield Damage(f"{member.name} is sparse, cut short or of a negative size")  # tarfile would turn back
                    return
                if member.isfile():
                    yield member.name, member.offset_data, member.size
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        yield Damage(f"not a readable tar: {error}")
        return
    if os.pread(fd, 2 * _BLOCK, end) != 2 * _ZEROS:
        yield Damage(f"cut short: no end-of-archive blocks at byte {end}")


class Scan(NamedTuple):
    """The content of a tar: `samples` in file order, and the first `fault`.

    `gaps`: indices of samples before which others may be lost, ascending; len(samples) means after the last.
    """

    samples: list[Sample]
    fault: ShardError | None
    gaps: list[int]


def _group(members: Iterable[tuple[str, int, int] | Damage], shard: str) -> Scan:
    samples, seen, gaps, fault, key = [], set(), [], None, ""
    for member in members:
        if isinstance(member, Damage):
            fault = fault or ShardError(shard, why=str(member))
            gaps.append(len(samples))
            continue
        name, offset, size = member
        folder, slash, base = name.removeprefix("./").rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot:
            continue  # as in webdataset: hidden files and files without an extension belong to no sample
        if (current := folder + slash + stem) != key:
            key = current
            if key not in seen:
                seen.add(key)
                samples.append(Sample(key, {}))
        if samples[-1].key != key:
            fault = fault or ShardError(shard, key, "the key occurs twice, or its members are not adjacent")
        elif extension in samples[-1].members:
            fault = fault or ShardError(shard, key, f"member .{extension} occurs twice")
        else:
            samples[-1].members[extension] = (offset, size)
    return Scan(samples, fault, gaps)


def scan(fd: int, shard: str) -> Scan:
    """The samples of an open tar. Plain ustar headers are read directly, other tars with tarfile.

    After a damaged header it continues at the next intact one. `shard` names the file in the fault.
    """
    try:
        return _group(_plain_members(fd), shard)
    except LookupError:
        return _group(_any_members(fd), shard)


def scan_tar(path) -> list[Sample]:
    """Samples of a tar file in file order. Raises ShardError if it is truncated, damaged or not a tar."""
    fd = os.open(path, os.O_RDONLY)
    try:
        found = scan(fd, os.fspath(path))
    finally:
        os.close(fd)
    if found.fault:
        raise found.fault
    return found.samples
