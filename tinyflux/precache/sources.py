"""sources.toml: the images and captions of each source.

One table per source; its name is the source's name and the prefix of its shards:

    [portraits]
    kind = "imagefolder"
    location = "~/photos/portraits"
    dataset_id = 3

`sharding/sources.toml` documents every key.
"""

import re
from pathlib import Path

from tinyflux.precache.kinds import KINDS, kind_of
from tinyflux.precache.kinds.base import Source, SourceError
from tinyflux.util import cli
from tinyflux.util.settings import did_you_mean, read_toml

PACKAGED = Path(__file__).parents[2] / "sharding" / "sources.toml"


def load_sources(file: str | Path | None = None) -> dict[str, Source]:
    """All sources of a sources.toml by name.

    `file` None reads ./sources.toml if it exists, else the packaged file. Raises FileNotFoundError, and SourceError
    with the bad table and key.
    """
    if file is None:
        file = Path("sources.toml") if Path("sources.toml").is_file() else PACKAGED
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such sources file")
    try:
        tables = read_toml(file)
    except ValueError as error:
        raise SourceError(str(error)) from error
    sources = {name: _source(file, name, table) for name, table in tables.items()}
    owner: dict[int, str] = {}
    for name, source in sources.items():
        if (other := owner.setdefault(source.dataset_id, name)) != name:
            raise SourceError(
                f"{file}: [{name}] dataset_id: {source.dataset_id} is taken by [{other}]; "
                "sample keys start with it, so it must be unique"
            )
    return sources


def _source(file: Path, name: str, table: object) -> Source:
    where = f"{file}: [{name}]"
    if not isinstance(table, dict):
        raise SourceError(f"{file}: {name!r} is outside a table; a source is a [table] with kind and dataset_id")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
        raise SourceError(f"{where}: a source's name is made of letters, digits, - and _")
    if (kind := table.get("kind")) not in KINDS:
        raise SourceError(f"{where} kind is {kind!r}: it must be one of {', '.join(KINDS)}")
    cls = kind_of(kind)
    for key in table:
        if key not in cls.keys():
            raise SourceError(f"{where}: unknown key {key!r} of kind {kind!r}: {did_you_mean(key, cls.keys())}")
    if missing := [key for key in cls.required() if key not in table]:
        raise SourceError(f"{where}: {missing[0]} is missing")
    if isinstance(table.get("caption"), str):
        table = table | {"caption": [table["caption"]]}
    try:
        return cls(name=name, base=file.resolve().parent, **table)
    except ValueError as error:
        raise SourceError(f"{where} {error}") from error


def find_source(name: str, file: str | Path | None = None, kind: str | None = None, dataset_id: int = 0) -> Source:
    """The source of that name; with a `kind`, the name may also be a location. Raises SourceError."""
    sources = load_sources(file)
    if name in sources:
        if kind not in (None, sources[name].kind):
            raise SourceError(f"[{name}] is of kind {sources[name].kind!r}, not {kind!r}: leave out --kind")
        return sources[name]
    if kind is None:
        known = ", ".join(sorted(sources)) or "none"
        raise SourceError(f"unknown source {name!r}; known: {known}. Add a [{name}] table to a sources.toml")
    unlisted = [each for each in KINDS if kind_of(each).required() == ["dataset_id", "location"]]
    if kind not in unlisted:
        raise SourceError(
            f"--kind {kind}: such a source must be described in a sources.toml; known here: {', '.join(unlisted)}"
        )
    table = {"kind": kind, "location": name, "dataset_id": dataset_id}
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name).expanduser().resolve().stem).strip("-") or "source"
    return _source(Path("--source"), stem, table)


def table(sources: dict[str, Source]) -> str:
    """The sources as aligned columns, for `--list`."""
    rows = [("source", "kind", "dataset_id", "weight", "crop", "location")]
    for name, source in sources.items():
        rows.append(
            (name, source.kind, source.dataset_id, f"{source.weight:g}", getattr(source, "crop", ""), source.where)
        )
    return cli.table(rows)
