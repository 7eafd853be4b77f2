"""The schema: the one table of a sample's groups, their fields and shapes.

A group is one member of a sample in its tar, written by one producer. A new group is one line of SCHEMA. A manifest
lists the groups of its source with their real sizes; it may have groups that this table does not know.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LARGEST = 1 << 28  # bytes of one group of one sample, beyond which a manifest is not believed
ROUNDED = 2e-4  # how far timesteps, which are rounded, may be from even spacing
SPATIAL = ("h", "w")  # sizes that follow the latents: they differ from shard to shard
_FIELD_NAME = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True)
class GroupSchema:
    """A group as the package knows it.

    fields: the axes of each field; an integer is a fixed size, a name a variable one. on_grid: the first axis is the
    grid of timesteps. repeated: one member per caption. optional: a source may lack it. extra: no loss needs it, but a
    run reads it if it is there.
    """

    fields: dict[str, tuple[int | str, ...]]
    on_grid: bool = False
    repeated: bool = False
    optional: bool = False
    extra: bool = False


SCHEMA = {
    "latents": GroupSchema({"latents": ("channels", "h", "w")}),
    "text": GroupSchema({"t5_embeds": ("t5_length", "t5_width"), "clip_pooled": ("clip_width",)}, repeated=True),
    "lune": GroupSchema({"lune": ("timesteps", "lune_width")}, on_grid=True, optional=True),
    "sol": GroupSchema(
        {"sol_stats": ("timesteps", 3), "sol_spatial": ("timesteps", "sol_size", "sol_size")},
        on_grid=True,
        optional=True,
    ),
    "mask": GroupSchema({"mask": ("h", "w")}, optional=True, extra=True),
    # one feature grid per image, of any teacher: the producer says which
    "align": GroupSchema({"align": ("align_width", "align_rows", "align_columns")}, optional=True),
}
GROUP_OF = {name: group for group, entry in SCHEMA.items() for name in entry.fields}
"""The group of each field."""
EXTRAS = tuple(group for group, entry in SCHEMA.items() if entry.extra)


@dataclass(frozen=True)
class Field:
    """One tensor of every sample of a source: `dtype` of DTYPES, `shape` without the batch.

    "h" and "w" in a shape stand for the latent's height and width, which differ from shard to shard: see `at`.
    """

    dtype: str
    shape: tuple[int | str, ...]

    def at(self, shape: tuple[int, int]) -> "Field":
        """The field in a shard of this latent shape (h, w)."""
        sizes = dict(zip(SPATIAL, shape, strict=True))
        return Field(self.dtype, tuple(sizes.get(n, n) for n in self.shape))

    @cached_property
    def count(self) -> int:
        """Number of elements. The shape must be without "h" and "w"."""
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        return self.count * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Group:
    """A group of a source, as in its manifest. `timesteps`: the grid of its first axis, if it has one; `repeated`:
    one member per caption; `producer`: the fingerprint of what made it."""

    fields: dict[str, Field]
    timesteps: tuple[float, ...] | None = None
    repeated: bool = False
    producer: dict = field(default_factory=dict)

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the tensors of one member, in a shard of this latent shape (h, w)."""
        return sum(field.at(shape).nbytes for field in self.fields.values())


def flat(groups: dict[str, Group]) -> dict[str, Field]:
    """The fields of all groups by name; names are unique in a manifest."""
    return {name: entry for group in groups.values() for name, entry in group.fields.items()}


def fields_at(fields: dict[str, Field], shape: tuple[int, int]) -> dict[str, Field]:
    """The fields in a shard of this latent shape (h, w)."""
    return {name: entry.at(shape) for name, entry in fields.items()}


def fields_of(tensors: dict[str, Tensor]) -> dict[str, Field]:
    """The fields that describe one sample's tensors, with "h" and "w" as in the schema.

    The caption axis of a repeated group's tensors is dropped. Raises ValueError if a tensor has other axes than the
    schema.
    """
    fields = {}
    for name, tensor in tensors.items():
        axes, shape = _axes(name), tuple(tensor.shape)
        if SCHEMA[GROUP_OF[name]].repeated and len(shape) == len(axes) + 1:
            shape = shape[1:]
        fixed = [(axis, n) for axis, n in zip(axes, shape, strict=False) if isinstance(axis, int)]
        if len(shape) != len(axes) or any(axis != n for axis, n in fixed):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, the schema has the axes {list(axes)}")
        shape = tuple(axis if axis in SPATIAL else n for axis, n in zip(axes, shape, strict=True))
        fields[name] = Field(str(tensor.dtype).removeprefix("torch."), shape)
    return fields


def shape_of(tensors: dict[str, Tensor]) -> tuple[int, int] | None:
    """(h, w) of one sample's tensors, None if none depends on it. Raises ValueError if they differ."""
    found = {
        tuple(tensor.shape[_axes(name).index(axis)] for axis in SPATIAL)
        for name, tensor in tensors.items()
        if set(SPATIAL) <= set(_axes(name))
    }
    if len(found) > 1:
        raise ValueError(f"the sample's tensors have the latent shapes {sorted(found)}, must be one")
    return found.pop() if found else None


def grouped(
    fields: dict[str, Field],
    timesteps: tuple[float, ...],
    producers: dict[str, dict] | None = None,
) -> dict[str, Group]:
    """The manifest's groups of these fields. producers: the fingerprint of each group."""
    groups = {}
    for group, entry in SCHEMA.items():
        own = {name: fields[name] for name in entry.fields if name in fields}
        if own:
            grid = timesteps if entry.on_grid else None
            groups[group] = Group(own, grid, entry.repeated, (producers or {}).get(group, {}))
    return groups


def sizes(fields: dict[str, Field]) -> dict[str, int]:
    """The size of each named axis of the schema, such as "channels" or "t5_width", in these fields.

    Raises ValueError if two fields disagree.
    """
    found: dict[str, tuple[int, str]] = {}
    for name, entry in fields.items():
        for axis, n in zip(_axes(name) if name in GROUP_OF else (), entry.shape, strict=False):
            if isinstance(axis, int) or isinstance(n, str):
                continue
            if found.setdefault(axis, (n, name))[0] != n:
                raise ValueError(f"{axis} is {found[axis][0]} in {found[axis][1]} and {n} in {name}")
    return {axis: n for axis, (n, _) in found.items()}


def check_names(names: Iterable[str]) -> None:
    """Raises ValueError if a tensor's name is not in the schema, or its group is incomplete."""
    names = set(names)
    if unknown := sorted(names - set(GROUP_OF)):
        raise ValueError(f"unknown tensors {', '.join(unknown)}; the format has {', '.join(GROUP_OF)}")
    for group in {GROUP_OF[name] for name in names}:
        if missing := [name for name in SCHEMA[group].fields if name not in names]:
            raise ValueError(f"{', '.join(missing)} missing from group {group!r}")


def check_group(group: str, entry: Group) -> None:
    """Raises ValueError if a manifest's group is invalid or contradicts the schema."""
    where, known = f"groups.{group}", SCHEMA.get(group)
    if not _FIELD_NAME.fullmatch(group) or not entry.fields:
        raise ValueError(f"{where}: must have a plain name and at least one field")
    for name, f in entry.fields.items():
        if not _FIELD_NAME.fullmatch(name) or name == "origin":
            raise ValueError(f"{where}.fields.{name:.80}: is not a name for a field (letters, digits, '_')")
        if type(f.dtype) is not str or f.dtype not in DTYPES:
            raise ValueError(f"{where}.fields.{name}.dtype is {f.dtype!r:.80}, must be one of {', '.join(DTYPES)}")
        good = [n in SPATIAL if type(n) is str else type(n) is int and 1 <= n <= LARGEST for n in f.shape]
        if not f.shape or len(f.shape) > 8 or not all(good):
            raise ValueError(f"{where}.fields.{name}.shape is {list(f.shape)!r:.80}, must be positive integers")
        if entry.timesteps is not None and f.shape[0] != len(entry.timesteps):
            shape, K = list(f.shape), len(entry.timesteps)
            raise ValueError(f"{where}.fields.{name}.shape is {shape}, there are {K} timesteps")
    if (grid := entry.timesteps) is not None:
        numbers = all(type(t) is float and math.isfinite(t) for t in grid)
        if len(grid) < 2 or not numbers or list(grid) != sorted(set(grid)):
            raise ValueError(f"{where}.timesteps is {list(grid)!r:.200}, must be two or more rising numbers")
        step = (grid[-1] - grid[0]) / (len(grid) - 1)
        if any(abs(t - grid[0] - i * step) > ROUNDED for i, t in enumerate(grid)):
            raise ValueError(f"{where}.timesteps is {list(grid)!r:.200}, must be evenly spaced")
    if known is None:
        return
    if set(entry.fields) != set(known.fields):
        raise ValueError(f"{where}.fields has {', '.join(entry.fields)}, must have {', '.join(known.fields)}")
    if entry.repeated != known.repeated or (entry.timesteps is not None) != known.on_grid:
        raise ValueError(
            f"{where}: must {'' if known.repeated else 'not '}be repeated and must "
            f"{'' if known.on_grid else 'not '}have timesteps"
        )
    for name, axes in known.fields.items():
        shape = entry.fields[name].shape
        fits = len(shape) == len(axes) and all(
            n == axis if axis in SPATIAL or type(axis) is int else type(n) is int
            for n, axis in zip(shape, axes, strict=True)
        )
        if not fits:
            raise ValueError(f"{where}.fields.{name}.shape is {list(shape)}, must have the axes {list(axes)}")


def _axes(name: str) -> tuple[int | str, ...]:
    if name not in GROUP_OF:
        raise ValueError(f"unknown tensor {name}; the format has {', '.join(GROUP_OF)}")
    return SCHEMA[GROUP_OF[name]].fields[name]
