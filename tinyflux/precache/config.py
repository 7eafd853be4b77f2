"""The options of `sharding.build`, and a process's rank among those that share a build."""

import os
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal, NamedTuple

import tyro

from tinyflux.util.settings import AtLeast, Match, Within, check

UNRECORDED = {
    *("sources", "kind", "dataset_id", "limit", "revision", "only", "old"),  # compared as inputs, models and base
    *("list", "estimate", "out", "append", "low_memory", "workers", "max_rejected"),  # do not change a sample
}
"""Options that are not among the recorded settings, which must be the same when a build is resumed."""


@dataclass
class BuildConfig:
    """What to build, and how."""

    source: str = ""
    """Name of a table in sources.toml."""
    sources: str | None = None
    """The sources file; default: ./sources.toml if there is one, else the packaged one."""
    kind: str | None = None
    """Kind of a source that is not in a sources file: imagefolder, webdataset, jsonl, csv, hf or cache (see the
    packaged sources.toml). --source is then its location."""
    dataset_id: int = 0
    """The id of such a source; other sources have theirs in the sources file."""
    list: bool = False
    """Show the known sources and stop."""
    estimate: bool = False
    """Time a few real batches, print hours and disk, and stop."""
    out: str | None = None
    """Output folder; default: data/SOURCE."""
    zoo: str = "flux"
    """The models: flux (from the Hub), tiny (packaged, offline), or a folder laid out like tiny."""
    revision: dict[str, str] = field(default_factory=dict)
    """Commits or branches of models on the Hub: `--revision t5 0f1e2d... vae main`. Default: those that the build
    started with, else main; branches are resolved once and the commits recorded."""
    model_dtype: dict[str, Literal["float32", "float16", "bfloat16"]] = field(default_factory=dict)
    """Precision of models: `--model-dtype lune bfloat16 sol bfloat16`. Default: float32."""
    limit: Annotated[int, AtLeast(1)] | None = None
    """Take only the first N inputs."""
    only: tuple[str, ...] = ()
    """Build only these for all samples of a finished source. `lune`, `sol`: add or recompute a teacher's features.
    `prompt`: read the captions again and encode them with T5 and CLIP (the teachers saw the old first captions; to
    recompute all: `--only prompt lune sol`). The source does not change: --out becomes its overlay, a folder with only
    these fields that names the source as its base."""
    old: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """The folder of the source that --only starts from; default: data/SOURCE."""
    append: bool = False
    """Add inputs that are new since the source was built, or a larger --limit; they go last, in new shards."""
    shapes: Annotated[tuple[str, ...], Match(r"square|auto|[1-9]\d*x[1-9]\d*", "square, auto or WIDTHxHEIGHT")] = (
        "square",
    )
    """Shapes that images are cropped to: `square`; `auto`, the nearest of nine shapes of the same area from 1:2 to 2:1;
    or the nearest of your own shapes, in pixels: `--shapes 512x512 448x576`. A shard has one shape."""
    shard_size: Annotated[int, AtLeast(1)] = 256
    """Inputs per shard."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Stored precision."""
    teacher_input: Literal["image", "noise"] = "image"
    """Input of Lune and Sol: the noised image, or pure noise."""
    timesteps: Annotated[int, Within(2, 100)] | None = None
    """Number of timesteps for the teachers' features, evenly spaced from 0.05 to 0.95. Fewer take less time and space;
    training interpolates between them. Default: 10, or the number in the base of --only."""
    lune: bool = True
    """Keep Lune's features."""
    sol: bool = True
    """Keep Sol's statistics."""
    preview: bool = True
    """Keep a small JPEG of each image."""
    device: str | None = None
    """cpu, cuda, ...; default: cuda if there is one, else cpu. Ranks of a node take one device each."""
    low_memory: bool = False
    """Keep one model in memory at a time: each runs over a whole shard, then the next is loaded. The result is the
    same. On a GPU the other models wait in CPU memory; on a CPU they are read from disk again."""
    compile: bool = False
    """Compile the UNets and the VAEs' encoders: takes minutes to start, then runs faster; changes the last bits."""
    batch_size: Annotated[int, AtLeast(1)] | None = None
    """Images to encode at once; changes the last bits of the result. Default: 16, or 64 with the tiny zoo, where a
    model call costs more than an image."""
    threads: Annotated[int, AtLeast(1)] | None = None
    """Threads of CPU kernels; also changes the last bits. Default: the cores of this rank, but 1 on a GPU or with the
    tiny zoo, where thread synchronisation costs more than it saves."""
    workers: Annotated[int, AtLeast(1)] | None = None
    """Threads that read images, and as many that compress. Default: the cores of this rank, at most 16."""
    seed: int = 0
    """Every random draw of a build is keyed by this seed, the dataset id and the input's number."""
    max_rejected: Annotated[float, Within(0, 1)] = 0.01
    """Exit with status 1 if a larger fraction of the inputs is rejected."""

    def __post_init__(self):
        if self.batch_size is None:
            self.batch_size = 64 if self.zoo == "tiny" else 16
        check(self, "--")
        if self.compile and self.low_memory:
            raise ValueError("--compile with --low-memory would compile each model again for each shard: use only one")
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
            raise ValueError(f"--only uses the inputs of the finished source: leave out {', '.join(wrong)}")
        if len(self.shapes) > 1 and {"square", "auto"} & {*self.shapes}:
            raise ValueError(f"--shapes {' '.join(self.shapes)}: square and auto cannot be combined with other shapes")
        if not 1 <= len(self.shapes) <= 64:
            raise ValueError("--shapes takes 1 to 64 shapes")
        if not self.source and not self.list:
            raise ValueError("--source NAME is missing; --list shows the names")

    @property
    def recorded(self) -> dict:
        """The options that a build records and compares: all that are not in UNRECORDED."""
        return {name: value for name, value in asdict(self).items() if name not in UNRECORDED}

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of tensors to build for each image."""
        return sample_groups(self.lune, self.sol)


def sample_groups(lune: bool, sol: bool) -> tuple[str, ...]:
    """All groups of a sample, with or without the teachers'."""
    return ("latents", "text", *["lune"] * lune, *["sol"] * sol)


class Place(NamedTuple):
    """A process's rank among those that share a build."""

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
        raise ValueError(f"environment variable {name} must be an integer, not {text!r}")
    return int(text)
