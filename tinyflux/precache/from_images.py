"""The recipe for a source of images: read captions, crop each image, compute all features."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tinyflux.precache import models
from tinyflux.precache.config import BuildConfig, Place
from tinyflux.precache.images import (
    COLOURS,
    Picture,
    Rejected,
    auto_shapes,
    content_hash,
    nearest,
    prepare,
    preview,
)
from tinyflux.precache.kinds.base import ImageSource, Input
from tinyflux.precache.ledger import Ledger
from tinyflux.precache.recipe import Listed
from tinyflux.precache.work import Ready, Task
from tinyflux.shards.format import encode_sample, sample_key
from tinyflux.util import rng
from tinyflux.util.buckets import BUCKETS, grid
from tinyflux.util.settings import require

if TYPE_CHECKING:
    from tinyflux.model.zoo import ModelZoo


MOVED = "changed shape: it was another one, or unreadable, when the shards were laid out"


class FromImages(Listed):
    """Builds all groups of every image."""

    def __init__(
        self,
        config: BuildConfig,
        source: ImageSource,
        ledger: Ledger,
        place: Place,
        *,
        zoo: "ModelZoo | None" = None,
        strict: bool = False,
    ):
        super().__init__(config, source, ledger, place, strict=strict)
        self.given_zoo, self.zoo = zoo, zoo
        self.groups, self.settings = config.groups, {}
        self.timesteps = grid(config.timesteps or len(BUCKETS))

    def asked(self, begun: dict) -> dict:
        self.settings = self.config.recorded | {
            "source": self.source.describe(),
            "shapes": list(self.config.shapes),
            "timesteps": len(self.timesteps),
            **models.device_and_threads(self.config, begun, self.place),
        }
        return {"settings": self.settings}

    def check(self, begun: dict) -> None:
        models.check_revisions(self.config, begun.get("producers", {}), self.ledger.out)
        super().check(begun)

    def load(self, begun: dict) -> dict[str, dict]:
        from tinyflux.precache.extract import load_for

        device = models.device_of(self.config, self.settings, self.place)
        self.zoo = self.given_zoo or self.new_zoo(device, begun.get("producers", {}))
        self.size = getattr(self.source, "size", None) or self.zoo.image_size
        if self.given_zoo is None:
            torch.set_num_threads(self.settings["threads"])
        load_for(self.zoo, self.groups)
        if self.config.compile:
            self.zoo.compile()
        return models.producers_of(self.zoo, self.groups, self.pictures, self.config)

    def new_zoo(self, device: str, begun: dict) -> "ModelZoo":
        """The models; `begun`: the fingerprints of a resumed build."""
        return models.zoo_of(self.config, device, begun)

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """(height, width)s in pixels that images are cropped to. Raises ValueError."""
        step = models.step_of(self.zoo)
        if self.config.shapes == ("square",):
            return [(self.size, self.size)]
        if self.config.shapes == ("auto",):
            return auto_shapes(self.size, max(step, self.size // 8 // step * step))
        found = [tuple(map(int, name.split("x")))[::-1] for name in self.config.shapes]
        for height, width in found:
            require(height % step == width % step == 0, "--shapes", f"{width}x{height}", f"in steps of {step} pixels")
        return found

    @property
    def several_shapes(self) -> bool:
        """Whether images are sorted by their shape."""
        return self.config.shapes == ("auto",) or len(self.config.shapes) > 1

    def cut_part(self, part: int, rows: list[tuple[int, Input]]) -> list[tuple[int, list[tuple[int, Input]]]]:
        if not self.several_shapes:
            return super().cut_part(part, rows)
        plan = self.ledger.plan(part)
        if plan is None:
            with ThreadPoolExecutor(models.workers_of(self.config, self.place), "headers") as pool:
                plan = {"shapes": list(pool.map(self.shape_of, (item for _, item in rows)))}
        chunks = []
        for shape in sorted(set(plan["shapes"])):
            own = [row for row, found in zip(rows, plan["shapes"], strict=True) if found == shape]
            chunks += [(shape, own[i : i + self.config.shard_size]) for i in range(0, len(own), self.config.shard_size)]
        if "shards" not in plan:
            self.ledger.note_plan(part, plan | {"shards": len(chunks)})
        return chunks

    def shape_of(self, item: Input) -> int:
        """The number of an image's shape, from its header; the squarest shape for an unreadable image."""
        try:
            size = self.source.read_size(item)
        except (Rejected, OSError):
            size = None
        return nearest(*(size or (1, 1)), self.shapes)

    @property
    def pictures(self) -> dict:
        """How images are cropped and resized, for the fingerprint."""
        shapes = [f"{width}x{height}" for height, width in self.shapes]
        return {
            "resolution": self.size,
            "shapes": shapes,
            "resize": "lanczos",
            "crop": self.source.crop,
            "colours": COLOURS,
            "seed": self.config.seed,
        }

    def same(self, index: int, item: Input) -> bool:
        for number in self.ledger.shards_of(index // self.listing.stride) or ():
            if (note := self.ledger.note_of(number)) is None:
                continue
            known = note["contents"].get(str(index))
            reasons = [entry["reason"] for entry in note["rejected"] if entry["index"] == index]
            if not known and not reasons:
                continue
            try:
                if known:
                    return self.content(item, self.seed_of(index)) == known
                self.try_input(item, self.seed_of(index))  # it was rejected; it is the same if it still is
            except Rejected as reason:
                return str(reason) in reasons
            except OSError:
                pass
            return False
        return False

    def content(self, item: Input, seed: int) -> str:
        """A hash of an input and its captions. Raises Rejected, OSError."""
        return content_hash(self.source.read_image(item), self.source.prompts(item, seed))

    def try_input(self, item: Input, seed: int) -> None:
        """Read an input without the models. Raises Rejected as `read`, OSError."""
        self.source.prompts(item, seed)
        self.cut(self.source.read_image(item), seed, (64, 64))

    @property
    def truncated(self) -> Mapping[str, int]:
        return self.zoo.truncated

    @property
    def seconds(self) -> Mapping[str, float]:
        return self.zoo.seconds

    def null(self) -> dict[str, Tensor]:
        from tinyflux.precache.extract import null_embeddings

        return null_embeddings(self.zoo, getattr(torch, self.config.dtype))

    def seed_of(self, index: int) -> int:
        """The seed of an input's random draws, signed 64-bit."""
        return rng.signed_key(self.config.seed, self.source.dataset_id, index)

    def task(self, index: int, item: Input, shape: int) -> Task:
        return Task(index, item.origin, partial(self.read, index, item, shape))

    def read(self, index: int, item: Input, shape: int = 0) -> Ready:
        """Read one input, in a thread: its captions by the source's rule, its image cropped. Raises Rejected."""
        seed = self.seed_of(index)
        prompts, image = self.source.prompts(item, seed), self.source.read_image(item)
        picture = self.cut(image, seed, self.shapes[shape])
        if self.several_shapes and nearest(*picture.size, self.shapes) != shape:
            raise Rejected(MOVED)
        return Ready(index, item.origin, seed, prompts, picture, content=content_hash(image, prompts))

    def cut(self, image, seed: int, shape: tuple[int, int]) -> Picture:
        """Crop an image to a shape, (height, width), by the source's rules. Raises Rejected."""
        source = self.source
        return prepare(
            image,
            shape,
            crop=source.crop,
            seed=seed,
            min_side=source.min_side,
            max_aspect=source.max_aspect,
            max_pixels=source.max_pixels,
        )

    def encode(self, group: list[list[Ready]]) -> list[Mapping]:
        return encode(self.zoo, group, self.groups, self.config, self.timesteps)

    def pack(self, ready: Ready, tensors: dict[str, Tensor]) -> dict:
        meta = self.meta(ready) | {"size": ready.picture.size, "crop": ready.picture.crop}
        picture = preview(ready.picture.pixels) if self.config.preview else None
        return encode_sample(sample_key(self.source.dataset_id, ready.index), tensors, meta, picture)

    def meta(self, ready: Ready) -> dict:
        """The content of a sample's .json, without the crop."""
        return {
            "prompts": list(ready.prompts),
            "source": self.source.name,
            "dataset_id": self.source.dataset_id,
            "index": ready.index,
            "origin": ready.origin,
        }


def encode(
    zoo: "ModelZoo",
    group: list[list[Ready]],
    groups: Iterable[str],
    config: BuildConfig,
    timesteps: tuple[float, ...],
    pixels: list[Tensor | None] | None = None,
) -> list[dict]:
    """The tensors of batches, on the CPU. Teachers see an image's first caption.

    pixels: of each batch; default: those of its pictures.
    A sample's text tensors have one row per caption: `t5_embeds` [N, L, D] and `clip_pooled` [N, D].
    """
    from tinyflux.precache.extract import extract_batches

    made = extract_batches(
        zoo,
        [as_batch(batch, seen) for batch, seen in zip(group, pixels or [None] * len(group), strict=True)],
        groups,
        teacher_input=config.teacher_input,
        timesteps=timesteps,
        dtype=getattr(torch, config.dtype),
    )
    if "text" in groups:
        _add_captions(zoo, group, made, config)
    return made


def _add_captions(zoo: "ModelZoo", group: list[list[Ready]], made: list[dict], config: BuildConfig) -> None:
    """Replace each sample's text tensors of the first caption by those of all its captions."""
    from tinyflux.precache.extract import Batch, extract_batches

    names = ("t5_embeds", "clip_pooled")
    more = [prompt for batch in group for ready in batch for prompt in ready.prompts[1:]]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    if more:
        size = config.batch_size
        chunks = [more[i : i + size] for i in range(0, len(more), size)]
        batches = [Batch(None, chunk, torch.zeros(len(chunk), dtype=torch.int64)) for chunk in chunks]
        for tensors in extract_batches(zoo, batches, ["text"], dtype=getattr(torch, config.dtype)):
            for name in names:
                found[name] += tensors[name]
    rest = {name: iter(values) for name, values in found.items()}
    for batch, tensors in zip(group, made, strict=True):
        for name in names:
            tensors[name] = [
                torch.stack([first, *(next(rest[name]) for _ in ready.prompts[1:])])
                for ready, first in zip(batch, tensors[name], strict=True)
            ]


def as_batch(batch: list[Ready], pixels: Tensor | None = None):
    """Read inputs as a batch for the models; `pixels` replace those of their pictures."""
    from tinyflux.precache.extract import Batch

    pictures = [ready.picture for ready in batch]
    if pixels is None and pictures[0] is not None:
        pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
    return Batch(pixels, [ready.prompts[0] for ready in batch], torch.tensor([ready.seed for ready in batch]))
