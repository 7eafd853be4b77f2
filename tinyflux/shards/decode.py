"""Members of several samples into a batch's memory at once: a few calls a chunk.

It accepts only what is beyond doubt. For everything else `decode_member` says what is wrong, or that nothing is.
"""

import os
import threading
from collections.abc import Sequence

import numpy as np
import zstandard

from tinyflux.shards.format import ORIGIN, Layout, join
from tinyflux.shards.shardfile import ShardFile

CHUNK = 8
"""Samples that are decoded together."""
_TOP = {"float16": 0x7C, "bfloat16": 0x7F, "float32": 0x7F}  # a high byte from here up may be an infinity's or a NaN's
_GAP = 1 << 16  # bytes between members of a sample that are read through rather than around


class _Blobs:
    """Room for the decompressed members of one layout, CHUNK of them, and where their parts lie."""

    def __init__(self, layout: Layout):
        head, planes = layout.head, layout.planes(layout.head[8:])
        self.layout, self.memory = layout, np.zeros((CHUNK, len(head) + layout.payload), np.uint8)
        self.rows = [memoryview(row) for row in self.memory]
        self.head = np.frombuffer(head, np.uint8)
        self.origin = self.memory[:, len(head) + planes[ORIGIN][0] :][:, :4]
        self.planes, highest = {}, []
        for name, field in layout.fields.items():
            begins = [len(head) + begin for begin in planes[name]]
            self.planes[name] = [self.memory[:, begin : begin + field.count] for begin in begins]
            if highest and highest[-1][1:] == (begins[-1], _TOP[field.dtype]):  # one call for planes in a row
                highest[-1] = highest[-1][0], begins[-1] + field.count, _TOP[field.dtype]
            else:
                highest.append((begins[-1], begins[-1] + field.count, _TOP[field.dtype]))
        self.highest = [(self.memory[:, begin:end], top) for begin, end, top in highest]
        self._frame = b""  # the beginning of a frame that states the right size and has a checksum

    def fill(self, i: int, data: memoryview, zstd: zstandard.ZstdDecompressor) -> bool:
        """Decompress a member into row i. False where it isn't one whole frame of the right size with a checksum."""
        at, last, size = len(self._frame), 0, len(data)
        if not at or data[:at] != self._frame:
            frame = zstandard.get_frame_parameters(data)
            if not frame.has_checksum or frame.content_size != len(self.rows[i]):
                return False
            at = zstandard.frame_header_size(data)
            self._frame = bytes(data[:at])
        while not last:  # all blocks must be there: zstd checks the sum of a whole frame only
            if at + 7 > size:
                return False
            head = data[at] | data[at + 1] << 8 | data[at + 2] << 16
            last = head & 1
            at += 4 if head & 6 == 2 else 3 + (head >> 3)
        row = self.rows[i]
        return at + 4 == size and zstd.stream_reader(data, read_size=size).readinto(row) == len(row)

    def good(self, n: int, origins: np.ndarray) -> np.ndarray:
        """Which of the first n rows are made from the images of these origin hashes and are finite; bool [n]."""
        memory = self.memory[:n]
        good = (memory[:, : len(self.head)] == self.head).all(1)
        good &= (self.origin[:n] == origins.view(np.uint8).reshape(n, 4)).all(1)
        for planes, top in self.highest:
            planes = planes[:n]
            if planes.max() >= top | 0x80 or planes.view(np.int8).max() >= top:
                good &= (planes.max(1) < top | 0x80) & (planes.view(np.int8).max(1) < top)
        return good


class _Thread(threading.local):
    """What a thread decodes with."""

    def __init__(self):
        self.zstd, self.blobs, self.buffer = zstandard.ZstdDecompressor(), {}, memoryview(bytearray(1 << 20))

    def of(self, layout: Layout) -> _Blobs:
        """The room for members of a layout."""
        if layout not in self.blobs:
            self.blobs[layout] = _Blobs(layout)
        return self.blobs[layout]

    def read(self, fd: int, begin: int, end: int) -> memoryview:
        """Bytes of a file, until the next call. Raises ValueError where it is cut short."""
        if end - begin > len(self.buffer):
            self.buffer = memoryview(bytearray(end - begin))
        buffer = self.buffer[: end - begin]
        if os.preadv(fd, [buffer], begin) != end - begin:
            raise ValueError("cut short")
        return buffer


_thread = _Thread()


def decode_chunk(
    files: Sequence[ShardFile],
    rows: Sequence[int],
    captions: Sequence[int],
    out: dict[str, np.ndarray],
) -> np.ndarray:
    """Decode up to CHUNK samples, row rows[i] of files[i], into the rows of `bits` in `out`; bool [n]: which are good.

    captions: which member of repeated groups. All groups of a file are read; the fields of `out` that it lacks become
    zero. Rows of `out` that are not good hold anything.
    """
    n = len(rows)
    filled: dict[Layout, list[int]] = {}
    good = np.ones(n, bool)
    for i, (file, row, caption) in enumerate(zip(files, rows, captions, strict=True)):
        try:
            layer: ShardFile | None = file
            while layer is not None:  # an overlay, and what it lies on
                if (wanted := layer.wanted(caption)) and not _fill(layer, row, wanted, i, filled):
                    good[i] = False
                layer = layer.base
        except (KeyError, AttributeError, ValueError, zstandard.ZstdError):  # no such row or member, or a broken one
            good[i] = False
    origins = np.array([file.origins[row] for file, row in zip(files, rows, strict=True)], np.uint32)
    absent = set(out)
    for layout, having in filled.items():
        blobs = _thread.of(layout)
        if len(having) < n:
            blobs.memory[[i for i in range(n) if i not in having]] = 0
            good[having] &= blobs.good(n, origins)[having]
        else:
            good &= blobs.good(n, origins)
        for name, planes in blobs.planes.items():
            join([plane[:n] for plane in planes], out[name])
            absent.discard(name)
    for name in absent:
        out[name][:] = 0
    return good


def _fill(file: ShardFile, row: int, wanted: list[tuple[str, Layout]], i: int, filled: dict[Layout, list[int]]) -> bool:
    """Read and decompress members of a row of one file into the rows i of their room. False where one is odd."""
    members = file.samples[row].members
    places = [members[name] for name, _ in wanted]
    begin, end = min(places)[0], sum(max(places))
    together = end - begin <= sum(size for _, size in places) + _GAP
    data = _thread.read(file.fd, begin, end) if together else None
    fine = True
    for (offset, size), (_, layout) in zip(places, wanted, strict=True):
        if size > layout.limit:
            return False
        if data is None:
            member = _thread.read(file.fd, offset, offset + size)
        else:
            member = data[offset - begin : offset - begin + size]
        filled.setdefault(layout, []).append(i)
        fine &= _thread.of(layout).fill(i, member, _thread.zstd)
    return fine
