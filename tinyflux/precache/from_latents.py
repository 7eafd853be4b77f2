"""The recipe for a source of latents: keep them, encode the captions, and decode them with the VAE for the teachers."""

from collections.abc import Mapping
from itertools import islice

import torch
from torch import Tensor

from tinyflux.precache import models
from tinyflux.precache.from_images import MOVED, FromImages, encode
from tinyflux.precache.images import COLOURS, Rejected, content_hash, preview
from tinyflux.precache.kinds.base import Input, SourceError
from tinyflux.precache.work import Ready
from tinyflux.shards.format import encode_sample, sample_key
from tinyflux.util.pixels import to_uint8

PROBED = 32
SPREAD = 0.5, 1.7
"""Range of scaled latents' standard deviation; a wrong `scaling` gives 2.8 (raw as scaled) or 0.36 (scaled as raw)."""


class FromLatents(FromImages):
    """Builds a source of kind "latents"."""

    several_shapes = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._previews: dict[int, Tensor] = {}  # of samples that are encoded but not packed yet

    def asked(self, begun: dict) -> dict:
        if self.config.shapes != ("square",):
            raise ValueError("--shapes does not apply to latents: they keep their shapes")
        return super().asked(begun)

    @property
    def teaches(self) -> bool:
        """Whether a teacher needs the pictures."""
        from tinyflux.precache.extract import EXTRACTORS

        return any(EXTRACTORS[name].of_image for name in self.groups if name != "latents")

    def load(self, begun: dict) -> dict[str, dict]:
        producers = super().load(begun)
        producers["latents"]["latent"] = f"as given, {self.source.scaling}"
        self.check_scale()
        return producers

    def new_zoo(self, device: str, begun: dict):
        return models.zoo_of(self.config, device, begun, decodes=self.teaches)

    @property
    def pictures(self) -> dict:
        given = {"resolution": None, "shapes": None, "resize": None, "crop": "latents as they were given"}
        return given | {"colours": COLOURS, "seed": self.config.seed}

    def check_scale(self) -> None:
        """Raises SourceError if the first latents contradict the source's `scaling`."""
        found = []
        for item in islice(self.some_inputs(), PROBED):
            try:
                found.append(self.scaled(self.source.read_latents(item)).flatten())
            except Rejected:
                continue
        std = torch.cat(found).std().item() if found else 1.0
        if not SPREAD[0] <= std <= SPREAD[1]:
            raise SourceError(
                f"[{self.source.name}] scaling: {self.source.scaling!r} cannot be right: with it the first {len(found)}"
                f" latents have a standard deviation of {std:.2f}, but about 1 is expected"
            )

    def some_inputs(self):
        """Some inputs, in any order."""
        source = self.source
        if (parts := source.parts()) is not None:
            return (item for name, _ in parts for item in source.inputs_of(name))
        if source.keeps_order:
            return source.inputs(self.size, self.config.seed)
        return (item for item in self.listing.now())

    def scaled(self, latents: Tensor) -> Tensor:
        """The latents in the format's scaling: the VAE's output times its scaling factor."""
        config = self.zoo.required("vae").config
        if latents.shape[-3] != config.latent_channels:
            raise Rejected(f"wrong latents: {latents.shape[-3]} channels, the zoo's VAE has {config.latent_channels}")
        if self.source.scaling == "raw":
            return latents * config.scaling_factor
        if self.source.scaling == "shifted":
            return latents + (config.shift_factor or 0.0) * config.scaling_factor
        return latents

    def shape_of(self, item: Input) -> str:
        """Width and height of an input's latents; "0x0" if unreadable."""
        try:
            return "{}x{}".format(*self.source.read_size(item))
        except (Rejected, OSError):
            return "0x0"

    def content(self, item: Input, seed: int) -> str:
        return content_hash(self.source.read_latents(item).numpy().tobytes(), self.source.prompts(item, seed))

    def try_input(self, item: Input, seed: int) -> None:
        self.source.prompts(item, seed)
        self.source.read_latents(item)

    def read(self, index: int, item: Input, shape: str) -> Ready:
        """Read one input, in a thread: its captions by the source's rule, its latents. Raises Rejected."""
        seed = self.seed_of(index)
        prompts, given = self.source.prompts(item, seed), self.source.read_latents(item)
        latents, (h, w) = self.scaled(given), given.shape[1:]
        if shape != f"{w}x{h}":
            raise Rejected(MOVED)
        factor, step = self.zoo.factor, models.step_of(self.zoo)
        if self.teaches and (h * factor % step or w * factor % step):
            raise Rejected(f"wrong latents: {w}x{h}, the teachers need multiples of {step // factor}")
        content = content_hash(given.numpy().tobytes(), prompts)
        return Ready(index, item.origin, seed, prompts, tensors={"latents": latents}, content=content)

    def encode(self, group: list[list[Ready]]) -> list[Mapping]:
        given = [torch.stack([ready.tensors["latents"] for ready in batch]) for batch in group]
        pixels: list[Tensor | None] = [None] * len(group)
        if self.teaches:
            with self.zoo.using("vae"):
                pixels = [self.zoo.decode_latents(latents).cpu() for latents in given]
        others = [name for name in self.groups if name != "latents"]
        made = encode(self.zoo, group, others, self.config, self.timesteps, pixels)
        for batch, latents, decoded, tensors in zip(group, given, pixels, made, strict=True):
            tensors["latents"] = latents.to(getattr(torch, self.config.dtype))
            if decoded is not None and self.config.preview:
                self._previews.update((ready.index, to_uint8(x)) for ready, x in zip(batch, decoded, strict=True))
        return made

    def pack(self, ready: Ready, tensors: dict[str, Tensor]) -> dict:
        height, width = (self.zoo.factor * side for side in tensors["latents"].shape[1:])
        meta = self.meta(ready) | {"size": [width, height], "crop": [0, 0, width, height]}
        seen = self._previews.pop(ready.index, None)
        picture = None if seen is None else preview(seen.permute(1, 2, 0).numpy())
        return encode_sample(sample_key(self.source.dataset_id, ready.index), tensors, meta, picture)
