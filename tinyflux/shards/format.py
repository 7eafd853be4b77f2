"""Shard format, version 2: a sample is a few adjacent members of a plain tar file.

KEY.latents.safetensors.zst   latents                        KEY.json  prompts, origin, index, size, crop
KEY.text.0.safetensors.zst    t5_embeds, clip_pooled         KEY.jpg   preview, may be absent
KEY.lune.safetensors.zst      lune, and so on: see `schema`; text.1, text.2, ... are more captions

A group of tensors is one safetensors blob in one zstd frame with content size and checksum. The blob starts with
`origin`, U8 [4]: the hash of the image's origin, little-endian, which the source's index also has for the row.
Then come the byte planes of the tensors as U8: NAME.0 is the lowest byte of each element, NAME.1 the next. The planes 0
of all tensors come first, and a zstd block ends after them: similar bytes compress better and faster than mixed ones.
One line of numpy joins the planes of a two-byte tensor: `(high.astype("<u2") << 8 | low).view("<f2")`.
"""

import hashlib
import json
import re
import threading
from functools import lru_cache

import numpy as np
import torch
import zstandard
from torch import Tensor

from tinyflux.shards.schema import DTYPES, GROUP_OF, SCHEMA, Field, check_names, fields_of, shape_of

SUFFIX = ".safetensors.zst"
ORIGIN = "origin"
_ORIGIN_BYTES = 4
TOP = {"float16": 0x7C, "bfloat16": 0x7F, "float32": 0x7F}  # high bytes from here on may be inf or NaN
_HEADER_LIMIT = 4096  # bytes; longer safetensors headers are refused
_KEY = re.compile(r"([0-9]{4,18})_([0-9]{9,18})")  # both numbers have 64 bits


class ShardError(ValueError):
    """A shard or one of its samples cannot be used; `shard` and `key` name it."""

    def __init__(self, shard: str, key: str = "", why: str = ""):
        # torch rebuilds an exception of another thread from its message only
        super().__init__(f"{shard}{f', sample {key}' if key else ''}: {why}" if why else shard)
        self.shard, self.key, self.why = shard, key, why


def sample_key(dataset_id: int, index: int) -> str:
    """The key of the sample made from input number `index`. It has no dots, because in a tar a dot ends the key."""
    return f"{dataset_id:04d}_{index:09d}"


def parse_key(key: str) -> tuple[int, int]:
    """(dataset id, index) of a key. Raises ValueError."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{key!r} is not a sample key (DATASET_INDEX, such as 0001_000000042)")
    return int(match[1]), int(match[2])


def origin_hash(origin: str) -> int:
    """32 bits of the SHA-256 of an image's origin. All captions of an image have the same hash."""
    return int.from_bytes(hashlib.sha256(origin.encode()).digest()[:_ORIGIN_BYTES], "little")


def member_name(group: str, caption: int | None = None) -> str:
    """The extension of a group's member; `caption`: the member's number in a repeated group."""
    return f"{group}{SUFFIX}" if caption is None else f"{group}.{caption}{SUFFIX}"


class Layout:
    """The offsets of a group's byte planes in its blob; `fields` must be without "h" and "w".

    Blobs written by this package have the header `head`; other headers are parsed, each once.
    """

    def __init__(self, fields: dict[str, Field]):
        self.fields = fields
        self.widths = {name: DTYPES[field.dtype].itemsize for name, field in fields.items()}
        self.payload = _ORIGIN_BYTES + sum(field.nbytes for field in fields.values())
        entries: dict[str, dict] = {"__metadata__": {name: field.dtype for name, field in fields.items()}}
        entries[ORIGIN] = {"dtype": "U8", "shape": [_ORIGIN_BYTES], "data_offsets": [0, _ORIGIN_BYTES]}
        end = _ORIGIN_BYTES
        for plane in range(max(self.widths.values())):
            for name, field in fields.items():
                if plane < self.widths[name]:
                    begin, end = end, end + field.count
                    entries[f"{name}.{plane}"] = {
                        "dtype": "U8",
                        "shape": list(field.shape),
                        "data_offsets": [begin, end],
                    }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.head = len(text).to_bytes(8, "little") + text
        self._known = {self.head[8:]: self._parse(text)}

    @property
    def limit(self) -> int:
        """Upper bound of a compressed member's bytes (zstd's bound)."""
        size = self.payload + 8 + _HEADER_LIMIT
        return size + (size >> 8) + 512

    def planes(self, header: bytes) -> dict[str, list[int]]:
        """The offsets, after the header, of each field's planes (low byte first) and of "origin". Raises ValueError."""
        found = self._known.get(header)
        if found is None:
            found = self._parse(header)
            if len(self._known) < 64:
                self._known[header] = found
        return found

    def _parse(self, header: bytes) -> dict[str, list[int]]:
        entries = json.loads(header, object_pairs_hook=_no_duplicates)
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError("the safetensors header is not an object of objects")
        dtypes = entries.pop("__metadata__", {})
        wanted = {name: field.dtype for name, field in self.fields.items()}
        if dtypes != wanted:
            raise ValueError(f"its header says {str(dtypes):.200}, the manifest has {wanted}")
        counts = {ORIGIN: ([_ORIGIN_BYTES], _ORIGIN_BYTES)}
        for name, field in self.fields.items():
            counts |= {f"{name}.{p}": (list(field.shape), field.count) for p in range(self.widths[name])}
        if set(entries) != set(counts):
            raise ValueError(f"has {str(sorted(entries)):.200}, the manifest has {sorted(counts)}")
        begins = {}
        for name, (shape, count) in counts.items():
            entry = entries[name]
            if entry.get("dtype") != "U8" or entry.get("shape") != shape:
                raise ValueError(f"{name} is {entry.get('dtype')!r:.40} {entry.get('shape')!r:.80}, must be U8 {shape}")
            ends = entry.get("data_offsets")
            if not (isinstance(ends, list) and [type(i) for i in ends] == [int, int] and ends[1] - ends[0] == count):
                raise ValueError(f"{name} has data_offsets {ends!r:.80}, its shape takes {count} bytes")
            begins[name] = ends[0]
        end = 0
        for name in sorted(begins, key=begins.get):
            if begins[name] != end:
                raise ValueError(f"{name} starts at byte {begins[name]}, but the previous tensor ends at {end}")
            end += counts[name][1]
        return {ORIGIN: [begins[ORIGIN]]} | {
            name: [begins[f"{name}.{plane}"] for plane in range(self.widths[name])] for name in self.fields
        }


def _no_duplicates(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


_threads = threading.local()  # a compressor or decompressor serves one thread only


def encode_member(tensors: dict[str, Tensor], layout: Layout, origin: int, level: int = 3) -> bytes:
    """Encode one group of one sample; `tensors` must match the layout's fields, be finite and on the CPU."""
    made = _threads.__dict__.setdefault("compressors", {})
    compressor = made.get(level)
    if compressor is None:
        compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
        made[level] = compressor
    elements = [  # [n, bytes of an element] each
        np.ascontiguousarray(bits(tensors[name].contiguous()[None])[0]).view(np.uint8).reshape(field.count, -1)
        for name, field in layout.fields.items()
    ]
    writer = compressor.compressobj(size=len(layout.head) + layout.payload)
    data = [writer.compress(layout.head + origin.to_bytes(_ORIGIN_BYTES, "little"))]
    for plane in range(max(layout.widths.values())):
        if plane:
            data.append(writer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        data += [writer.compress(e[:, plane].tobytes()) for e in elements if plane < e.shape[1]]
    return b"".join([*data, writer.flush()])


def encode_sample(
    key: str,
    tensors: dict[str, Tensor],
    meta: dict | None,
    preview: bytes | None = None,
    *,
    origin: int | None = None,
    level: int = 3,
) -> dict:
    """Encode one sample as a dict for `write_shard`; equal input gives equal bytes.

    tensors: complete groups of the schema, unbatched, on the CPU; in a repeated group, of one caption, or of several
    captions stacked. meta: content of KEY.json. preview: JPEG bytes. origin: the hash of the image's origin; default:
    that of meta["origin"]. Raises ValueError with the name of a bad tensor.
    """
    parse_key(key)
    try:
        check_names(tensors)
        fields_of(tensors)  # refuses wrong axes
        for name, tensor in tensors.items():
            if _dtype(tensor) not in DTYPES:
                raise ValueError(f"{name} is {tensor.dtype}, must be one of {', '.join(DTYPES)}")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} has NaN or infinity")
        origin = origin_hash(meta["origin"]) if origin is None else origin
        sample = {"__key__": key, "__origin__": origin, "__shape__": shape_of(tensors)}
        for group in dict.fromkeys(GROUP_OF[name] for name in tensors):
            own = {name: tensors[name] for name in SCHEMA[group].fields}
            for caption, part in _captions(group, own):
                layout = layout_of({n: Field(_dtype(t), tuple(t.shape)) for n, t in part.items()})
                sample[member_name(group, caption)] = encode_member(part, layout, origin, level)
    except ValueError as error:
        raise ValueError(f"sample {key}: {error}") from error
    if meta is not None:
        sample["json"] = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
    if preview is not None:
        sample["jpg"] = preview
    return sample


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _captions(group: str, tensors: dict[str, Tensor]):
    """(number, tensors) of each member of a group."""
    entry = SCHEMA[group]
    if not entry.repeated:
        return [(None, tensors)]
    stacked = [tensor.ndim > len(entry.fields[name]) for name, tensor in tensors.items()]
    if not any(stacked):
        return [(0, tensors)]
    counts = {len(tensor) for tensor in tensors.values()}
    if not all(stacked) or len(counts) != 1:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"{group!r} has the shapes {shapes}: all its fields must have the same number of captions")
    return [(i, {name: tensor[i] for name, tensor in tensors.items()}) for i in range(counts.pop())]


@lru_cache(maxsize=1024)
def _layout(fields: tuple[tuple[str, Field], ...]) -> Layout:
    return Layout(dict(fields))


def layout_of(fields: dict[str, Field]) -> Layout:
    """The layout of these fields, cached."""
    return _layout(tuple(fields.items()))


def bits(tensors: Tensor) -> np.ndarray:
    """A view of a contiguous batch [B, ...] as rows [B, n] of unsigned integers, for `decode_member` to fill."""
    kind = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}[tensors.element_size()]
    return tensors.reshape(len(tensors), -1).view(kind[0]).numpy().view(kind[1])


def decompress(data: bytes, layout: Layout) -> bytes:
    """The blob of a member. Raises zstandard.ZstdError, ValueError. Never allocates more than its fields need."""
    frame = zstandard.get_frame_parameters(data)
    if not frame.has_checksum:
        raise ValueError("the zstd frame has no checksum")
    if not layout.payload + 8 < frame.content_size <= layout.payload + 8 + _HEADER_LIMIT:  # also where none is stated
        raise ValueError(f"the zstd frame states {frame.content_size} bytes, its fields take {layout.payload}")
    if not hasattr(_threads, "decompressor"):
        _threads.decompressor = zstandard.ZstdDecompressor()
    return _threads.decompressor.decompress(data, allow_extra_data=False)


def decode_member(
    data: bytes,
    layout: Layout,
    origin: int | None,
    out: dict[str, np.ndarray] | None = None,
    where: tuple[str, str] = ("", ""),
    *,
    finite: bool = True,
) -> dict[str, Tensor] | None:
    """Decode one group member and check it against its layout.

    origin: the hash that the index has for the row, None if unknown. out: for each field, a row of `bits` to fill in
    place; without it, new tensors are returned by name. where: (shard, key) for errors. finite: refuse NaN and
    infinity. Raises ShardError for a damaged frame, tensors of another image, wrong names, dtypes or shapes.
    """
    try:
        blob = decompress(data, layout)
        if blob.startswith(layout.head):
            base = len(layout.head)
        else:
            base = 8 + int.from_bytes(blob[:8], "little")
            if base + layout.payload != len(blob):
                raise ValueError(f"has {len(blob) - base} bytes of tensors, its fields take {layout.payload}")
        planes = layout.planes(blob[8:base])
    except (zstandard.ZstdError, ValueError, RecursionError) as error:
        raise ShardError(*where, f"{'+'.join(layout.fields)}: {error}") from error
    begin = base + planes[ORIGIN][0]
    found = int.from_bytes(blob[begin : begin + _ORIGIN_BYTES], "little")
    if origin is not None and found != origin:
        hashes = f"origin hash {found:08x}, the index has {origin:08x}"
        raise ShardError(*where, f"{'+'.join(layout.fields)}: made from another image ({hashes})")
    tensors = None
    if out is None:
        tensors = {name: torch.empty(f.shape, dtype=DTYPES[f.dtype]) for name, f in layout.fields.items()}
        out = {name: bits(tensor[None])[0] for name, tensor in tensors.items()}
    for name, field in layout.fields.items():
        parts = [np.frombuffer(blob, np.uint8, field.count, base + begin) for begin in planes[name]]
        high, top = parts[-1], TOP[field.dtype]
        # two maxima find such exponents of either sign without a temporary array
        full = finite and (high.view(np.int8).max() >= top or high.max() >= top | 0x80)
        # float16 has its whole exponent there; the other types have one more bit in the next byte
        if full and (field.dtype == "float16" or (((high & 0x7F) == top) & (parts[-2] >= 0x80)).any()):
            raise ShardError(*where, f"{name} has NaN or infinity")
        join(parts, out[name])
    return tensors


def join(planes: list[np.ndarray], out: np.ndarray) -> None:
    """Byte planes uint8 [n], lowest first, as unsigned integers into `out` [n]."""
    np.multiply(planes[-1], 256, out=out, dtype=out.dtype)  # faster than a shift, which numpy casts in more steps
    for plane in planes[-2:0:-1]:
        out |= plane
        out <<= 8
    out |= planes[0]


def describe_member(data: bytes, limit: int = 1 << 28) -> tuple[dict[str, Field], int]:
    """(fields, origin hash) of a member with unknown fields. Raises ValueError. Reads at most `limit` bytes."""
    try:
        size = zstandard.get_frame_parameters(data).content_size
        if size > limit:  # also where none is stated
            raise ValueError(f"the zstd frame states {size} bytes")
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            length = int.from_bytes(reader.read(8), "little")
            if length > _HEADER_LIMIT:
                raise ValueError("not a member of this format: its safetensors header is too long")
            header = reader.read(length)
        entries = json.loads(header)
        dtypes = entries["__metadata__"]
        fields = {name: Field(dtype, tuple(entries[f"{name}.0"]["shape"])) for name, dtype in dtypes.items()}
        if not fields or any(field.dtype not in DTYPES for field in fields.values()):
            raise ValueError(f"not a member of this format: its header says {str(dtypes):.200}")
        begin = 8 + length + layout_of(fields).planes(header)[ORIGIN][0]
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            start = reader.read(begin + _ORIGIN_BYTES)  # of ours the origin is in the first block
        if len(start) != begin + _ORIGIN_BYTES:
            raise ValueError("cut short")
        return fields, int.from_bytes(start[begin:], "little")
    except (zstandard.ZstdError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a member of this format: {error!r:.200}") from error
