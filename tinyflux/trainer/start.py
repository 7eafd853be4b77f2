"""Start a run: settings -> stream, model and trainer."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyflux.model.model import TinyFluxDeep
from tinyflux.run.checkpoint import starting_weights
from tinyflux.run.identity import agree, software
from tinyflux.run.recorded import seen
from tinyflux.run.sources import data_identity, open_run_sources
from tinyflux.shards.schema import EXTRAS
from tinyflux.shards.sources import grids_of, usual_shape
from tinyflux.shards.stream import Stream
from tinyflux.trainer import terms
from tinyflux.trainer.collate import HeldOut, StreamCollate
from tinyflux.trainer.config import RunConfig, TrainerConfig, check_accumulation, fit_model
from tinyflux.trainer.dryrun import check_memory, describe
from tinyflux.trainer.parallel import is_lost_rank, local_device, process_group
from tinyflux.trainer.sampling import Sampler
from tinyflux.trainer.scoreboard import Scoreboard
from tinyflux.trainer.trainer import Trainer
from tinyflux.util import cli
from tinyflux.util.log import say


def start(config: RunConfig, given: set[str]) -> int:
    """Join the other ranks and train. Returns the exit status. given: the keys that the user set.

    Ends the process if another rank is lost, because threads may wait for that rank forever.
    """
    device = local_device()
    with process_group(device, config.parallel.timeout):
        try:
            return run(config, given, device)
        except RuntimeError as error:
            if not is_lost_rank(error):
                raise
            print(
                f"error: rank {dist.get_rank()} lost another rank, which died, hangs or did not answer for"
                f" parallel.timeout = {config.parallel.timeout} s: {str(error).splitlines()[0]}\n"
                "  its own error, if it printed one, is above; run the same command to resume from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            os._exit(cli.FAILED)


def run(config: RunConfig, given: set[str], device: torch.device) -> int:
    """Build the stream, the model and the trainer, and train. Returns the exit status."""
    c, seed = config.trainer, config.data.seed
    agree({**config.to_dict(), "version": software()})
    check_accumulation(config, dist.get_world_size())
    checkpoints = Path(config.run_dir, c.checkpoint_dir)
    groups = (*(term.group for term in terms.enabled(c) if term.group), *EXTRAS)
    sources = open_run_sources(config.data, groups, checkpoints)
    terms.check_groups(c, {group for source in sources for group in source.groups})
    usual = usual_shape(sources)  # the shape of previews
    shapes = {name: f.at(usual).shape for source in sources for name, f in source.fields.items()}
    weights = None
    if c.lora_rank and not c.init_from:
        raise ValueError(f"trainer.lora_rank is {c.lora_rank}: give trainer.init_from, the weights to adapt")
    if c.init_from:
        config.model, weights = starting_weights(c.init_from, checkpoints)
        given = given | {f"model.{key}" for key in config.model.to_dict()}
    config.model = fit_model(config.model, given, shapes)
    collate = StreamCollate(
        c,
        [source.null for source in sources],
        grids_of(sources),
        global_batch_size=config.data.global_batch_size,
        seed=seed,
    )
    stream = Stream(
        sources,
        config.data,
        dist.get_rank(),
        dist.get_world_size(),
        collate,
        device=device,
        ranks_on_node=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        end_step=None if config.dry_run else c.total_steps,
    )
    if config.dry_run:
        say(describe(config, stream, device))
        return cli.DONE
    check_memory(config, stream, device)
    sampler = _sampler(c, shapes["latents"]) if c.sample_every and c.sample_prompts else None
    scoreboard = None
    if c.evaluate_every:
        scoreboard = Scoreboard(
            stream,
            _sampler(c, shapes["latents"]),
            c.evaluation_samples,
            Path(config.run_dir, "evaluations"),
            device,
            seed,
        )
    model, weights = build(config, shapes, weights)
    trainer = Trainer(
        model,
        c,
        device=device,
        parallel_config=config.parallel,
        run_dir=config.run_dir,
        seed=seed,
        weights=weights,
    )
    say(
        f"{model.num_parameters():,} parameters on {trainer.world} x {device.type}, {stream.plan.total:,} samples in"
        f" {len(sources)} sources; the run is in {config.run_dir}: metrics.jsonl, {c.tensorboard_dir}/ (tensorboard"
        f" --logdir {config.run_dir}), {c.checkpoint_dir}/, {c.sample_dir}/"
    )
    with stream:
        trainer.setup(
            stream,
            val_loader=HeldOut(stream, collate, c.validation_samples, device) if config.data.val_fraction else None,
            sampler=sampler,
            identity=data_identity(stream),
            training_config=config.to_dict() | ({"seen": seen(sources)} if trainer.rank == 0 else {}),
            start_over=config.start_over,
            scoreboard=scoreboard,
        )
        return trainer.train()


def build(
    config: RunConfig, shapes: dict[str, tuple[int, ...]], weights: dict[str, Tensor] | None
) -> tuple[TinyFluxDeep, dict[str, Tensor] | None]:
    """The network on the meta device, and its weights: if given, with new ones for the heads that are used in training
    only. Raises ValueError as the terms that make these heads."""
    c, enabled = config.trainer, terms.enabled(config.trainer)
    with torch.device("meta"):
        heads = {term.name: term.training_head(c, config.model, shapes) for term in enabled if term.training_head}
        model = TinyFluxDeep(config.model, heads)
    if weights:
        generator = torch.Generator().manual_seed(config.data.seed)
        for name, p in model.heads.named_parameters(prefix="heads"):
            weights[name] = torch.zeros(p.shape)
            if p.ndim >= 2:
                nn.init.xavier_uniform_(weights[name], generator=generator)
    return model, weights


def _sampler(config: TrainerConfig, latent_shape: tuple[int, int, int]) -> Sampler:
    """A Sampler with the run's settings; its zoo loads models when they are needed, on the CPU."""
    from tinyflux.model.zoo import ModelZoo  # its libraries take seconds to import

    return Sampler(
        ModelZoo(zoo=config.zoo),
        latent_shape=latent_shape,
        steps=config.sample_steps,
        guidance=config.guidance_scale,
        shift=config.shift,
    )
