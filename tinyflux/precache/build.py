"""The steps of every build, for any recipe: check, list inputs, load models, run, write the manifest."""

import tempfile
import time
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from tinyflux.precache.engine import Engine
from tinyflux.precache.from_images import FromImages
from tinyflux.precache.kinds.base import ImageSource, Source
from tinyflux.precache.ledger import Ledger, LedgerError
from tinyflux.precache.listing import Few
from tinyflux.precache.models import workers_of
from tinyflux.precache.progress import Progress, finish, say_complete, say_speed, shares
from tinyflux.precache.recipe import Recipe
from tinyflux.shards.writer import write_null


def recipe_of(source: Source, only: tuple[str, ...] = ()) -> type[Recipe]:
    """The recipe that builds a source, or with `only` an overlay of it. Raises ValueError for `only` if the source has
    no images."""
    if only and not isinstance(source, ImageSource):
        raise ValueError(f"[{source.name}] is of kind {source.kind!r}, which has no images: leave out --only")
    module, _, cls = ("overlay:Overlay" if only else source.recipe).partition(":")
    return getattr(import_module(f"tinyflux.precache.{module}"), cls)


def build(recipe: Recipe, *, quiet: bool = False) -> int:
    """Build what is missing, or this rank's share of it. Returns the exit status.

    Raises ValueError, OSError or RuntimeError with a message for the user.
    """
    config, ledger, place = recipe.config, recipe.ledger, recipe.place
    begun = ledger.config() or {}
    asked = recipe.asked(begun.get("settings", {}))
    if begun:
        if "only" in begun and "only" not in asked:
            raise LedgerError(f"{ledger.out}: this build was started with --only: finish it with the same command")
        ledger.check(asked)
        recipe.check(begun)
        if not config.append and ledger.complete():
            return say_complete(ledger, config.max_rejected, "" if place.rank else recipe.changes(), quiet=quiet)
    recipe.probe()
    ledger.out.mkdir(parents=True, exist_ok=True)  # before loading models, so that an unwritable folder fails fast
    producers = recipe.load(begun)
    try:
        with ledger.lock():
            ledger.begin(asked | {"producers": producers}, recipe.base)
            recipe.take_inputs()
            if not (ledger.out / "null.safetensors").exists() and (null := recipe.null()) is not None:
                write_null(ledger.out, null)
        engine = Engine(recipe, ledger, config.batch_size, workers_of(config, place), whole_shards=config.low_memory)
        progress = Progress(ledger, engine, show=place.local_rank == 0)
        start = time.perf_counter()
        engine.run(progress)
        progress.close()
    finally:
        ledger.close()
    if not quiet:
        say_speed(engine, time.perf_counter() - start, recipe.truncated, recipe.seconds)
    return finish(ledger, producers, config.max_rejected, timesteps=recipe.timesteps, base=recipe.base, quiet=quiet)


def estimate(recipe: FromImages, world: int) -> int:
    """Build a few batches into a temporary folder, and print the time and space of the whole build."""
    config = recipe.config
    batch = config.shard_size if config.low_memory else config.batch_size
    recipe.asked({})
    recipe.probe()
    recipe.load({})
    name = recipe.source.name
    with tempfile.TemporaryDirectory(prefix="tinyflux-estimate-") as folder:
        recipe.ledger = ledger = Ledger(Path(folder), name, recipe.source.dataset_id)
        with ledger.lock():
            recipe.take_inputs()
        count = ledger.total
        recipe.config = replace(config, shard_size=batch)
        recipe.listing, ledger.parts = Few(recipe.listing, (2 if config.low_memory else 4) * batch), range(1)
        ledger.per_part, marks = 1000, []
        engine = Engine(recipe, ledger, config.batch_size, workers_of(config, recipe.place), config.low_memory)
        recipe.zoo.timed = True
        engine.run(lambda: marks.append((time.perf_counter(), engine.images, Counter(recipe.seconds))))
        notes = [note for number in range(1000) if (note := ledger.note_of(number))]
    shards = [note["shard"] for note in notes if note["shard"]]
    made = sum(shard["count"] for shard in shards)
    if not made:
        reason = notes[0]["rejected"][0]["reason"] if notes else "there are none"
        raise LedgerError(f"all of the first {engine.images} inputs are rejected: {reason}, ...")
    (start, warm, before), (end, images, after) = marks[0], marks[-1]  # the first batch is the warm-up
    if images == warm:
        option = "--shard-size" if config.low_memory else "--batch-size"
        raise LedgerError(f"--estimate needs more than {batch} inputs, or a smaller {option}")
    rate = (images - warm) / (end - start)
    each, kept = sum(shard["bytes"] for shard in shards) / made, made / engine.images
    device = recipe.zoo.device.type.upper()
    print(f"{name}: {rate:.1f} images/s per rank, measured on {images - warm} images; {1 - kept:.1%} rejected")
    for inputs, n in ((f"all {count} inputs", count), ("a million inputs", 10**6)):
        if n is not None:
            hours, size = n / rate / 3600, n * kept * each / 1e9
            on = f", {hours / world:.2f} hours on {world} ranks" if world > 1 else ""
            print(f"  {inputs}: {hours:.2f} {device}-hours{on}, {size:.2f} GB at {each / 1e3:.1f} kB per sample")
    spent = after - before
    print(f"  time by model: {shares(spent)}; {sum(spent.values()) / (end - start):.0%} of the whole")
    print(f"  reading: training at 1000 samples/s reads {each / 1e3:.1f} MB/s")
    return 0
