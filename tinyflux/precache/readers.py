"""The kinds of sources, one reader for each: an ordered list of inputs, none of them read yet."""

import csv as csvlib
import json
import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock

from webdataset.shardlists import expand_urls

from tinyflux.model.tiny.shapes import render
from tinyflux.precache.fetch import download
from tinyflux.precache.images import EXTENSIONS, Rejected
from tinyflux.precache.inputs import Input, check_field, digest, lines_of, printable, read_file, records, texts
from tinyflux.precache.sources import SourceError, SourceSpec
from tinyflux.shards.tar import read_member, scan_tar


def list_inputs(spec: SourceSpec, size: int, seed: int) -> list[Input]:
    """Everything that the source holds now, ordered by path bytes.

    `size` and `seed` are what rendered images are drawn with. Raises FileNotFoundError, SourceError.
    """
    inputs = READERS[spec.kind](spec, size, seed)
    if not inputs:
        raise SourceError(f"[{spec.name}] {spec.kind} {spec.location}: no images found")
    if spec.captions != "all":
        return inputs
    return [each for item in inputs for each in _one_each(item)]


def _one_each(item: Input) -> list[Input]:
    """An input for each caption; the input itself where there is none, to be rejected when it is read."""
    try:
        filled = [text for text in item.captions() if text.strip()]
    except (Rejected, UnicodeError):
        filled = []
    each = [item._replace(stamp=f"{item.stamp} {i}", captions=lambda c=c: [c]) for i, c in enumerate(filled)]
    return each or [item]


def shapes(spec: SourceSpec, size: int, seed: int) -> list[Input]:
    """Rendered coloured shapes, as many as `count`."""
    draw = lru_cache(maxsize=64)(render)  # an image and its caption are asked for separately
    return [
        Input(f"shapes/{i}", f"{seed}", lambda i=i: draw(i, seed, size)[0], lambda i=i: [draw(i, seed, size)[1]])
        for i in range(spec.count)
    ]


def imagefolder(spec: SourceSpec, size: int, seed: int) -> list[Input]:
    """All images of a folder and its subfolders; captions from metadata.jsonl, prompts.txt or a .txt beside each."""
    root = folder(spec)
    sizes = _walk(root)
    lists = [name for name in ("metadata.jsonl", "prompts.txt") if name in sizes]
    if len(lists) > 1:
        raise SourceError(f"[{spec.name}] {root}: has metadata.jsonl and prompts.txt; captions must be in one of them")
    listed: dict[str, list] = {}
    if lists:
        read = _metadata if lists[0] == "metadata.jsonl" else _prompts
        for name, value in read(root / lists[0], spec.caption or "text"):
            listed.setdefault(name.removeprefix("./"), []).extend(value if isinstance(value, list) else [value])
    names = {name for name in sizes if name.rpartition(".")[2].lower() in EXTENSIONS} | set(listed)
    inputs = []
    for name in sorted(names, key=os.fsencode):
        beside = f"{name.rpartition('.')[0]}.txt"
        if lists:
            values = [value for value in listed.get(name, []) if value is not None]
            stamp, captions = digest(sizes.get(name), values), lambda v=values: texts(v, lists[0])
        else:
            stamp, captions = digest(sizes.get(name), sizes.get(beside)), lambda b=beside: _beside(root, b, spec)
        inputs.append(Input(printable(name), stamp, lambda n=name: read_file(root, n), captions))
    return inputs


def folder(spec: SourceSpec) -> Path:
    """The source's folder. Raises FileNotFoundError, SourceError."""
    if not spec.path.exists():
        raise FileNotFoundError(f"[{spec.name}] location: {spec.path}: no such folder")
    if not spec.path.is_dir():
        raise SourceError(f"[{spec.name}] location: {spec.path} is a file, kind {spec.kind!r} wants a folder")
    return spec.path


def _walk(root: Path, below: str = "") -> dict[str, int]:
    """Files under a folder: path -> bytes. Hidden ones are skipped. Raises SourceError on a link to a folder."""
    found = {}
    with os.scandir(root / below) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_symlink() and entry.is_dir():
                raise SourceError(f"{entry.path}: is a link to a folder, these are not followed; copy it or mount it")
            if entry.is_dir(follow_symlinks=False):
                found |= _walk(root, f"{below}{entry.name}/")
            else:
                found[below + entry.name] = entry.stat(follow_symlinks=False).st_size
    return found


def _beside(root: Path, name: str, spec: SourceSpec) -> list[str]:
    if not os.path.lexists(root / name):
        return []
    text = read_file(root, name).decode("utf-8-sig")
    return text.splitlines() if spec.captions else [text]


def _metadata(path: Path, field: str):
    rows = [record for _, record in records(path, "file_name")]
    check_field(rows, field, path)
    for row in rows:
        yield row["file_name"], row.get(field)


def _prompts(path: Path, field: str):
    for number, line in lines_of(path):
        name, separator, text = line.partition("\t" if "\t" in line else ":")
        if not separator:
            raise SourceError(f"{path}, line {number}: must be an image's path, a tab or a colon, and its caption")
        yield name.strip(), text


def jsonl(spec: SourceSpec, size: int, seed: int) -> list[Input]:
    """A JSON Lines file of image paths and captions: {"image": "a/b.png", "text": "a caption"}."""
    path = listing(spec)
    return _rows(spec, path, [record for _, record in records(path, spec.image)])


def csv(spec: SourceSpec, size: int, seed: int) -> list[Input]:
    """A CSV or TSV file with a header line; its columns are the fields of `jsonl`."""
    path = listing(spec)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csvlib.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            rows = list(table)
    except (csvlib.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not a CSV file in UTF-8: {error}") from error
    for number, row in enumerate(rows, 1):
        if not row.get(spec.image):
            raise SourceError(
                f"{path}, row {number}: nothing in column {spec.image!r}; the header has {table.fieldnames}"
            )
    return _rows(spec, path, rows)


def listing(spec: SourceSpec) -> Path:
    """The source's file. Raises FileNotFoundError."""
    if not spec.path.is_file():
        raise FileNotFoundError(f"[{spec.name}] location: {spec.path}: no such file")
    return spec.path


def _rows(spec: SourceSpec, path: Path, rows: list[dict]) -> list[Input]:
    field = spec.caption or "text"
    check_field(rows, field, path)
    root = path.parent if spec.root is None else spec.base / Path(spec.root).expanduser()
    inputs = []
    for row in rows:
        name = row[spec.image]
        if os.path.isabs(name):
            name = os.path.relpath(name, root)  # one that leads outside now starts with .. and is rejected
        read, captions = partial(read_file, root, name), partial(texts, row.get(field), field)
        inputs.append(Input(printable(name), digest(row.get(field)), read, captions))
    return sorted(inputs, key=lambda item: item.origin.encode())


def webdataset(spec: SourceSpec, size: int, seed: int) -> list[Input]:
    """Raw tars of images and .txt or .json captions, as img2dataset writes them: a folder, files or URLs."""
    inputs = []
    for name, tar in tars(spec):
        for sample in scan_tar(tar):
            picture = next((x for x in sample.members if x.rpartition(".")[2].lower() in EXTENSIONS), None)
            if picture is None:
                continue
            captions = partial(_tar_captions, tar, sample.members, spec.caption)
            stamp = digest(sample.members[picture])
            inputs.append(
                Input(f"{name}/{sample.key}", stamp, partial(_slice, tar, *sample.members[picture]), captions)
            )
    return inputs


def _slice(path: Path, offset: int, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return read_member(file.fileno(), offset, size)
    except OSError as error:
        raise Rejected(f"unreadable file: {error.strerror}") from error


def _tar_captions(path: Path, members: dict[str, tuple[int, int]], field: str) -> list[str]:
    if "txt" in members and not field:
        return [_slice(path, *members["txt"]).decode("utf-8-sig")]
    if "json" not in members:
        return []
    try:
        record = json.loads(_slice(path, *members["json"]))
    except (ValueError, RecursionError) as error:
        raise Rejected(f"caption's .json is damaged: {error}") from error
    return texts(record.get(field or "caption") if isinstance(record, dict) else None, field or "caption")


def tars(spec: SourceSpec) -> list[tuple[str, Path]]:
    """(name, local file) of the source's tars, ordered by name. Raises FileNotFoundError, SourceError."""
    if "://" in spec.location:
        return [(url.rpartition("/")[2], download(url)) for url in expand_urls(spec.location)]
    if spec.path.is_dir():
        return sorted((path.name, path) for path in spec.path.glob("*.tar"))
    found = [Path(path) for path in expand_urls(str(spec.path))]
    for path in found:
        if not path.is_file():
            raise FileNotFoundError(f"[{spec.name}] location: {path}: no such tar or folder of tars")
    return [(path.name, path) for path in found]


def hf(spec: SourceSpec, size: int, seed: int) -> list[Input]:
    """A dataset of the `datasets` library: a Hub name, or a local folder of images, parquet or arrow files."""
    try:
        import datasets  # optional: only this kind needs it
    except ImportError as error:
        raise SourceError(f"[{spec.name}] kind 'hf' needs the datasets package: pip install datasets") from error
    if spec.streaming and (spec.count is None or spec.captions == "all"):
        raise SourceError(f"[{spec.name}] streaming: needs count, how many rows to take, and one caption a row")
    where, field = (str(spec.path) if spec.path.exists() else spec.location), spec.caption or "text"
    try:
        if (Path(where) / "state.json").is_file():
            rows = datasets.load_from_disk(where)
        elif (Path(where) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(where)[spec.split]
        else:
            options = {"name": spec.config, "split": spec.split, "revision": spec.revision}
            rows = datasets.load_dataset(where, streaming=spec.streaming, **options)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(f"[{spec.name}] {where}: cannot be loaded as a dataset: {error}") from error
    columns = rows.features or {}
    for key, column in (("image", spec.image), ("caption", field)):
        if column not in columns:
            raise SourceError(f"[{spec.name}] {key}: no column {column!r}; {where} has {', '.join(columns)}")
    if not isinstance(columns[spec.image], datasets.Image):
        raise SourceError(f"[{spec.name}] image: column {spec.image!r} is {columns[spec.image]}, must be an Image")
    rows = rows.select_columns(list({spec.image, field})).cast_column(spec.image, datasets.Image(decode=False))
    if spec.streaming:
        stream = _Stream(rows, spec)
        return [
            Input(
                f"{spec.split}/{i}",
                "",
                lambda i=i: _hf_image(stream.row(i).pop(spec.image)),  # popped: the rows kept stay small
                lambda i=i: texts(stream.row(i)[field], field),
            )
            for i in range(spec.count)
        ]
    values = rows.select_columns([field])[field]
    return [
        Input(
            f"{spec.split}/{i}", digest(value), lambda i=i: _hf_image(rows[i][spec.image]), partial(texts, value, field)
        )
        for i, value in enumerate(values)
    ]


class _Stream:
    """Rows of a streaming dataset by number, asked for in nearly rising order by several threads."""

    KEPT = 2048

    def __init__(self, rows, spec: SourceSpec):
        self._rows, self._spec, self._lock = rows, spec, Lock()
        self._kept: dict[int, dict] = {}
        self._iterator, self._next = None, 0

    def row(self, i: int) -> dict:
        """Row i. Raises SourceError behind the end."""
        with self._lock:
            near = self._iterator is not None and self._next <= i < self._next + self.KEPT
            if i not in self._kept and not near:
                self._iterator, self._next = iter(self._rows.skip(i)), i
            while i not in self._kept:
                row = next(self._iterator, None)
                if row is None:
                    where = f"[{self._spec.name}] count: {self._spec.count} rows asked for"
                    raise SourceError(f"{where}, {self._spec.location} ends before row {self._next + 1}")
                self._kept[self._next] = row
                self._next += 1
                self._kept.pop(self._next - self.KEPT, None)
            return self._kept[i]


def _hf_image(cell: dict | None) -> bytes:
    if not cell:
        raise Rejected("missing image")
    if cell["bytes"] is not None:
        return cell["bytes"]
    return read_file(Path(cell["path"]).parent, Path(cell["path"]).name)


READERS: dict[str, Callable[[SourceSpec, int, int], list[Input]]] = {
    "shapes": shapes,
    "imagefolder": imagefolder,
    "webdataset": webdataset,
    "hf": hf,
    "jsonl": jsonl,
    "csv": csv,
}
