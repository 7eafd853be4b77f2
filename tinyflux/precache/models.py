"""The models of a build: their device, their revisions, and their entries in a source's manifest."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from tinyflux.precache.config import BuildConfig, Place
from tinyflux.precache.ledger import LedgerError
from tinyflux.shards.manifest import diff_fingerprints

if TYPE_CHECKING:  # the zoo's libraries take seconds to import
    from tinyflux.model.zoo import ModelZoo


def device_and_threads(config: BuildConfig, begun: dict, place: Place) -> dict:
    """Kind of device and number of threads of a build; default: as at the build's start."""
    device = config.device and torch.device(config.device).type
    device = device or begun.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    cores = place.cores if device == "cpu" and config.zoo != "tiny" else 1
    return {"threads": config.threads or begun.get("threads") or cores, "device": device}


def device_of(config: BuildConfig, settings: dict, place: Place) -> str:
    """The device of this rank. Raises RuntimeError if the build needs a device that does not exist."""
    device = config.device or settings["device"]
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("the build needs cuda, but torch finds no such device")
    return f"cuda:{place.local_rank % torch.cuda.device_count()}" if device == "cuda" else device


def pinned(producers: dict[str, dict]) -> dict[str, str]:
    """The models' revisions in the fingerprints of a source's groups."""
    found = {}
    for producer in producers.values():
        for name, model in producer.items():
            if isinstance(model, dict) and "revision" in model:
                found[name] = model["revision"]
            if isinstance(model, dict) and "revision" in model.get("config", {}):
                found["unet"] = model["config"]["revision"]  # out of a single file, with the config of another repo
    return found


def zoo_of(config: BuildConfig, device: str, producers: dict[str, dict], *, decodes: bool = False) -> "ModelZoo":
    """The zoo without loaded models, at the requested revisions, else those of `producers`.

    decodes: whether its VAE must also decode. Raises ValueError for a model that it doesn't have.
    """
    from tinyflux.model import zoo

    dtypes = {name: getattr(torch, dtype) for name, dtype in config.model_dtype.items()}
    revisions = pinned(producers) | config.revision
    return zoo.ModelZoo(
        device=device,
        dtype=dtypes,
        zoo=config.zoo,
        revision=revisions,
        one_at_a_time=config.low_memory,
        extraction_only=("sd_vae", "lune") if decodes else ("vae", "sd_vae", "lune"),
    )


def check_revisions(config: BuildConfig, producers: dict[str, dict], where: object) -> None:
    """Raises LedgerError if the requested revisions are not the commits that the source was built with."""
    if not config.revision:
        return
    from tinyflux.model import zoo

    there, found = pinned(producers), zoo.ModelZoo(zoo=config.zoo, revision=config.revision)
    asked = {name: rev if rev == there.get(name) else found.revision(name) for name, rev in config.revision.items()}
    was, now = ({name: {"revision": each.get(name)} for name in asked} for each in (there, asked))
    if differing := diff_fingerprints(was, now):
        lines = "\n  ".join(differing)
        raise LedgerError(
            f"{where}: was built with other models (old against new):\n  {lines}\n"
            "Leave out --revision, or choose another --out"
        )


def producers_of(zoo: "ModelZoo", groups: Iterable[str], pictures: dict, config: BuildConfig) -> dict[str, dict]:
    """The producer of each group; `pictures`: how images were cropped and resized.

    The models of these groups must have been loaded before.
    """
    from tinyflux.precache.extract import EXTRACTORS, producers

    dtype = getattr(torch, config.dtype)
    made = producers(zoo, groups, dtype, teacher_input=config.teacher_input, seed=config.seed)
    return {name: each | pictures if EXTRACTORS[name].of_image else each for name, each in made.items()}


def step_of(zoo: "ModelZoo") -> int:
    """Image sides must be multiples of this many pixels, because the VAEs and the teachers' UNets halve them."""
    return max(1, zoo.image_size // 8)


def workers_of(config: BuildConfig, place: Place) -> int:
    """Threads that read images, and as many that compress."""
    return config.workers or min(16, place.cores)
