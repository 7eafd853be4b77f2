"""Precache a source: images and captions -> shards of latents, text states and teacher features.

    python -m sharding.build --source shapes --zoo tiny --limit 200     a first try, offline
    python -m sharding.build --source portraits --sources my.toml       shards go to data/portraits
    python -m sharding.build --source cache/old --kind cache            of an old cache, without any models
    torchrun --nproc-per-node 8 -m sharding.build --source portraits    the same on 8 devices
    sbatch --array=0-31 launch/slurm/build.sbatch --source portraits    the same as 32 jobs of a SLURM array
    python -m sharding.build --source portraits --only lune --out data/portraits-lune    from data/portraits: add Lune

The same command goes on where a stopped or killed one was, and says so when there is nothing left to do.
"""

import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import safetensors.torch
import torch
import transformers
import tyro

from tinyflux.model.zoo import FLUX, ModelZoo
from tinyflux.precache.convert import Converter
from tinyflux.precache.engine import Engine
from tinyflux.precache.extract import (
    by_group,
    extract_batches,
    groups_of,
    load_for,
    models_of,
    null_embeddings,
    producer,
    whole,
)
from tinyflux.precache.ledger import Job, JobError
from tinyflux.precache.legacy import FINGERPRINT
from tinyflux.precache.overlay import FIELDS, Old, Refit, needed, with_entries
from tinyflux.precache.progress import Progress, already, estimate, finish, say_complete, say_speed
from tinyflux.precache.readers import list_inputs
from tinyflux.precache.sources import (
    SourceError,
    SourceSpec,
    describe,
    find_source,
    load_sources,
    table,
    unlisted_source,
)
from tinyflux.shards.manifest import diff_fingerprints
from tinyflux.util.files import atomic_write


@dataclass
class BuildConfig:
    """What to build, and how."""

    source: str = ""
    """Name of a table in sources.toml."""
    sources: str | None = None
    """The sources file; default: ./sources.toml if there is one, else the packaged one."""
    kind: str | None = None
    """What --source is where no sources file lists it: imagefolder, webdataset, jsonl, csv, hf or cache (see the
    packaged sources.toml); --source is its location then."""
    dataset_id: int = 0
    """The id of such a source; others have theirs in the sources file."""
    list: bool = False
    """Show the known sources and stop."""
    estimate: bool = False
    """Time a few real batches, print hours and disk, and stop."""
    out: str | None = None
    """Output folder; default: data/SOURCE."""
    zoo: str = "flux"
    """The models: flux (from the Hub), tiny (packaged, offline), or a folder laid out like tiny."""
    revision: dict[str, str] = field(default_factory=dict)
    """Commits or branches of the Hub's models: `--revision t5 0f1e2d... vae main`. Default: those that the build was
    begun with, else main; what they stand for is resolved once and recorded."""
    model_dtype: dict[str, Literal["float32", "float16", "bfloat16"]] = field(default_factory=dict)
    """Precision that models compute in: `--model-dtype lune bfloat16 sol bfloat16`; float32 unless given."""
    limit: int | None = None
    """Take only the first N inputs."""
    only: tuple[Literal["lune", "sol", "prompt"], ...] = ()
    """Make only these anew, of a source that is finished, and copy the rest of it into the new folder --out: `lune`
    and `sol` also where the source has none yet; `prompt` takes the captions as they are now, with their T5 states and
    CLIP vectors (the teachers saw the old ones: `--only prompt lune sol` redoes them too). The old source stays as it
    is, and so do its shards, keys and rejects."""
    old: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """The folder of the source that --only starts from; default: data/SOURCE."""
    append: bool = False
    """Take in inputs that are new since the source was built, or a larger --limit; they go last, in new shards."""
    shard_size: int = 256
    """Inputs a shard."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Stored precision."""
    teacher_input: Literal["image", "noise"] = "image"
    """What Lune and Sol look at: the noised image, or pure noise."""
    lune: bool = True
    """Keep Lune's features."""
    sol: bool = True
    """Keep Sol's statistics."""
    preview: bool = True
    """Keep a small JPEG of each image."""
    device: str | None = None
    """cpu, cuda, ...; default: cuda if there is one, else cpu. Ranks of a node take one device each."""
    low_memory: bool = False
    """Have one model in memory at a time: each runs over a whole shard, then makes room for the next. The result is
    the same; a GPU keeps the others in the CPU's memory, the CPU reads them from disk again."""
    compile: bool = False
    """Compile the UNets and the VAEs' encoders: minutes at the start, faster then; it changes the last bits."""
    batch_size: int = 16
    """Images encoded at once; it changes the last bits of the result."""
    threads: int | None = None
    """Threads of the CPU's kernels; they change the last bits too. Default: the cores of this rank, but 1 on a GPU or
    with the tiny zoo, where waiting for each other costs more than it gains."""
    workers: int | None = None
    """Threads that read images, and as many that compress. Default: the cores of this rank, at most 16."""
    seed: int = 0
    """Everything random in a build is keyed by it, the dataset id and the input's ordinal."""
    max_rejected: float = 0.01
    """Exit with status 1 if a larger fraction of the inputs was left out."""

    def __post_init__(self):
        for name in ("limit", "shard_size", "batch_size", "threads", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        try:
            torch.device(self.device or "cpu")
        except RuntimeError as error:
            raise ValueError(f"--device {self.device!r} is none that torch knows: cpu, cuda, cuda:1, ...") from error
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"--max-rejected must be a fraction from 0 to 1, not {self.max_rejected}")
        if self.compile and self.low_memory:
            raise ValueError("--compile with --low-memory would compile each model anew for each shard: choose one")
        if self.only and not self.out:
            raise ValueError("--only needs --out, the folder of the new source: the old one stays as it is")
        if self.old and not self.only:
            raise ValueError("--from goes with --only")
        unfit = {"--limit": self.limit, "--append": self.append, "--estimate": self.estimate}
        unfit |= {"--no-lune": not self.lune, "--no-sol": not self.sol, "--kind cache": self.kind == "cache"}
        if self.only and (wrong := [name for name, given in unfit.items() if given]):
            raise ValueError(f"--only takes the old source as it is: leave out {', '.join(wrong)}")
        if not self.source and not self.list:
            raise ValueError("--source NAME is missing; --list shows the names")


def place() -> tuple[int, int, int, int]:
    """(rank, world, local rank, local world) from torchrun's environment, a SLURM array's, or both."""

    def number(name: str, default: int) -> int:
        text = os.environ.get(name, str(default))
        if not text.isdigit():
            raise ValueError(f"environment variable {name} must be a whole number, not {text!r}")
        return int(text)

    rank, world = number("RANK", 0), number("WORLD_SIZE", 1)
    tasks = number("SLURM_ARRAY_TASK_COUNT", 1)
    if tasks > 1:
        task = number("SLURM_ARRAY_TASK_ID", 0) - number("SLURM_ARRAY_TASK_MIN", 0)
        rank, world = task // number("SLURM_ARRAY_TASK_STEP", 1) * world + rank, tasks * world
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world} is impossible; see RANK, WORLD_SIZE and SLURM_ARRAY_TASK_*")
    return rank, world, number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1)


def settle(config: BuildConfig, spec: SourceSpec, begun: dict | None, local_world: int) -> dict:
    """The settings that decide a build's bytes; threads and device, if not asked for, stay as the build was begun."""
    begun = (begun or {}).get("settings", {})
    device = config.device and torch.device(config.device).type
    device = device or begun.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    busy = device == "cpu" and config.zoo != "tiny"
    cores = max(1, len(os.sched_getaffinity(0)) // local_world) if busy else 1
    return {
        "source": describe(spec),
        "zoo": config.zoo,
        "dtype": config.dtype,
        "teacher_input": config.teacher_input,
        "lune": config.lune,
        "sol": config.sol,
        "preview": config.preview,
        "seed": config.seed,
        "shard_size": config.shard_size,
        "batch_size": config.batch_size,
        "threads": config.threads or begun.get("threads") or cores,
        "device": device,
    } | {name: value for name in ("compile", "model_dtype") if (value := getattr(config, name))}


def revisions(config: BuildConfig, begun: dict | None) -> dict[str, str]:
    """The models' revisions: those asked for, else the commits that the build was begun with."""
    models = (begun or {}).get("fingerprint", {})
    pinned = {name: model["revision"] for name, model in models.items() if name in FLUX and "revision" in model}
    for name in ("lune", "sol"):  # out of single files, with the config of another repo
        if revision := models.get(name, {}).get("config", {}).get("revision"):
            pinned["unet"] = revision
    return pinned | config.revision


def check_revisions(job: Job, config: BuildConfig, begun: dict) -> None:
    """Raises JobError where revisions are asked for that are not the commits that the source was built with."""
    if not config.revision:
        return
    pinned, zoo = revisions(BuildConfig("any"), begun), ModelZoo(zoo=config.zoo, revision=config.revision)
    asked = {name: rev if rev == pinned.get(name) else zoo.revision(name) for name, rev in config.revision.items()}
    names = {name: {"revision": pinned.get(name)} for name in asked}
    if differing := diff_fingerprints(names, {name: {"revision": revision} for name, revision in asked.items()}):
        lines = "\n  ".join(differing)
        raise JobError(
            f"{job.out}: was built with other models (there, against those asked for now):\n  {lines}\n"
            "Leave out --revision, or choose another --out"
        )


def zoo_of(config: BuildConfig, device: str, begun: dict | None) -> ModelZoo:
    """The zoo, none of its models loaded yet. Raises ValueError for one that it doesn't have."""
    dtypes = {name: getattr(torch, dtype) for name, dtype in config.model_dtype.items()}
    return ModelZoo(
        device=device,
        dtype=dtypes,
        zoo=config.zoo,
        revision=revisions(config, begun),
        one_at_a_time=config.low_memory,
        extraction_only=True,
    )


def device_of(config: BuildConfig, settings: dict, local_rank: int) -> str:
    """The device of this rank. Raises RuntimeError where the build needs one that isn't there."""
    device = config.device or settings["device"]
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("the build needs cuda, and torch sees no such device")
    return f"cuda:{local_rank % torch.cuda.device_count()}" if device == "cuda" else device


def source_of(config: BuildConfig) -> SourceSpec:
    """The source that is asked for, listed in the sources file or described by --kind. Raises SourceError."""
    if config.kind is None or config.source in load_sources(config.sources):
        spec = find_source(config.source, config.sources)
        if config.kind not in (None, spec.kind):
            raise SourceError(f"[{spec.name}] is of kind {spec.kind!r}, not {config.kind!r}: leave out --kind")
        return spec
    return unlisted_source(config.source, config.kind, config.dataset_id)


def convert(config: BuildConfig, spec: SourceSpec) -> int:
    """Turn an old cache into shards, or this rank's share of it. Returns the exit status. Raises as `build`."""
    others = {"dtype": "float16", "teacher_input": "image", "estimate": False, "revision": {}}
    if wrong := [name for name, value in others.items() if getattr(config, name) != value]:
        raise ValueError(f"--{wrong[0].replace('_', '-')} does not apply to an old cache: it is taken as it is")
    rank, world, local_rank, local_world = place()
    job = Job(Path(config.out or Path("data") / spec.name), spec.name, spec.dataset_id)
    settings = {"source": describe(spec), "shard_size": config.shard_size, "lune": config.lune, "sol": config.sol}
    if begun := job.config():
        job.check({"settings": settings})
    if begun and not config.append and (status := already(job, config.shard_size)) is not None:
        return status
    workers = config.workers or min(16, max(1, len(os.sched_getaffinity(0)) // local_world))
    converter = Converter(spec, config.lune, config.sol, workers)
    null = safetensors.torch.save(converter.null())
    inputs = converter.inputs()[: config.limit]
    begun = {"settings": settings, "fingerprint": FINGERPRINT, "producers": by_group(FINGERPRINT)}
    ordered = job.begin(begun, inputs, config.shard_size, config.append)
    with job.lock():
        if not (job.out / "null.safetensors").exists():
            atomic_write(job.out / "null.safetensors", null)
    progress = Progress(job, converter, show=local_rank == 0)
    converter.run(job, job.claim(rank, world), ordered, progress)
    progress.close()
    if spec.null is None:
        print(f"{job.out / 'null.safetensors'} is zeros: the cache has no empty prompt (key null of a sources.toml)")
    return finish(job, by_group(FINGERPRINT), config.max_rejected)


def build(config: BuildConfig) -> int:
    """Build the source, or this rank's share of it. Returns the exit status.

    Raises ValueError, OSError or RuntimeError with a message for the user.
    """
    spec = source_of(config)
    if config.only:
        return redo(config, spec)
    if spec.kind == "cache":
        return convert(config, spec)
    rank, world, local_rank, local_world = place()
    job = Job(Path(config.out or Path("data") / spec.name), spec.name, spec.dataset_id)
    begun = None if config.estimate else job.config()
    settings = settle(config, spec, begun, local_world)
    if begun:
        job.check({"settings": settings})
        check_revisions(job, config, begun)
        if "only" in begun and not job.manifest.exists():
            raise JobError(f"{job.out}: was begun with --only: finish it by the same command")
    if begun and not config.append and (status := already(job, config.shard_size)) is not None:
        return status
    device = device_of(config, settings, local_rank)
    zoo = zoo_of(config, device, begun)
    size = spec.size or zoo.image_size
    inputs = list_inputs(spec, size, config.seed)[: config.limit]
    if begun is None and not config.estimate:
        job.out.mkdir(parents=True, exist_ok=True)  # before the models: a folder that can't be written is quickly told
    torch.set_num_threads(settings["threads"])
    load_for(zoo, groups_of(settings["lune"], settings["sol"]))
    if config.compile:
        zoo.compile()
    dtype = getattr(torch, config.dtype)
    switches = {name: settings[name] for name in ("lune", "sol", "teacher_input")}
    workers = config.workers or min(16, max(1, len(os.sched_getaffinity(0)) // local_world))
    parts = groups_of(settings["lune"], settings["sol"])
    encode = partial(extract_batches, zoo, groups=parts, teacher_input=config.teacher_input, dtype=dtype)
    engine = Engine(
        spec, encode, size, config.batch_size, config.seed, workers, config.preview, whole_shards=config.low_memory
    )
    if config.estimate:
        estimate(engine, inputs, world, config.shard_size)
        return 0
    fingerprint = producer(zoo, size, dtype, crop=spec.crop, seed=config.seed, **switches)
    begun = {"settings": settings, "fingerprint": fingerprint, "producers": by_group(fingerprint)}
    ordered = job.begin(begun, inputs, config.shard_size, config.append)
    with job.lock():
        if not (job.out / "null.safetensors").exists():
            atomic_write(job.out / "null.safetensors", safetensors.torch.save(null_embeddings(zoo, dtype)))
    progress = Progress(job, engine, show=local_rank == 0)
    start = time.perf_counter()
    engine.run(job, job.claim(rank, world), ordered, progress)
    progress.close()
    say_speed(engine, time.perf_counter() - start)
    return finish(job, by_group(fingerprint), config.max_rejected)


def redo(config: BuildConfig, spec: SourceSpec) -> int:
    """Make some fields of a finished source anew, or this rank's share of it. Returns the exit status. Raises as
    `build`."""
    if spec.kind == "cache":
        raise ValueError(f"[{spec.name}] is an old cache: it has no images to make anything of")
    rank, world, local_rank, local_world = place()
    old = Old(config.old or f"data/{spec.name}", spec)
    job = Job(Path(config.out), spec.name, spec.dataset_id)
    if job.out.resolve() == old.folder.resolve():
        raise JobError(f"--out {job.out}: is the old source, which --only leaves as it is; choose another folder")
    parts = {FIELDS[name] for name in config.only}
    begun = job.config()
    settings = settle(config, spec, begun or {"settings": old.settings}, local_world) | {
        "lune": "lune" in old.parts | parts,
        "sol": "sol" in old.parts | parts,
        "shard_size": old.settings.get("shard_size", config.shard_size),
        "preview": old.settings.get("preview", config.preview),
    }
    asked = {"settings": settings, "only": {"fields": sorted(config.only), "from": old.identity}}
    if begun:
        job.check(asked)
        check_revisions(job, config, begun)
        if job.complete_of(len(old.sizes)):
            return say_complete(job)
    device = device_of(config, settings, local_rank)
    shared = set(models_of(parts)) & set(models_of(old.parts - parts))
    known = {name: value for name, value in whole(old.manifest.groups).items() if name in shared}
    zoo = zoo_of(config, device, begun or {"fingerprint": known})
    size = spec.size or zoo.image_size
    old.compare(needed(spec, config.seed, config.dtype, size, old, parts, config.teacher_input))
    workers = config.workers or min(16, max(1, len(os.sched_getaffinity(0)) // local_world))
    dtype = getattr(torch, config.dtype)
    encode = partial(extract_batches, zoo, groups=parts, teacher_input=config.teacher_input, dtype=dtype)
    limits = (size, config.batch_size, config.seed, workers)
    engine = Refit(spec, encode, *limits, whole_shards=config.low_memory, old=old, redo=parts)
    rows = Job(old.folder, spec.name, spec.dataset_id).read_inputs() if old.inputs is not None else None
    engine.match(list_inputs(spec, size, config.seed), rows)
    job.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings["threads"])
    load_for(zoo, parts)
    if config.compile:
        zoo.compile()
    fingerprint = old.fingerprint(parts, zoo.fingerprint(), config.teacher_input)
    job.begin_like(asked | {"fingerprint": fingerprint, "producers": by_group(fingerprint)}, old.sizes, old.inputs)
    with job.lock():
        if not (job.out / "null.safetensors").exists():
            made = safetensors.torch.save(null_embeddings(zoo, dtype)) if "text" in parts else None
            atomic_write(job.out / "null.safetensors", made or (old.folder / "null.safetensors").read_bytes())
    progress = Progress(job, engine, show=local_rank == 0)
    start = time.perf_counter()
    engine.run(job, with_entries(job, job.claim(rank, world)), [], progress)
    progress.close()
    say_speed(engine, time.perf_counter() - start)
    return finish(job, by_group(fingerprint), config.max_rejected)


# what goes wrong before anything is built
SETUP = (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError, ConnectionError)


def main(args: list[str] | None = None) -> int:
    """The command; `args` default to the process's own.

    What goes wrong for a user is one message on stderr, with exit status 2 if nothing was begun, else 1.
    """
    transformers.logging.disable_progress_bar()  # one bar is enough: the build's own
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged metadata, and of sizes that our own limit rejects
    try:
        config = tyro.cli(BuildConfig, prog="python -m sharding.build", description=__doc__, args=args)
        if config.list:
            print(table(load_sources(config.sources)))
            return 0
        return build(config)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2 if isinstance(error, SETUP) else 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # out of memory, a lost device, a model that cannot be loaded
        print(f"error: {error}\nfinished shards are intact and the same command goes on", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
