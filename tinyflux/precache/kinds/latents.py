"""Kind "latents": existing FLUX latents in tables, tars or a folder, with their captions."""

import io
import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import prod
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tinyflux.precache.images import Rejected
from tinyflux.precache.kinds.base import CaptionedSource, ImageSource, Input, SourceError, Text
from tinyflux.precache.kinds.hf import HfDataset, Rows
from tinyflux.precache.kinds.imagefolder import ImageFolder
from tinyflux.precache.kinds.webdataset import WebDataset
from tinyflux.shards.schema import DTYPES

EXTENSIONS = frozenset(("npy", "npz", "safetensors", "pt", "pth"))
NAMES = ("latents", "latent")  # names of the tensor in a file with several
LARGEST = 1 << 26  # bytes of the latents of one image
SIDES = 1024  # latent pixels


class _Folder(ImageFolder):
    extensions = known = EXTENSIONS


class _Tars(WebDataset):
    extensions = EXTENSIONS


@dataclass(frozen=True, kw_only=True)
class _Table(HfDataset):
    shape: Text | None = None

    @property
    def cells(self) -> dict[str, list[str]]:
        return {"latent": [self.image], "shape": [self.shape] if self.shape else []}

    def as_read(self, rows):
        import datasets

        kind = rows.features[self.image]
        if isinstance(kind, datasets.Value) or self.streaming:  # numpy strings would lose trailing zero bytes
            return rows
        return rows.with_format("numpy", columns=[self.image], output_all_columns=True)

    def read_image(self, item: Input) -> Any:
        row = self.stream.row(item.place) if self.streaming else self.rows[item.place]
        return row[self.image] if self.shape is None else (row[self.image], row[self.shape])


@dataclass(frozen=True, kw_only=True)
class Latents(Rows, CaptionedSource):
    """Latents [C, h, w] of the FLUX VAE: .npy, .safetensors or .pt files in a folder or in tars, or a dataset.

    A cell of a dataset is nested lists, a flat list with its shape in another column, or the bytes of such a file.
    """

    recipe: ClassVar[str] = "from_latents:FromLatents"
    location: Text
    scaling: Literal["raw", "scaled", "shifted"]
    """How the VAE's output z was scaled: not; z * scaling_factor; or (z - shift_factor) * scaling_factor."""
    latent: Text = "latent"
    """The column, or the tensor's name in a file with several."""
    shape: Text | None = None
    """The column of the shapes of flat latents."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype of latents that are plain bytes without a header."""
    caption: list[str] | None = None

    @cached_property
    def files(self) -> ImageSource:
        """The source that lists and reads the files."""
        common = {name: getattr(self, name) for name in ("name", "kind", "base", "dataset_id", "location", "caption")}
        common |= {"captions": self.captions, "allow_empty_captions": self.allow_empty_captions}
        path = self.path
        tars = self.location.endswith(".tar") or path.is_dir() and next(path.rglob("*.tar"), None)
        files = path.is_dir() and any(each.suffix[1:].lower() in EXTENSIONS for each in path.rglob("*.*"))
        if tars and files:
            raise SourceError(f"[{self.name}] location: {path}: has tars and files of latents; make it two sources")
        if tars or files:
            return (_Tars if tars else _Folder)(**common)
        rows = {field.name: getattr(self, field.name) for field in fields(Rows)}
        return _Table(**common, image=self.latent, shape=self.shape, **rows)

    @property
    def keeps_order(self) -> bool:
        return self.files.keeps_order

    @property
    def ignored(self) -> dict[str, int]:
        """Number of skipped files by extension."""
        return getattr(self.files, "ignored", {})

    def parts(self) -> list[tuple[str, str]] | None:
        return self.files.parts()

    def done_with(self, part: str) -> None:
        self.files.done_with(part)

    def inputs_of(self, part: str) -> Iterator[Input]:
        return self.files.inputs_of(part)

    def records(self, size: int, seed: int) -> Iterator[list]:
        return self.files.records(size, seed)

    def stem(self, item: Input) -> str:
        return self.files.stem(item)

    def join(self, stem: str, rows: Iterable[list]) -> Iterator[Input]:
        return self.files.join(stem, rows)

    def inputs(self, size: int, seed: int) -> Iterator[Input]:
        return self.files.inputs(size, seed)

    def read_texts(self, item: Input) -> list[str]:
        return self.files.read_texts(item)

    def sought(self, item: Input) -> str:
        return self.files.sought(item)

    def read_latents(self, item: Input) -> Tensor:
        """The latents [C, h, w] with their original scaling, in any thread. Raises Rejected."""
        cell = self.files.read_image(item)
        cell, shape = cell if isinstance(cell, tuple) else (cell, None)
        if isinstance(cell, bytes):
            cell = self._decoded(cell, shape)
        try:
            found = torch.as_tensor(np.asarray(cell) if isinstance(cell, list) else cell)
        except (TypeError, ValueError, RuntimeError) as error:
            raise Rejected(f"unreadable latents: {error}") from error
        if not found.is_floating_point():
            raise Rejected(f"unreadable latents: {found.dtype}, must be floating point")
        if shape is not None:
            shape = [int(n) for n in shape]
            if prod(shape) != found.numel() or min(shape, default=0) < 1:
                raise Rejected(f"unreadable latents: {found.numel()} values for the shape {shape}")
            found = found.reshape(shape)
        if found.ndim == 4 and len(found) == 1:
            found = found[0]
        if found.ndim != 3 or not 1 <= max(found.shape[1:]) <= SIDES or not found.numel():
            hint = "; name the column of their shapes with `shape`" if found.ndim == 1 else ""
            raise Rejected(f"unreadable latents: {list(found.shape)}, must be [C, h, w]{hint}")
        found = found.to(torch.float32)
        if not found.isfinite().all():
            raise Rejected("not finite: the latents have NaN or infinity")
        return found

    def read_size(self, item: Input) -> tuple[int, int]:
        """Width and height of the latents, from the header of their file if it has one. Raises Rejected."""
        shape = [] if isinstance(self.files, _Table) else self._shape_in(self.files.read_head(item))
        if not 3 <= len(shape) <= 4 or 0 in shape:
            shape = self.read_latents(item).shape
        return shape[-1], shape[-2]

    def _shape_in(self, head: bytes) -> Sequence[int]:
        """The shape that the first bytes of a .npy or .safetensors file give; empty if they give none."""
        try:
            if head.startswith(b"\x93NUMPY"):
                return _numpy_header(io.BytesIO(head))[0]
            end = 8 + int.from_bytes(head[:8], "little")
            if head[8:9] == b"{" and end <= len(head):
                entries = {k: v["shape"] for k, v in json.loads(head[8:end]).items() if k != "__metadata__"}
                return self._one_of({name: torch.empty(shape, device="meta") for name, shape in entries.items()}).shape
        except (ValueError, RuntimeError, TypeError, KeyError, AttributeError):  # reading all of it says what is wrong
            pass
        return []

    def _decoded(self, data: bytes, shape) -> Any:
        """The tensor in a file's bytes. No code from it is executed."""
        if len(data) > LARGEST:
            raise Rejected(f"unreadable latents: {len(data)} bytes, at most {LARGEST} are accepted")
        try:
            if data.startswith(b"\x93NUMPY"):
                return _numpy(data)
            if data.startswith(b"PK\x03\x04"):
                with zipfile.ZipFile(io.BytesIO(data)) as file:
                    if sum(info.file_size for info in file.infolist()) > LARGEST:
                        raise Rejected(f"unreadable latents: more than {LARGEST} bytes when unpacked")
                    if not any(name.endswith("data.pkl") for name in file.namelist()):
                        return self._one_of({n.removesuffix(".npy"): _numpy(file.read(n)) for n in file.namelist()})
            if data.startswith((b"PK\x03\x04", b"\x80\x02")):
                return self._one_of(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
            if data[8:9] == b"{":
                return self._one_of(safetensors.torch.load(data))
            if self.dtype and shape is not None:
                return torch.frombuffer(bytearray(data), dtype=DTYPES[self.dtype])
        except pickle.UnpicklingError as error:
            raise Rejected("unreadable latents: refused, the file contains more than tensors") from error
        except (
            ValueError, RuntimeError, EOFError, KeyError, OSError, MemoryError, zipfile.BadZipFile,
            safetensors.SafetensorError,
        ) as error:  # fmt: skip
            raise Rejected(f"unreadable latents: {str(error).partition(chr(10))[0]}") from error
        raise Rejected("unreadable latents: no .npy, .npz, .safetensors or .pt; plain bytes need dtype and shape")

    def _one_of(self, content: Any) -> Any:
        if isinstance(content, dict):
            names = [name for name in (self.latent, *NAMES) if name in content] or [*content]
            if len(names) > 1 and names[0] not in (self.latent, *NAMES) or not names:
                found = ", ".join(sorted(map(str, content)))
                raise Rejected(f"unreadable latents: which of {found}? Name it with `latent`")
            content = content[names[0]]
        if not isinstance(content, Tensor | np.ndarray):
            raise Rejected(f"unreadable latents: a {type(content).__name__}, must be a tensor")
        return content


def _numpy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and dtype at the beginning of a .npy file. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _numpy(data: bytes) -> np.ndarray:
    """The array in a .npy file. Raises ValueError, also if its header and its size do not match."""
    file = io.BytesIO(data)
    shape, _, dtype = _numpy_header(file)
    if dtype.hasobject or prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"its header says {dtype} {list(shape)}, which does not match its size")
    return np.load(io.BytesIO(data), allow_pickle=False)
