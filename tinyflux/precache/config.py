"""What to build and how: the options of `sharding.build`, and a process's place among the ranks that share a build."""

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

import tyro

from tinyflux.util.settings import AtLeast, Match, Within, check


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
    limit: Annotated[int, AtLeast(1)] | None = None
    """Take only the first N inputs."""
    only: tuple[str, ...] = ()
    """Make only these, for all samples of a source that is finished: `lune` and `sol` also where the source has none
    yet; `prompt` takes the captions as they are now, with their T5 states and CLIP vectors (the teachers saw the
    first ones: `--only prompt lune sol` makes all of them). The source stays as it is: --out becomes an overlay of
    it, a folder with these fields alone, and naming that folder names both."""
    old: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """The folder of the source that --only starts from; default: data/SOURCE."""
    append: bool = False
    """Take in inputs that are new since the source was built, or a larger --limit; they go last, in new shards."""
    shapes: Annotated[tuple[str, ...], Match(r"square|auto|\d+x\d+", "square, auto or WIDTHxHEIGHT")] = ("square",)
    """What images are cut to: `square`; `auto`, the nearest of nine shapes of the same area from 1:2 to 2:1; or the
    nearest of those that are named, in pixels: `--shapes 512x512 448x576`. A shard holds one shape."""
    shard_size: Annotated[int, AtLeast(1)] = 256
    """Inputs a shard."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Stored precision."""
    teacher_input: Literal["image", "noise"] = "image"
    """What Lune and Sol look at: the noised image, or pure noise."""
    timesteps: Annotated[int, Within(2, 100)] | None = None
    """Timesteps that the teachers' features are kept at, evenly spaced from 0.05 to 0.95: fewer take less time and
    room, training interpolates between them. Default: 10, or as many as the base of --only has."""
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
    batch_size: Annotated[int, AtLeast(1)] | None = None
    """Images encoded at once; it changes the last bits of the result. Default: 16, or 64 with the tiny zoo, where a
    call of a model costs more than an image."""
    threads: Annotated[int, AtLeast(1)] | None = None
    """Threads of the CPU's kernels; they change the last bits too. Default: the cores of this rank, but 1 on a GPU or
    with the tiny zoo, where thread synchronisation costs more than it saves."""
    workers: Annotated[int, AtLeast(1)] | None = None
    """Threads that read images, and as many that compress. Default: the cores of this rank, at most 16."""
    seed: int = 0
    """Everything random in a build is keyed by it, the dataset id and the input's number."""
    max_rejected: Annotated[float, Within(0, 1)] = 0.01
    """Exit with status 1 if a larger fraction of the inputs was left out."""

    def __post_init__(self):
        if self.batch_size is None:
            self.batch_size = 64 if self.zoo == "tiny" else 16
        check(self, "--")
        if self.compile and self.low_memory:
            raise ValueError("--compile with --low-memory would compile each model again for each shard: choose one")
        if self.only and not self.out:
            raise ValueError("--only needs --out, the folder of the overlay: the source stays as it is")
        if self.old and not self.only:
            raise ValueError("--from goes with --only")
        unfit = {
            "--limit": self.limit,
            "--append": self.append,
            "--estimate": self.estimate,
            "--no-lune": not self.lune,
            "--no-sol": not self.sol,
            "--kind cache": self.kind == "cache",
        }
        if self.only and (wrong := [name for name, given in unfit.items() if given]):
            raise ValueError(f"--only takes the source as it is: leave out {', '.join(wrong)}")
        if len(self.shapes) > 1 and {"square", "auto"} & {*self.shapes}:
            raise ValueError(f"--shapes {' '.join(self.shapes)}: square and auto stand alone")
        if not 1 <= len(self.shapes) <= 64:
            raise ValueError("--shapes takes 1 to 64 shapes")
        if not self.source and not self.list:
            raise ValueError("--source NAME is missing; --list shows the names")

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of tensors that are made of each image."""
        return sample_groups(self.lune, self.sol)


def sample_groups(lune: bool, sol: bool) -> tuple[str, ...]:
    """The groups of a whole sample, with or without its teachers'."""
    return ("latents", "text", *["lune"] * lune, *["sol"] * sol)


class Place(NamedTuple):
    """A process among those that share a build."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def of_environment(cls) -> "Place":
        """From torchrun's variables, a SLURM array's, or both. Raises ValueError."""
        rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
        tasks = _number("SLURM_ARRAY_TASK_COUNT", 1)
        if tasks > 1:
            task = _number("SLURM_ARRAY_TASK_ID", 0) - _number("SLURM_ARRAY_TASK_MIN", 0)
            rank, world = task // _number("SLURM_ARRAY_TASK_STEP", 1) * world + rank, tasks * world
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} is impossible; see RANK, WORLD_SIZE and SLURM_ARRAY_TASK_*")
        return cls(rank, world, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1))

    @property
    def cores(self) -> int:
        """The cores of this rank."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ValueError(f"environment variable {name} must be a whole number, not {text!r}")
    return int(text)
