"""Shard format, version 1: a sample is a few adjacent members of a plain tar file.

KEY.encodings.safetensors.zst  latents, t5_embeds, clip_pooled      KEY.json  prompt, origin, index, size, crop
KEY.lune.safetensors.zst       lune                                 KEY.jpg   preview, may be absent
KEY.sol.safetensors.zst        sol_stats, sol_spatial

Each group of tensors is one safetensors blob in one zstd frame that states its size and carries a checksum.
Tar headers are scanned straight from the file, so a shard needs no index beside it.
"""

import json
import os
import re
import struct
import tarfile
import threading
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import zstandard
from torch import Tensor

GROUPS = {
    "encodings": ("latents", "t5_embeds", "clip_pooled"),
    "lune": ("lune",),
    "sol": ("sol_stats", "sol_spatial"),
}
SUFFIX = ".safetensors.zst"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_STORED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}  # bit patterns from here up are not finite
_HEADER_LIMIT = 4096  # bytes of safetensors header beyond which a blob is none of ours
_KEY = re.compile(r"(\d{4,})_(\d{9,})")


class ShardError(ValueError):
    """A shard or one of its samples cannot be used; `shard` and `key` say which."""

    def __init__(self, shard: str, key: str = "", why: str = ""):
        # one argument alone is a finished message: that is how torch rebuilds an exception from another thread
        super().__init__(f"{shard}{f', sample {key}' if key else ''}: {why}" if why else shard)
        self.shard, self.key, self.why = shard, key, why


@dataclass(frozen=True)
class Field:
    """One tensor of every sample of a source: `dtype` float16, bfloat16 or float32, `shape` without the batch."""

    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class Sample(NamedTuple):
    """Where a sample lies in its shard: member extension -> (offset, size) in bytes."""

    key: str
    members: dict[str, tuple[int, int]]


def sample_key(dataset_id: int, index: int) -> str:
    """The key of the sample made from input number `index`; it has no dots, they end a key in a tar."""
    return f"{dataset_id:04d}_{index:09d}"


def parse_key(key: str) -> tuple[int, int]:
    """(dataset id, index) of a key. Raises ValueError."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{key!r} is not a sample key (DATASET_INDEX, such as 0001_000000042)")
    return int(match[1]), int(match[2])


def fields_of(tensors: dict[str, Tensor]) -> dict[str, Field]:
    """The fields that describe one sample's tensors."""
    return {name: Field(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}


def encode_sample(key: str, tensors: dict[str, Tensor], meta: dict, preview: bytes | None = None, level: int = 3):
    """One sample as the dict that webdataset.TarWriter writes; equal input gives equal bytes.

    tensors: any whole groups of GROUPS, unbatched, on the CPU. meta: what goes into KEY.json. preview: JPEG bytes.
    """
    parse_key(key)
    unknown = set(tensors) - {name for names in GROUPS.values() for name in names}
    if unknown:
        raise ValueError(f"sample {key}: unknown tensors {sorted(unknown)}; the format has {GROUPS}")
    sample = {"__key__": key}
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
    for group, names in GROUPS.items():
        given = {name: tensors[name].contiguous() for name in names if name in tensors}
        if not given:
            continue
        if len(given) < len(names):
            raise ValueError(f"sample {key}: {sorted(set(names) - set(given))} missing from group {group!r}")
        for name, tensor in given.items():
            if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
                raise ValueError(f"sample {key}: {name} is {tensor.dtype}, the format has {', '.join(DTYPES)}")
            if not tensor.isfinite().all():
                raise ValueError(f"sample {key}: {name} has NaN or infinity")
        sample[group + SUFFIX] = compressor.compress(safetensors.torch.save(given))
    sample["json"] = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
    if preview is not None:
        sample["jpg"] = preview
    return sample


_threads = threading.local()


def _decompress(data: bytes) -> bytes:
    if not hasattr(_threads, "decompressor"):  # a decompressor serves one thread only
        _threads.decompressor = zstandard.ZstdDecompressor()
    return _threads.decompressor.decompress(data, allow_extra_data=False)


def _no_duplicates(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


class _Span(NamedTuple):
    """A tensor in a decompressed blob, as integers: numpy has no bfloat16, and infinities and NaNs are the top ones."""

    name: str
    offset: int  # bytes behind the header
    count: int
    signed: np.dtype
    unsigned: np.dtype
    infinity: int  # the first pattern that is not finite, as a signed integer
    negative: int  # the same with the sign bit set, as an unsigned one


@lru_cache(maxsize=256)
def _layout(header: bytes, fields: tuple[tuple[str, Field], ...]) -> tuple[_Span, ...]:
    """The tensors behind a safetensors header, checked against the fields. Cached: a source repeats one header."""
    entries = json.loads(header, object_pairs_hook=_no_duplicates)
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError("the safetensors header is not an object of objects")
    entries.pop("__metadata__", None)
    if set(entries) != {name for name, _ in fields}:
        raise ValueError(f"has {sorted(entries)}, the manifest has {sorted(name for name, _ in fields)}")
    spans = []
    for name, field in fields:
        dtype, shape, ends = (entries[name].get(k) for k in ("dtype", "shape", "data_offsets"))
        if _STORED.get(dtype) != field.dtype or shape != list(field.shape):
            raise ValueError(f"{name} is {dtype} {shape}, the manifest says {field.dtype} {list(field.shape)}")
        if not (isinstance(ends, list) and [type(i) for i in ends] == [int, int] and ends[1] - ends[0] == field.nbytes):
            raise ValueError(f"{name} has data_offsets {ends}, its shape takes {field.nbytes} bytes")
        width = DTYPES[field.dtype].itemsize
        signed, unsigned, infinity = np.dtype(f"<i{width}"), np.dtype(f"<u{width}"), _INFINITY[field.dtype]
        count = field.nbytes // width
        spans.append(_Span(name, ends[0], count, signed, unsigned, infinity, infinity + (1 << 8 * width - 1)))
    end = 0
    for span in sorted(spans, key=lambda span: span.offset):
        if span.offset != end:
            raise ValueError(f"{span.name} begins at byte {span.offset}, the one before it ends at {end}")
        end += span.count * span.signed.itemsize
    return tuple(spans)


def member_limit(fields: dict[str, Field]) -> int:
    """The most bytes that a compressed member with these fields can have (zstd's own bound)."""
    size = sum(field.nbytes for field in fields.values()) + 8 + _HEADER_LIMIT
    return size + (size >> 8) + 512


def bits(tensors: Tensor) -> np.ndarray:
    """A contiguous batch [B, ...] as the rows [B, n] of integers that `decode_member` fills; shares its memory."""
    integer = {2: torch.int16, 4: torch.int32}[tensors.element_size()]
    return tensors.view(len(tensors), -1).view(integer).numpy()


def decode_member(data: bytes, fields: dict[str, Field], out: dict[str, np.ndarray] | None = None, where=("", "")):
    """Decode one group member and check it against `fields`.

    out: a row of `bits` for each field, filled in place; without it new tensors are returned by name.
    where: (shard, key) for errors. Raises ShardError on a damaged frame, wrong names, dtypes or shapes, NaN or
    infinity. Never takes more memory than the fields do.
    """
    payload = sum(field.nbytes for field in fields.values())
    try:
        frame = zstandard.get_frame_parameters(data)
        if not frame.has_checksum:
            raise ValueError("the zstd frame has no checksum")
        if not payload + 8 < frame.content_size <= payload + 8 + _HEADER_LIMIT:  # also where the size is not stated
            raise ValueError(f"the zstd frame states {frame.content_size} bytes, the manifest's fields take {payload}")
        blob = _decompress(data)
        base = 8 + int.from_bytes(blob[:8], "little")
        if base + payload != len(blob):
            raise ValueError(f"has {len(blob) - base} bytes of tensors, the manifest's fields take {payload}")
        spans = _layout(blob[8:base], tuple(fields.items()))
    except (zstandard.ZstdError, ValueError, RecursionError) as error:
        raise ShardError(*where, f"{'+'.join(fields)}: {error}") from error
    tensors = None
    if out is None:
        tensors = {name: torch.empty(field.shape, dtype=DTYPES[field.dtype]) for name, field in fields.items()}
        out = {name: bits(tensor[None])[0] for name, tensor in tensors.items()}
    for span in spans:
        values = np.frombuffer(blob, span.signed, span.count, base + span.offset)
        # two maxima see a full exponent under either sign, and need no temporary array
        if values.max() >= span.infinity or values.view(span.unsigned).max() >= span.negative:
            raise ShardError(*where, f"{span.name} has NaN or infinity")
        out[span.name][:] = values
    return tensors


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
