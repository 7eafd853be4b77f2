"""Fast path: decode several samples into a batch's memory at once, with two calls per sample and the rest per chunk.

It accepts only samples that are certainly good. `decode_member` checks all others again and finds the fault, if any.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import zstandard

from tinyflux.shards.format import ORIGIN, TOP, Layout, join
from tinyflux.shards.shardfile import ShardFile

CHUNK = 8
"""Samples that are decoded together."""
_GAP = 1 << 16  # gaps between a sample's members up to this size are read too, to save a call
# A frame added after the last member of a sample: if it is decompressed to its place, all frames before it were
# complete, with their checksums. zstd does not report a frame whose content is complete but whose end is missing.
_SEAL = zstandard.ZstdCompressor(write_checksum=True).compress(b"seal")


@dataclass
class _Region:
    """High planes that are contiguous in every sample, from begin to end, and the planes of their fields: views of all
    rows. top: of `TOP`."""

    begin: int
    end: int
    top: int
    planes: dict[str, list[np.ndarray]] = field(default_factory=dict)


class _Room:
    """Buffers for CHUNK decompressed samples whose members have these layouts, and the offsets of their parts."""

    def __init__(self, layouts: tuple[Layout, ...]):
        self.layouts, at = layouts, 0
        begins = []
        for layout in layouts:
            begins.append(at)
            at += len(layout.head) + layout.payload
        self.memory = np.zeros((CHUNK, at + 4), np.uint8)
        self.rows = [memoryview(row) for row in self.memory]
        # the start of a member: the header, followed by the origin
        self.heads = [(begin, begin + len(layout.head) + 4) for begin, layout in zip(begins, layouts, strict=True)]
        self.expected = [np.zeros((CHUNK, end - begin), np.uint8) for begin, end in self.heads]
        self.regions: list[_Region] = []
        for begin, layout, expected in zip(begins, layouts, self.expected, strict=True):
            head, planes = layout.head, layout.planes(layout.head[8:])
            assert planes[ORIGIN] == [0]
            expected[:, :-4] = np.frombuffer(head, np.uint8)
            for name, entry in layout.fields.items():
                places = [begin + len(head) + place for place in planes[name]]
                last = self.regions[-1] if self.regions else None
                if last is None or (last.end, last.top) != (places[-1], TOP[entry.dtype]):
                    last = _Region(places[-1], places[-1], TOP[entry.dtype])
                    self.regions.append(last)
                last.end += entry.count
                last.planes[name] = [self.memory[:, place : place + entry.count] for place in places]
        self.fields = {name for region in self.regions for name in region.planes}
        self._frames = [b""] * len(layouts)  # the start of a frame with the right content size and a checksum

    def states(self, i: int, data: bytearray, begin: int, end: int) -> bool:
        """Whether a frame starts there that has the i-th member's content size and a checksum."""
        if self._frames[i] and data.startswith(self._frames[i], begin, end):
            return True
        head = bytes(data[begin : min(begin + 18, end)])  # a frame's header has at most 18 bytes
        frame, layout = zstandard.get_frame_parameters(head), self.layouts[i]
        if not frame.has_checksum or frame.content_size != len(layout.head) + layout.payload:
            return False
        self._frames[i] = head[: zstandard.frame_header_size(head)]
        return True

    def take(self, n: int, origins: np.ndarray, having: list[int], out: dict[str, np.ndarray]) -> np.ndarray:
        """Join the planes of the rows `having`, of the first n, into `out`. Returns bool [n]: which of the n have these
        origin hashes and are finite."""
        good, memory, origins = np.ones(n, bool), self.memory[:n], origins.view(np.uint8).reshape(n, 4)
        for (begin, end), expected in zip(self.heads, self.expected, strict=True):
            expected, found = expected[:n], memory[:, begin:end]
            expected[:, -4:] = origins
            if found.tobytes() != expected.tobytes():
                good &= (found == expected).all(1)
        for region in self.regions:  # its bytes are in the processor's cache while both are done
            high, top = memory[:, region.begin : region.end], region.top
            if high.max() >= top | 0x80 or high.view(np.int8).max() >= top:
                good &= (high.max(1) < top | 0x80) & (high.view(np.int8).max(1) < top)
            for name, planes in region.planes.items():
                if len(having) == n:
                    join([plane[:n] for plane in planes], out[name])
                else:
                    for i in having:
                        join([plane[i] for plane in planes], out[name][i])
        for name in out.keys() - self.fields:
            out[name][having] = 0
        return good


class _Decoder:
    """One thread's decoder. It reuses its buffers, because fresh memory would cost page faults."""

    def __init__(self):
        # with the smallest window, a frame is accepted only if it can be decompressed directly into its place
        self.zstd = zstandard.ZstdDecompressor(max_window_size=1 << 10)
        self.rooms: dict[tuple[Layout, ...], _Room] = {}
        self.data = bytearray(1 << 20)  # the compressed members of a sample, concatenated
        self.between = memoryview(bytearray(_GAP))

    def room(self, layouts: tuple[Layout, ...]) -> _Room:
        """The buffers for samples with these layouts."""
        room = self.rooms.get(layouts)
        if room is None:
            room = self.rooms[layouts] = _Room(layouts)
            size = sum(layout.limit for layout in layouts) + len(_SEAL)
            self.data = bytearray(max(len(self.data), size))
        return room

    def fill(self, file: ShardFile, row: int, caption: int, room: _Room, i: int) -> bool:
        """Read and decompress a sample into row i of its room. Returns False, or raises KeyError, AttributeError,
        ValueError, OSError or ZstdError, if a member is unusual, unreadable or missing."""
        view, ends = memoryview(self.data), [0]
        layer: ShardFile | None = file
        while layer is not None:  # an overlay, then its base
            members, parts, begin, end = layer.samples[row].members, [], 0, 0
            for name, layout in layer.wanted(caption):
                offset, size = members[name]
                if size > layout.limit:
                    return False
                if parts and 0 <= offset - end <= _GAP:
                    parts.append(self.between[: offset - end])
                else:
                    _read(layer.fd, parts, begin, end)
                    parts, begin = [], offset
                end = offset + size
                parts.append(view[ends[-1] : ends[-1] + size])
                ends.append(ends[-1] + size)
            _read(layer.fd, parts, begin, end)
            layer = layer.base
        if not all([room.states(k, self.data, ends[k], ends[k + 1]) for k in range(len(ends) - 1)]):
            return False
        size = ends[-1] + len(_SEAL)
        view[ends[-1] : size] = _SEAL
        target = room.rows[i]
        reader = self.zstd.stream_reader(view[:size], read_size=size, read_across_frames=True)
        return reader.readinto(target) == len(target)


def _read(fd: int, parts: list[memoryview], begin: int, end: int) -> None:
    """Fill the parts with a file's bytes from begin to end. Raises ValueError if the file is truncated."""
    if parts and os.preadv(fd, parts, begin) != end - begin:
        raise ValueError("cut short")


_threads = threading.local()


def decode_chunk(
    files: Sequence[ShardFile],
    rows: Sequence[int],
    captions: Sequence[int],
    out: dict[str, np.ndarray],
) -> np.ndarray:
    """Decode up to CHUNK samples, row rows[i] of files[i], into the rows of `out`. Returns bool [n]: which are good.

    out: made by `bits`. captions: which member of repeated groups. All groups of a file are read; fields of `out` that
    it lacks become zero. Rows of `out` that are not good have undefined content.
    """
    if not hasattr(_threads, "decoder"):
        _threads.decoder = _Decoder()
    decoder, n = _threads.decoder, len(rows)
    filled: dict[_Room, list[int]] = {}
    whole, origins = [], []
    for i, (file, row, caption) in enumerate(zip(files, rows, captions, strict=True)):
        room = decoder.room(file.stacked)
        filled.setdefault(room, []).append(i)
        origins.append(file.origins[row])
        try:
            whole.append(decoder.fill(file, row, caption, room, i))
        except (KeyError, AttributeError, ValueError, OSError, zstandard.ZstdError):  # missing or bad
            whole.append(False)
    good, origins = np.array(whole), np.array(origins, np.uint32)
    for room, having in filled.items():
        good[having] &= room.take(n, origins, having, out)[having]
    return good
