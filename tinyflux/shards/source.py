"""Open a source by its path or URL: its manifest, its overlays, its empty prompt."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor

from tinyflux.shards.cache import NodeCache
from tinyflux.shards.clients import repo_of
from tinyflux.shards.discover import adopt
from tinyflux.shards.index import FILE as INDEX
from tinyflux.shards.manifest import Manifest, ManifestError, parse
from tinyflux.shards.schema import SCHEMA, Group, flat
from tinyflux.shards.shardfile import ShardFile
from tinyflux.shards.store import Store, open_store
from tinyflux.shards.writer import Shard
from tinyflux.util import files
from tinyflux.util.urls import redacted

MOST_LAYERS = 8  # of overlays on overlays


@dataclass(frozen=True)
class Layer:
    """A base or an overlay of a source, and the `groups` to read from it."""

    url: str
    store: Store
    manifest: Manifest
    groups: dict[str, Group]

    def reading(self, wanted: Iterable[str]) -> "Layer":
        """The same layer with only these groups."""
        return replace(self, groups={name: group for name, group in self.groups.items() if name in wanted})

    def without(self, groups: Iterable[str]) -> "Layer":
        """The same layer without these groups."""
        return self.reading(self.groups.keys() - set(groups))


class Source:
    """A source of a run: a base and its overlays; the last layer is the one at `url`.

    null: the empty prompt's `t5_embeds` [L, D] and `clip_pooled` [D]. dataset_id: may differ from the manifest's.
    revision: the version of the content: a Hub commit, or the SHA-256 of the manifest at `url`. layers: with the groups
    to read; all_layers: with all existing groups.
    """

    def __init__(
        self,
        url: str,
        layers: Sequence[Layer],
        null: dict[str, Tensor],
        dataset_id: int,
        revision: str,
        all_layers: Sequence[Layer] = (),
    ):
        self.url, self.layers, self.all_layers, self.null = url, layers, all_layers or layers, null
        self.dataset_id, self.revision = dataset_id, revision
        self.manifest = layers[0].manifest
        """The base's manifest, which defines shards, shapes and rows."""
        found = {name: group for layer in layers for name, group in layer.groups.items()}
        self.groups = {name: found[name] for name in sorted(found, key=_place_in_schema)}
        """The groups to read, from all layers."""
        self.fields = flat(self.groups)
        self._texts = next((layer.manifest for layer in layers if "text" in layer.groups), self.manifest)

    @property
    def name(self) -> str:
        return self.manifest.source

    @property
    def store(self) -> Store:
        """The store of the last layer."""
        return self.layers[-1].store

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The latent shapes (h, w) of its shards."""
        return self.manifest.shapes

    @property
    def captions(self) -> np.ndarray:
        """Number of captions of each sample, uint8 [samples]."""
        return self._texts.index.captions

    @property
    def grids(self) -> dict[str, tuple[float, ...]]:
        """The timestep grid of each group that has one."""
        return {name: group.timesteps for name, group in self.groups.items() if group.timesteps}

    def files(self, shard: int) -> list[tuple[Layer, Shard]]:
        """The files needed to open a shard: one of each layer."""
        return [(layer, layer.manifest.shards[shard]) for layer in self.layers]

    def open(self, shard: int) -> ShardFile:
        """Open a shard by its index. Raises FileNotFoundError, ShardError."""
        file = None
        for layer, entry in self.files(shard):
            file = open_file(layer, entry, file)
        return file


def _place_in_schema(group: str) -> tuple[int, str]:
    known = list(SCHEMA)
    return known.index(group) if group in known else len(known), group


def open_file(layer: Layer, entry: Shard, base: ShardFile | None) -> ShardFile:
    """Open a layer's file of a shard on top of the lower layer's. Raises FileNotFoundError, ShardError."""
    for tries_left in (2, 1, 0):
        try:
            path = layer.store.fetch(entry.path, entry.bytes, entry.sha256)
            return ShardFile(path, entry, layer.groups, base)
        except FileNotFoundError:  # the cache was emptied between the two calls
            if not tries_left or layer.store.cache is None:
                raise


def open_source(
    url: str | Path,
    dataset_id: int | None = None,
    cache: NodeCache | None = None,
    revision: str | None = None,
    groups: Iterable[str] | None = None,
) -> Source:
    """Open a source, and its base if it is an overlay. Reads and checks only manifest, index and null embeddings.

    A local folder of shards without a manifest is read completely once (see `adopt`). dataset_id overrides the
    manifest's. cache: for remote shards. revision: of an earlier `Source`, to get the same content. groups: the groups
    to read besides "latents" and "text"; default all. Raises ValueError (ManifestError for the manifest),
    FileNotFoundError, and DownloadError for remote sources.
    """
    layers = open_layers(os.fspath(url), dataset_id, cache, revision)
    store, manifest = layers[-1].store, layers[-1].manifest
    pinned = store.revision or manifest.sha256
    read = layers = _used(layers)
    if groups is not None:
        wanted = {*groups, *(name for name, entry in SCHEMA.items() if not entry.optional)}
        read = _used(layer.reading(wanted) for layer in layers)
    null = check_null(next(layer for layer in read if "text" in layer.groups))
    dataset_id = layers[0].manifest.dataset_id if dataset_id is None else dataset_id
    return Source(redacted(os.fspath(url)), read, null, dataset_id, pinned, layers)


def _used(layers: Iterable[Layer]) -> list[Layer]:
    """The base, and the overlays from which a group is read."""
    return [layer for i, layer in enumerate(layers) if layer.groups or i == 0]


def open_layers(
    url: str,
    dataset_id: int | None = None,
    cache: NodeCache | None = None,
    revision: str | None = None,
    above: tuple[str, ...] = (),
) -> list[Layer]:
    """A base and its overlays, the one at `url` last, each with the groups that no overlay above it has.

    Arguments and errors are those of `open_source`; above: the overlays that led to `url`.
    """
    if url in above or len(above) >= MOST_LAYERS:
        what = "have no base" if url in above else f"are more than {MOST_LAYERS} on each other"
        raise ValueError(redacted(f"source {above[0]}: its overlays {what}: {' -> '.join([*above, url])}"))
    try:
        store, manifest = _open(url, dataset_id, cache, revision)
    except (ValueError, FileNotFoundError) as error:
        if not above:
            raise
        where = "base.location in its manifest.json gives the path of the base"
        raise type(error)(f"base of the overlay {redacted(above[-1])}: {error} ({where})") from error
    shown = redacted(url)
    top = Layer(shown, store, manifest, manifest.groups)
    if manifest.base is None:
        return [top]
    below = base_url(url, manifest.base.location)
    repo, pin = repo_of(below), manifest.base.sha256
    if repo is not None:
        pin = store.revision if repo == repo_of(url) else None
    layers = open_layers(below, dataset_id, cache, pin if "://" in below else None, (*above, url))
    found = layers[-1].manifest.sha256
    if found != manifest.base.sha256:
        raise ValueError(
            f"overlay {shown}: its base {redacted(below)} has changed since the overlay was made (its manifest's "
            f"sha256 is {found}, was {manifest.base.sha256}): build the overlay again"
        )
    check_overlay(layers[0].manifest, manifest, shown)
    return [*(layer.without(manifest.groups) for layer in layers), top]


def _open(url: str, dataset_id: int | None, cache: NodeCache | None, revision: str | None) -> tuple[Store, Manifest]:
    """The store and the manifest of one folder."""
    store = open_store(url, cache, revision)
    where = f"{store.url}/manifest.json"
    if store.cache is not None:
        entry = parse(store.manifest, where)["index"]
        return store, Manifest.from_parts(store.manifest, store.fetch(INDEX, entry["bytes"], entry["sha256"]), where)
    folder = store.path("")
    manifest = adopt(folder, dataset_id) if store.manifest is None else Manifest.load(folder)
    if revision not in (None, manifest.sha256):
        raise ValueError(f"source {url}: its manifest is not that of revision {revision}: it was rebuilt")
    return store, manifest


def base_url(url: str, location: str) -> str:
    """The URL of the base of the overlay at `url`. Raises ValueError if a remote overlay names a path elsewhere."""
    if "://" in location:
        return location
    if "://" not in url or url.startswith("file://"):
        folder = url.removeprefix("file://")  # it may be a symbolic link, and its base beside the link or its target
        places = [os.path.normpath(os.path.join(at, location)) for at in (folder, os.path.realpath(folder))]
        return next(filter(os.path.isdir, places), places[0])
    url, question, query = url.partition("?")  # keep a signature
    scheme, _, path = url.partition("://")
    parts, keep = path.rstrip("/").split("/"), (repo_of(url) or "://").count("/") - 1  # keep the repo, host or bucket
    for part in location.split("/"):
        if part == ".." and len(parts) > keep:
            parts.pop()
        elif part in ("..", "") or part.startswith("@"):
            where = redacted(url)
            raise ValueError(f"overlay {where}: its base {location!r} is not a path inside the same {scheme} store")
        elif part != ".":
            parts.append(part)
    return f"{scheme}://{'/'.join(parts)}{question}{query}"


def check_overlay(base: Manifest, overlay: Manifest, url: str) -> None:
    """Raises ManifestError if an overlay's shards do not match those of its base."""
    for what, a, b in (
        ("source", base.source, overlay.source),
        ("dataset id", base.dataset_id, overlay.dataset_id),
        ("number of shards", len(base.shards), len(overlay.shards)),
    ):
        if a != b:
            raise ManifestError(f"overlay {url}: its {what} is {b}, its base's {a}")
    for what in ("number", "samples"):
        differ = base.index.arrays[what] != overlay.index.arrays[what]
        if differ.any():
            k = int(differ.argmax())
            raise ManifestError(f"overlay {url}: {what} of {overlay.shards.name(k)} is not that of its base")
    shapes = [np.array(m.shapes)[m.index.shape] for m in (base, overlay)]
    if not np.array_equal(*shapes):
        raise ManifestError(f"overlay {url}: its shards have other latent shapes than its base's")
    if base.index.names != overlay.index.names:
        raise ManifestError(f"overlay {url}: its shards are not named as its base's")


def check_null(layer: Layer) -> dict[str, Tensor]:
    """The embeddings of the empty prompt for a layer's texts. Raises ValueError, FileNotFoundError."""
    manifest = layer.manifest
    path = layer.store.fetch("null.safetensors", None, manifest.null_sha256)
    if files.sha256(path) != manifest.null_sha256:
        raise ValueError(f"{path}: its sha256 is not the manifest's: it is damaged or from another source")
    try:
        null = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not readable: {error}") from error
    for name, field in manifest.groups["text"].fields.items():
        if name not in null or tuple(null[name].shape) != field.shape:
            has = tuple(null[name].shape) if name in null else "missing"
            raise ValueError(f"{path}: {name} is {has}, the manifest's samples have {field.shape}")
        if not null[name].isfinite().all():
            raise ValueError(f"{path}: {name} has NaN or infinity")
    return null
