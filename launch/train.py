"""Train TinyFlux on precached shards.

    torchrun --nproc_per_node 8 launch/train.py --config deep-8gpu --run-dir runs/mine \\
        --data.sources data/portraits data/imagenet --data.weights 0.7 0.3
    ./torchrun.sh launch/train.py --config FILE.toml --run-dir DIR       (arguments of torchrun from the SLURM job)
    python launch/train.py --config FILE.toml --run-dir DIR              (one device)
    ... --dry-run                                                        (sizes, memory, data speed; starts nothing)

Every key of a config file is an option too, such as --trainer.total-steps 300. The same command resumes the run.
Exit status: 0 finished, 75 saved and stopped by a signal (run it again), 1 or 2 an error.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tinyflux.model.model import TinyFluxDeep
from tinyflux.run.checkpoint import starting_weights
from tinyflux.shards.stream import Stream
from tinyflux.trainer.config import RunConfig, fit_model, load_config
from tinyflux.trainer.data import HeldOut, StreamCollate, data_identity, open_run_sources
from tinyflux.trainer.dryrun import describe
from tinyflux.trainer.parallel import is_lost_rank, local_device, process_group
from tinyflux.trainer.sampling import Sampler
from tinyflux.trainer.trainer import Trainer
from tinyflux.util.log import say


def run(config: RunConfig, given: set[str], device: torch.device) -> int:
    """Build the stream, the model and the trainer, and train. Returns the exit status."""
    c, seed = config.trainer, config.data.seed
    groups = [name for name, on in (("lune", c.enable_lune), ("sol", c.enable_sol)) if on]
    sources = open_run_sources(config.data, tuple(groups), Path(config.run_dir, c.checkpoint_dir))
    shapes = {name: field.shape for source in sources for name, field in source.manifest.fields.items()}
    weights = None
    if c.init_from:
        root = Path(config.run_dir, c.checkpoint_dir)
        config.model, weights = starting_weights(c.init_from, root)
        given = given | {f"model.{key}" for key in config.model.to_dict()}
    config.model = fit_model(config.model, given, shapes)
    options = {"global_batch_size": config.data.global_batch_size, "seed": seed}
    collate = StreamCollate(c, [s.null for s in sources], buckets=sources[0].manifest.buckets, **options)
    on_node = {"device": device, "ranks_on_node": int(os.environ.get("LOCAL_WORLD_SIZE", 1))}
    on_node |= {"end_step": None if config.dry_run else c.total_steps}
    stream = Stream(sources, config.data, dist.get_rank(), dist.get_world_size(), collate, **on_node)
    sampler = None
    if c.sample_every and c.sample_prompts:
        from tinyflux.model.zoo import ModelZoo  # its libraries take seconds to import

        options = {"steps": c.sample_steps, "guidance": c.guidance_scale, "shift": c.shift}
        sampler = Sampler(ModelZoo(zoo=c.zoo), latent_shape=shapes["latents"], **options)
    if config.dry_run:
        say(describe(config, stream, device))
        return 0
    with torch.device("meta"):
        model = TinyFluxDeep(config.model)
    options = {"parallel_config": config.parallel, "run_dir": config.run_dir, "seed": seed, "weights": weights}
    trainer = Trainer(model, c, device=device, **options)
    say(f"{model.num_parameters():,} parameters on {trainer.world} x {device.type}, {stream.plan.total:,} samples in")
    say(f"{len(sources)} sources; the run is in {config.run_dir}: metrics.jsonl, {c.tensorboard_dir}/ (tensorboard")
    say(f"--logdir {config.run_dir}), {c.checkpoint_dir}/, {c.sample_dir}/")
    with stream:
        trainer.setup(
            stream,
            val_loader=HeldOut(stream, collate, c.validation_samples) if config.data.val_fraction else None,
            sampler=sampler,
            identity=data_identity(stream),
            training_config=config.to_dict(),
        )
        return trainer.train()


def main(argv: list[str]) -> int:
    """Parse, run, and turn what a user can put right into one line."""
    try:
        config, given = load_config(argv, Path(__file__).parent / "configs", __doc__)
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
                    "  its own error, if it told one, is above; the same command goes on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)  # threads may wait for that rank too, which would keep this process
    except (ValueError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
