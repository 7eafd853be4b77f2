"""The command `evaluate`: checkpoint and source -> scores. torch is imported when it runs, so that --help is fast."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tinyflux.trainer.solvers import SOLVERS

if TYPE_CHECKING:
    from tinyflux.model.config import TinyFluxConfig
    from tinyflux.trainer.evaluation import Samples

log = logging.getLogger(__name__)


@dataclass
class EvaluateOptions:
    checkpoint: str
    """A .safetensors or .pt file, a run folder or one of its checkpoints/step_N, or user/repo[:sub/folder]."""
    source: list[str]
    """Sources of the held-out samples: folders or URLs, as in data.sources."""
    out: Path | None = None
    """Folder for the .json and the .html. Default: RUN/evaluations for a run, else evaluations."""
    samples: int = 256
    """Held-out samples to draw and score; all if there are fewer."""
    val_fraction: float | None = None
    """Fraction of the source that is held out. Default: the run's data.val_fraction, so that none was trained on."""
    seed: int | None = None
    """Seed of the held-out split and of the noise. Default: the run's data.seed, else 0."""
    steps: int = 28
    """Steps of the solver."""
    solver: Literal[*SOLVERS] = "euler"
    """Solver, as in the command sample."""
    guidance: float | None = None
    """Classifier-free guidance. Default: the run's, else 5."""
    shift: float | None = None
    """Flux shift. Default: the run's, else 3."""
    zoo: str | None = None
    """Decoder and CLIP: flux, tiny, or a folder. Default: the run's, else flux."""
    ema: bool = True
    """Use the averaged weights; otherwise the trained ones."""
    batch_size: int = 8
    """Samples to process at once."""
    inception: Path | None = None
    """Also compute the FID, with this weights file of torch-fidelity (pip install 'tinyflux-deep[eval]')."""

    def __post_init__(self):
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1")


def _check_widths(samples: "Samples", config: "TinyFluxConfig") -> None:
    """Raises ValueError if a network cannot take the samples."""
    found = samples.latents.shape[1], samples.prompts.t5.shape[-1], samples.prompts.clip.shape[-1]
    expected = config.in_channels, config.joint_attention_dim, config.pooled_projection_dim
    if found != expected:
        raise ValueError(
            "the source's latents, T5 and CLIP states have {}, {} and {} channels, this network takes {}, {} and {}:"
            " choose a source that was built with the zoo of the network's run".format(*found, *expected)
        )


def evaluate(options: EvaluateOptions) -> tuple[Path, dict]:
    """Draw, score and write the results. Returns the JSON's path and the scores."""
    from tinyflux.model.dcp import step_in
    from tinyflux.model.locate import find_training_config, locate
    from tinyflux.shards.config import DataConfig
    from tinyflux.shards.sources import open_sources
    from tinyflux.shards.stream import Stream
    from tinyflux.trainer.drawing import Artist
    from tinyflux.trainer.evaluation import Evaluator, Samples, board_values
    from tinyflux.trainer.scores import ClipScorer, Inception

    inception = Inception(options.inception) if options.inception else None
    artist = Artist.load(options.checkpoint, zoo=options.zoo, ema=options.ema)
    found = find_training_config(options.checkpoint, options.ema)
    run_config = json.loads(found.read_text()) if found else {}
    data = run_config.get("data", {})
    fraction = options.val_fraction or data.get("val_fraction") or 0.0
    seed = options.seed if options.seed is not None else data.get("seed", 0)
    held_out = 0 < fraction <= (data.get("val_fraction") or 0.0) and seed == data.get("seed", 0)
    if not held_out:
        log.warning("the run did not hold out these samples: they may have been trained on")
    config = DataConfig(sources=options.source, val_fraction=fraction or 0.5, seed=seed, global_batch_size=1,
                        micro_batch_size=1)  # fmt: skip
    sources = open_sources(config, ())
    with Stream(sources, config, 0, 1) as stream:
        samples = Samples.read(stream, options.samples, options.batch_size)
    _check_widths(samples, artist.model.config)
    height, width = (length * artist.zoo.factor for length in samples.latents.shape[2:])
    sampler = artist.sampler(height, width, batch_size=options.batch_size, shift=options.shift,
                             guidance=options.guidance, steps=options.steps, solver=options.solver)  # fmt: skip
    try:
        scorer = ClipScorer(artist.zoo)
    except ValueError as error:
        log.warning("no CLIP score and no CMMD: %s", error)
        scorer = None
    evaluator = Evaluator(samples, sampler, scorer, inception, seed=seed)
    weights = locate(options.checkpoint, options.ema)[0]
    step = step_in(weights.name)
    about = {
        "checkpoint": artist.checkpoint, "weights": artist.weights, "step": step,
        "sources": [source.name for source in sources], "held_out": held_out, "seed": seed,
        "steps": options.steps, "solver": options.solver, "guidance": sampler.settings.guidance,
        "shift": sampler.settings.shift, "height": height, "width": width,
    }  # fmt: skip
    device = next(artist.model.parameters()).device
    run = found.parent.parent if found and found.parent.name == "checkpoints" else None
    out = options.out or (run or Path()) / "evaluations"
    name = weights.name.removesuffix(weights.suffix) if weights.is_file() else weights.name
    scores = evaluator.write(out, name, about, *evaluator.forward(artist.model, device))
    if run is not None and step is not None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(run / run_config["trainer"].get("tensorboard_dir", "logs"))) as board:
            for key, value in board_values(scores).items():
                board.add_scalar(key, value, step)
    return out / f"{name}.json", scores
