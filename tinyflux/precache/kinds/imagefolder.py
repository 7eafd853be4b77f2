"""Kind "imagefolder": all images of a folder and its subfolders, with captions beside them or in lists."""

import json
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice, takewhile
from pathlib import Path
from typing import ClassVar

from tinyflux.precache.images import EXTENSIONS, PICTURES, Rejected
from tinyflux.precache.inputs import HEAD, lines_of, printable, read_file, records, table_rows
from tinyflux.precache.kinds.base import ImageSource, Input, SourceError, Text, captions_in, digest, texts

BESIDE = ("txt", "caption", "tags", "json")  # the first existing file is used
LISTS = ("metadata.jsonl", "metadata.csv", "prompts.txt")


@dataclass(frozen=True, kw_only=True)
class ImageFolder(ImageSource):
    """All images of a folder and its subfolders.

    The captions of a/b.png are in a metadata.jsonl, metadata.csv or prompts.txt of a folder above it, else in a/b.txt,
    .caption, .tags or .json, or a/b.png.txt and so on; extensions may be in upper case.
    """

    extensions: ClassVar[frozenset[str]] = EXTENSIONS
    """Extensions of files that are read."""
    known: ClassVar[frozenset[str]] = PICTURES
    """Extensions of files that are listed; those that are not read are rejected if they have captions."""
    location: Text
    caption: list[str] | None = None
    """Fields of the captions in metadata.jsonl, metadata.csv and .json; None means "text", "caption" or "prompt"."""

    @cached_property
    def ignored(self) -> Counter[str]:
        """Number of skipped files by extension, filled by the listing."""
        return Counter()

    def records(self, size: int, seed: int) -> Iterator[list]:
        """[stem, what, name, ...] of each image, caption file and line of a list."""
        self.ignored.clear()
        folders = [""]
        while folders:
            below = folders.pop()
            yield from self._records_of(self.folder(), below, folders)

    def _records_of(self, root: Path, below: str, folders: list[str]) -> Iterator[list]:
        lists, pictures = [], 0
        with os.scandir(root / below) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{below}{entry.name}/")
                    continue
                if entry.is_symlink() and os.path.isdir(entry.path):
                    raise SourceError(
                        f"{entry.path}: is a link to a folder, which is not followed; copy or mount the folder instead"
                    )
                name, extension = below + entry.name, entry.name.rpartition(".")[2].lower()
                if entry.name in LISTS:
                    lists.append(entry.name)
                elif extension in self.known:
                    pictures += extension in self.extensions
                    yield [self.stem_of(printable(name)), "image", name, _stamp(entry)]
                elif extension in BESIDE:
                    yield [self.stem_of(printable(name)), "beside", name, _stamp(entry)]
                else:
                    self.ignored[f".{extension}" if "." in entry.name else "without one"] += 1
        if len(lists) > 1:
            raise SourceError(
                f"[{self.name}] {root / below}: has {' and '.join(sorted(lists))}; captions must be in one of them"
            )
        for name in lists:
            for image, values in self._listed(root / below, name, pictures):
                path = os.path.normpath(below + image)
                yield [self.stem_of(printable(path)), "listed", path, values]

    def _listed(self, folder: Path, name: str, pictures: int) -> Iterator[tuple[str, list]]:
        """(image, captions) for each line of a list. Raises SourceError."""
        path = folder / name
        if name == "prompts.txt":
            yield from self._prompts(path, pictures)
            return
        rows = (record for _, record in records(path, "file_name")) if name == "metadata.jsonl" else table_rows(path)
        found, first = False, None
        for row in rows:
            first = first or row
            if not row.get("file_name"):
                raise SourceError(f"{path}: each row must have a file_name; one has {', '.join(map(str, row))}")
            values = captions_in(row, self.caption)
            found = found or values is not None
            yield row["file_name"], values or []
        if first is not None and not found:
            wanted = " or ".join(map(repr, self.caption or ("text", "caption", "prompt")))
            raise SourceError(f"{path}: no record has the field {wanted}; the first has {', '.join(map(str, first))}")

    def _prompts(self, path: Path, pictures: int) -> Iterator[tuple[str, list]]:
        """(image, captions) of a prompts.txt: `a.png<TAB>a caption` or `a.png: a caption`, or one line per image."""
        lines = list(lines_of(path))
        named = [self._named(line) for _, line in lines]
        if all(named):
            for name, text in named:
                yield name.strip(), [text]
            return
        if len(lines) != pictures:
            number = lines[named.index(None)][0]
            raise SourceError(
                f"{path}, line {number}: must be an image's path, a tab or a colon, and its caption; or the file must "
                "have one line for each image of its folder, in the order of their names: "
                f"it has {len(lines)} for {pictures}"
            )
        files = (entry.name for entry in os.scandir(path.parent) if not entry.is_dir())
        images = (e for e in files if e.rpartition(".")[2].lower() in self.extensions and e[0] != ".")
        for name, (_, line) in zip(sorted(images, key=os.fsencode), lines, strict=True):
            yield name, [line]

    def _named(self, line: str) -> tuple[str, str] | None:
        name, separator, text = line.partition("\t" if "\t" in line else ":")
        return (name, text) if separator and name.strip().rpartition(".")[2].lower() in self.known else None

    def stem_of(self, name: str) -> str:
        """A name without extensions, which an image and its caption file have in common."""
        stem, dot, extension = name.rpartition(".")
        if dot and extension.lower() in BESIDE:
            name = stem
        while (parts := name.rpartition("."))[2].lower() in self.known and parts[0]:
            name = parts[0]
        return name

    def stem(self, item: Input) -> str:
        return self.stem_of(item.origin)

    def join(self, stem: str, rows: Iterable[list]) -> Iterator[Input]:
        images, beside, listed = {}, {}, {}
        for _, what, name, value in rows:
            if what == "listed":
                listed.setdefault(name, []).extend(value)
            else:
                (images if what == "image" else beside)[name] = value
        if not images and not listed:
            self.ignored.update(f".{name.rpartition('.')[2].lower()} without an image" for name in beside)
        readable = any(name.rpartition(".")[2].lower() in self.extensions for name in images)
        for name in sorted(images.keys() | listed.keys()):
            captions = listed.get(name)
            file = None if captions is not None else _beside(name, beside)
            if readable and name.rpartition(".")[2].lower() not in self.extensions and captions is None:
                self.ignored[f".{name.rpartition('.')[2].lower()}"] += 1  # a raw file beside its picture
            elif images.get(name) and name.rpartition(".")[2].lower() in self.extensions or captions or file:
                stamp = f"{images.get(name)} {beside.get(file) if file else digest(captions)}"
                yield Input(printable(name), stamp, [name, file], captions)
            else:
                self.ignored[f".{name.rpartition('.')[2].lower()}"] += 1

    def read_image(self, item: Input) -> bytes:
        return read_file(self.path, item.place[0])

    def read_head(self, item: Input) -> bytes:
        return read_file(self.path, item.place[0], HEAD)

    def read_texts(self, item: Input) -> list[str]:
        name, file = item.place
        if item.captions is not None:
            return texts(item.captions, "the list")
        if file is None:
            return []
        data = read_file(self.path, file)
        if file.lower().endswith(".json"):
            try:
                record = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise Rejected(f"caption's .json is damaged: {error}") from error
            return texts(captions_in(record if isinstance(record, dict) else {}, self.caption), printable(file))
        text = data.decode("utf-8-sig")
        return text.splitlines() if self.captions else [text]

    @cached_property
    def _names_in(self) -> Callable[[str], list[str]]:
        """The sorted names in a subfolder; kept, because a folder may have many images without a caption."""
        return lru_cache(maxsize=4)(lambda folder: sorted(os.listdir(self.path / folder)))

    def sought(self, item: Input) -> str:
        name = item.place[0]
        if item.captions is not None:
            return "the list has none for it"
        folder, _, file = name.rpartition("/")
        stem = file.rpartition(".")[0]
        try:
            every = self._names_in(folder)
        except OSError:
            every = []
        alike = takewhile(lambda each: each.startswith(stem), islice(every, bisect_left(every, stem), None))
        names = list(islice((each for each in alike if each != file), 3))
        some = ", ".join(map(printable, names))
        there = f"beside it: {some}" if names else "nothing of its name beside it"
        return f"no {printable(stem)}.txt, .caption, .tags or .json and no list has it; {there}"


def _stamp(entry: os.DirEntry) -> str:
    try:
        status = entry.stat()  # follows a link
    except OSError:
        return "gone"
    return f"{status.st_size} {status.st_mtime_ns}"


def _beside(name: str, files: dict[str, str]) -> str | None:
    """The caption file of an image among files of its stem."""
    stems = (name, name.rpartition(".")[0])
    for extension in BESIDE:
        for file in sorted(files):
            if file.rpartition(".")[0] in stems and file.rpartition(".")[2].lower() == extension:
                return file
    return None
