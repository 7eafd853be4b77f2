"""Build shards from a notebook, with the engine of `sharding.build`: from images and prompts, or a legacy cache."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from tinyflux.precache.build import build
from tinyflux.precache.config import BuildConfig, Place
from tinyflux.precache.from_images import FromImages
from tinyflux.precache.from_legacy import FromLegacy
from tinyflux.precache.images import Rejected, content_hash
from tinyflux.precache.kinds.base import ImageSource, Input, digest
from tinyflux.precache.kinds.legacy import LegacyFolder
from tinyflux.precache.ledger import Ledger
from tinyflux.shards.manifest import shard_name
from tinyflux.util.pixels import to_uint8

if TYPE_CHECKING:
    from tinyflux.model.zoo import ModelZoo

_loading = Lock()


@dataclass(frozen=True, kw_only=True)
class InMemory(ImageSource):
    """Images and prompts in memory, one sample each, in their order.

    images: PIL images, paths, arrays uint8 [H, W, 3] or tensors [3, H, W] (float in [-1, 1], or uint8).
    """

    images: Sequence
    texts: Sequence[str]
    min_side: int = 1
    max_aspect: float = 1e9
    allow_empty_captions: bool = True
    keeps_order = True

    def __post_init__(self):
        super().__post_init__()
        images, prompts = self.images, self.texts
        if len(images) != len(prompts) or not len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts: give one prompt per image")
        wrong = next((i for i, text in enumerate(prompts) if not isinstance(text, str)), None)
        if isinstance(prompts, str) or wrong is not None:
            kind = "one text" if wrong is None else f"{type(prompts[wrong]).__name__} at number {wrong}"
            raise ValueError(f"prompts must be a list of texts, not {kind}")

    def describe(self) -> dict:
        return {"kind": self.kind, "name": self.name, "dataset_id": self.dataset_id}

    def inputs(self, size: int, seed: int) -> Iterator[Input]:
        for i, (image, text) in enumerate(zip(self.images, self.texts, strict=True)):
            origin = os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"{self.name}/{i}"
            yield Input(origin, digest(text, *_stamp(image)), i, [text])

    def read_image(self, item: Input) -> bytes | Image.Image:
        try:
            return _readable(self.images[item.place])
        except (OSError, TypeError) as error:
            raise Rejected(str(error)) from error


def build_cache(folder: Path, zoo: "ModelZoo", images: Sequence, prompts: Sequence[str], config: BuildConfig) -> None:
    """Build the shards of images and prompts into a folder; shards that exist are kept.

    Raises ValueError if images and prompts do not match, an image cannot be read, or the folder has another build.
    """
    shard_name(config.source, 0)  # refuses a name that is not a plain file name
    source = InMemory(
        name=config.source,
        kind="memory",
        base=Path(),
        dataset_id=config.dataset_id,
        images=images,
        texts=prompts,
    )
    ledger = Ledger(Path(folder), source.name, source.dataset_id)
    build(FromImages(config, source, ledger, Place(), zoo=zoo, strict=True), quiet=True)


def convert(cache_folder: Path, folder: Path, name: str, dataset_id: int) -> None:
    """Write a legacy cache as a source. Raises ValueError with the sample that has NaN or infinity."""
    source = LegacyFolder(
        name=name, kind="cache", base=Path(), dataset_id=dataset_id, location=str(Path(cache_folder).resolve())
    )
    ledger = Ledger(Path(folder), name, dataset_id)
    build(FromLegacy(BuildConfig(source=name), source, ledger, Place(), strict=True), quiet=True)


def _stamp(image) -> list:
    """What tells an image from others: a file's size and time, else a hash of the pixels."""
    if isinstance(image, (str, os.PathLike)):
        status = os.stat(image) if os.path.isfile(image) else None
        return [os.fspath(image), status and [status.st_size, status.st_mtime_ns]]
    try:
        return [*_describe(image), content_hash(_readable(image), ())]
    except (OSError, TypeError):  # reading it for the build says what is wrong
        return _describe(image)


def _describe(image) -> list:
    if isinstance(image, Image.Image):
        return [*image.size, image.mode]
    return [str(getattr(image, "dtype", type(image).__name__)), *getattr(image, "shape", ())]


def _readable(image) -> bytes | Image.Image:
    """An image of any accepted kind, for `prepare`. Raises TypeError, OSError."""
    if isinstance(image, (str, os.PathLike)):
        return Path(image).read_bytes()
    if isinstance(image, Image.Image):
        with _loading:  # several samples may share an object, and Pillow must load it in one thread
            image.load()
        return image
    if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3:
        if image.is_floating_point():
            if not image.isfinite().all():  # converting it to uint8 would give a black picture
                raise TypeError("the tensor has NaN or infinity")
            if image.abs().max() > 2:  # not just beyond the ends, as a VAE's output is
                raise TypeError(f"the tensor has values up to {image.abs().max():g}, must be in [-1, 1]")
            image = to_uint8(image)
        image = image.permute(1, 2, 0).contiguous().cpu().numpy()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(image)
    kind = f"{type(image).__name__} {' '.join(map(str, _describe(image)))}"
    raise TypeError(f"{kind} is not a PIL image, path, uint8 array [H, W, 3] or tensor [3, H, W], uint8 or in [-1, 1]")
