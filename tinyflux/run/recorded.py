"""Sampling settings of a checkpoint, as its run recorded them in training_config.json, with their origin."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinyflux.util.cards import origins

if TYPE_CHECKING:
    from tinyflux.shards.source import Source

GUIDANCE, SHIFT, ZOO = 5.0, 3.0, "flux"  # defaults: those of the published weights


@dataclass(frozen=True)
class Recorded:
    """Zoo, shift and guidance of a run, and what it has seen. Unrecorded lists are empty."""

    zoo: str = ZOO
    shift: float = SHIFT
    guidance: float = GUIDANCE
    latent_shapes: tuple[tuple[int, int], ...] = ()
    """Heights and widths of the latents it was trained on, most frequent first."""
    words: frozenset[str] = frozenset()
    """All words of its captions, if they are few enough to be known."""
    base_model: tuple[str, ...] = ()
    """The Hub repo that the training started from."""
    datasets: tuple[str, ...] = ()
    """The Hub repos of its sources."""
    origin: str = "by default: the checkpoint has no training_config.json"
    """The origin of these values."""

    @classmethod
    def read(cls, path: Path | None) -> "Recorded":
        """Read from a training_config.json; path None gives the defaults. Raises ValueError for another file."""
        if path is None:
            return cls()
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            trainer, seen = config["trainer"], config.get("seen", {})
            repos = origins(config)
            return cls(
                zoo=str(trainer.get("zoo", ZOO)),
                shift=float(trainer.get("shift", SHIFT)),
                guidance=float(trainer.get("guidance_scale", GUIDANCE)),
                latent_shapes=tuple((int(h), int(w)) for h, w in seen.get("latent_shapes", ())),
                words=frozenset(map(str, seen.get("words", ()))),
                base_model=tuple(repos.get("base_model", ())),
                datasets=tuple(repos.get("datasets", ())),
                origin=f"of {path}",
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the training_config.json of a run: {error!r}") from error

    def unseen(self, prompt: str) -> list[str]:
        """Words of a prompt that no training caption had; [] if the words of the captions are not known."""
        return [word for word in words_of(prompt) if self.words and word not in self.words]


def words_of(text: str) -> list[str]:
    """The words of a text, lower case, each once."""
    return list(dict.fromkeys(re.findall(r"[^\W\d_]+", text.casefold())))


def seen(sources: Sequence["Source"], captions: int = 2000) -> dict:
    """What a run records about its sources for sampling: `latent_shapes`, most frequent first, and `words`, all words
    of their captions, if these can be known.

    They can if each source is local and has a small vocabulary. By Good-Turing, the share of unseen words is about the
    share of words that occur once; it must be below 0.2% in `captions` captions spread over the source.
    """
    shapes: Counter[tuple[int, int]] = Counter()
    words: set[str] | None = set()
    for source in sources:
        index = source.manifest.index
        for shape, samples in zip(index.shape.tolist(), index.samples.tolist(), strict=True):
            shapes[source.shapes[shape]] += samples
        found = _vocabulary(source, captions) if words is not None else None
        words = None if found is None else words | found
    told: dict = {"latent_shapes": [list(shape) for shape, _ in shapes.most_common()]}
    return told if words is None else {**told, "words": sorted(words)}


def _vocabulary(source: "Source", captions: int) -> set[str] | None:
    from tinyflux.shards.format import ShardError
    from tinyflux.shards.store import LocalStore

    manifest = source.manifest
    if not all(isinstance(layer.store, LocalStore) for layer in source.layers) or not manifest.count:
        return None
    counts: Counter[str] = Counter()
    step, opened = max(1, manifest.count // captions), (-1, None)
    for position in range(0, manifest.count, step):
        shard, row = (int(x) for x in manifest.locate(position))
        try:
            if opened[0] != shard:
                opened = shard, source.open(shard)
            counts.update(word for prompt in opened[1].meta(row)["prompts"] for word in words_of(prompt))
        except ShardError:  # the stream reports it when it reads it
            continue
    once = sum(n == 1 for n in counts.values())
    return set(counts) if once <= 0.002 * counts.total() else None
