"""Time of a training step that starts a save, against the other steps of the same run, on any device.

    python tests/bench/save_step.py                                one rank, 34M parameters, 0.5 GB of state
    torchrun --nproc_per_node 8 tests/bench/save_step.py --blocks 15 25 --grid 64 --batch 16 --dtype bfloat16

A step is timed from its start to the next step's start, so everything that a save does in the training thread counts.
The time that the writing thread takes from later steps, if it has no core of its own, is shown too.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from launch.train import main as train
from tests import training
from tinyflux.trainer.trainer import Trainer

begun: list[float] = []


def timed_step(trainer: Trainer, batches, step=Trainer.train_step) -> dict:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    begun.append(time.perf_counter())
    return step(trainer, batches)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs=2, default=[2, 3], help="double and single blocks")
    parser.add_argument("--grid", type=int, default=16, help="latents along each side")
    parser.add_argument("--batch", type=int, default=4, help="samples of a rank in a step")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--every", type=int, default=8, help="steps from save to save")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    return parser.parse_args()


def main() -> None:
    args, world, rank = parse(), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    folder = Path(tempfile.gettempdir(), f"save_step-{os.getppid() if world > 1 else os.getpid()}")
    if rank == 0:
        shape = {"shapes": ((args.grid, args.grid),), "channels": 16}
        training.make_source(folder / "making" / "source", 1, **shape, t5_width=256, clip_width=256, lune_width=256)
        (folder / "making").rename(folder / "sources")
    while not (folder / "sources").exists():
        time.sleep(0.1)
    Trainer.train_step = timed_step
    steps = args.every * args.saves + 2
    options = {
        "run-dir": folder / "run",
        "model.num-double-layers": args.blocks[0],
        "model.num-single-layers": args.blocks[1],
        "data.sources": folder / "sources" / "source",
        "data.global-batch-size": args.batch * world,
        "data.micro-batch-size": args.batch,
        "trainer.dtype": args.dtype,
        "trainer.total-steps": steps,
        "trainer.log-every": steps,
        "trainer.save-every-steps": args.every,
        "trainer.save-every-epochs": 0,
        "trainer.save-every-minutes": 0,
        "trainer.keep-last-n-steps": 1,
    }
    status = train([str(x) for key, value in options.items() for x in ("--" + key, value)])
    if rank or status:
        sys.exit(status)
    size = sum(path.stat().st_size for path in folder.glob("run/checkpoints/step_*/*.distcp"))
    shutil.rmtree(folder)
    seconds = [b - a for a, b in zip(begun, begun[1:], strict=False)]
    by_place = {  # place in the interval, 0 the step that saves, without the first interval
        place: [seconds[i] for i in range(args.every, len(seconds)) if (i + 1) % args.every == place]
        for place in range(args.every)
    }
    plain = [s for place, several in by_place.items() if place > args.every // 2 for s in several]
    print(f"\n{world} ranks, torch {torch.__version__}, {size / 1e9:.2f} GB of state in a checkpoint")
    print(f"plain step    {median(plain):.3f} s, median of {len(plain)}; slowest {max(plain):.3f} s")
    figures = {"state_gb": size / 1e9, "plain_s": median(plain), "saving_s": median(by_place[0])}
    figures |= {"after_saving_s": median(by_place[1]), "times_plain": median(by_place[0]) / median(plain)}
    if args.json:
        args.json.write_text(json.dumps(figures))
    for place, name in ((0, "saving step"), (1, "the one after"), (2, "the second")):
        ratio = median(by_place[place]) / median(plain)
        print(f"{name:14}{median(by_place[place]):.3f} s, {ratio:.2f} times a plain one")


if __name__ == "__main__":
    main()
