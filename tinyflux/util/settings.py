"""Settings: dataclasses whose fields have an accepted range, read from TOML and overridden on the command line.

threads: Annotated[int, AtLeast(1)] = 2
val_fraction: Annotated[float, Within(0, 1, open_high=True)] = 0.0

def __post_init__(self):
    check(self, "data.")
"""

import argparse
import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")


@dataclass(frozen=True)
class Within:
    """A range of numbers, for Annotated; in a list or tuple it applies to each element."""

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value is in the range. NaN never is."""
        above = self.low < value or (value == self.low and not self.open_low)
        below = value < self.high or (value == self.high and not self.open_high)
        return above and below

    def __str__(self) -> str:
        if self.high == float("inf"):
            return f"{'more than' if self.open_low else 'at least'} {self.low:g}"
        if self.low == float("-inf"):
            return f"{'less than' if self.open_high else 'at most'} {self.high:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


def AtLeast(low: float) -> Within:
    """Numbers from `low`, infinity excluded."""
    return Within(low, open_high=True)


def Above(low: float) -> Within:
    """Numbers greater than `low`, infinity excluded."""
    return Within(low, open_low=True, open_high=True)


@dataclass(frozen=True)
class Match:
    """A regular expression that a whole text must match, and its description in words."""

    pattern: str
    words: str

    def holds(self, value: str) -> bool:
        """Whether the text matches."""
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.words


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raises ValueError, with the standard message about a setting, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} is {value!r}: it must be {rule}")


def check(config: Any, prefix: str = "") -> None:
    """Raises ValueError, with the key and the accepted values, if a field has the wrong type or is out of range.

    prefix: prefix of a field's name in messages: "data." for data.threads, "--" for an option such as --batch-size.
    """
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        full = prefix + (name.replace("_", "-") if prefix == "--" else name)
        _check(full, getattr(config, name), hint)


def _check(name: str, value: object, hint: Any) -> None:
    rules: list[Within | Match] = []
    if typing.get_origin(hint) is typing.Annotated:
        hint, *extra = typing.get_args(hint)
        rules = [rule for rule in extra if isinstance(rule, Within | Match)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
        if typing.get_origin(hint) is typing.Annotated:
            _check(name, value, hint)
            return
    if typing.get_origin(hint) is Literal:
        accepted = typing.get_args(hint)
        require(value in accepted, name, value, f"one of {', '.join(map(str, accepted))}")
        return
    many = typing.get_origin(hint) in (list, tuple)
    values = list(value) if many and isinstance(value, list | tuple) else [value]
    kind = typing.get_args(hint)[0] if many and typing.get_args(hint) else hint
    for each in values:
        require(_is(each, kind), name, value, f"{'a list of ' * many}{_WORDS.get(kind, 'of another type')}{_of(rules)}")
        for rule in rules:
            require(rule.holds(each), name, value, f"{rule}")


_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


def _of(rules: list) -> str:
    return f" {', '.join(map(str, rules))}" if rules else ""


def _is(value: object, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in _WORDS else True


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known word, and all known words."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, 1)
    return f"{f'did you mean {near[0]}? ' if near else ''}Accepted here: {', '.join(known)}"


def read_toml(path: Path) -> dict:
    """A TOML file. Raises FileNotFoundError, and ValueError with the path."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # TOMLDecodeError, or bytes that are not UTF-8
        raise ValueError(f"{path}: not a TOML file: {error}") from error


def arguments(table: dict, config: type, prefix: str = "") -> list[str]:
    """A TOML table as command-line arguments of a dataclass. Raises ValueError for unknown keys and wrong types."""
    hints = typing.get_type_hints(config, include_extras=True)
    found: list[str] = []
    for key, value in table.items():
        if key not in hints:
            raise ValueError(f"unknown key {prefix}{key}: {did_you_mean(key, hints)}")
        name = f"{prefix}{key}".replace("_", "-")
        if dataclasses.is_dataclass(hints[key]):
            require(isinstance(value, dict), f"{prefix}{key}", value, f"a table, [{prefix}{key}]")
            found += arguments(value, hints[key], f"{prefix}{key}.")
            continue
        _check(f"{prefix}{key}", value, hints[key])
        if isinstance(value, bool):
            head, _, last = name.rpartition(".")
            found.append(f"--{name}" if value else f"--{head}.no-{last}" if head else f"--no-{last}")
        else:
            found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


def load(
    config: type[Config],
    argv: list[str],
    *,
    presets: Path,
    description: str | None = None,
    prog: str | None = None,
    ignored: tuple[str, ...] = (),
) -> tuple[Config, set[str]]:
    """A config from `[--config FILE.toml|PRESET] [--group.key value ...]`, and the names of the given keys.

    The file's values are inserted before the command line's arguments; a preset is a file in the folder `presets`;
    ignored: tables of the file that this command does not use. Exits with 2 and a message for a wrong option; raises
    ValueError for a wrong key or value in the file, FileNotFoundError if there is no such file.
    """
    import tyro

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(argv)
    found: list[str] = []
    if known.config:
        path, preset = Path(known.config), presets / f"{known.config}.toml"
        if not path.is_file() and not preset.is_file():
            names = sorted(p.stem for p in presets.glob("*.toml"))
            raise FileNotFoundError(
                f"--config {known.config}: no such file or preset: {did_you_mean(known.config, names)}"
            )
        path = path if path.is_file() else preset
        try:
            tables = {key: value for key, value in read_toml(path).items() if key not in ignored}
            found = arguments(tables, config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
    found += rest
    given = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in found if word.startswith("--")}
    return tyro.cli(config, args=found, description=description, prog=prog), given
