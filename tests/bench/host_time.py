"""A training step's cost on the host, besides the arithmetic: the time of its parts, launched operations, collectives,
and reads that wait for the device.

    OMP_NUM_THREADS=1 python tests/bench/host_time.py            the full depth, 15 + 25 blocks, as narrow as can be

The network is so narrow that nearly all CPU time is spent in Python and dispatch, as on a GPU's host. A read is `item`,
`tolist`, `float`, `bool`, ... of a tensor in the code of a step: on a GPU each waits for all launched work, except for
the one list of numbers that was copied to pinned memory in the previous step. A wait is a dispatched operation, also in
the backward, whose result's size depends on values.
"""

import argparse
import collections
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.reads import Reads
from tests.training import FITTED, TINY, make_source
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.trainer.cache_experts import DatasetCache
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.data import CachedDataset, collate_fn
from tinyflux.trainer.trainer import Trainer
from tinyflux.util import cli

NARROW = TINY | FITTED | {"num_double_layers": 15, "num_single_layers": 25}


class Timed:
    """A callable whose calls are timed."""

    def __init__(self, call):
        self.call, self.seconds = call, []

    def __call__(self, *args, **kwargs):
        began = time.thread_time()
        result = self.call(*args, **kwargs)
        self.seconds.append(time.thread_time() - began)
        return result


def trainer_of(folder: Path, steps: int, accumulation: int) -> Trainer:
    torch.manual_seed(0)
    cache = DatasetCache.load(make_source(folder / "source", 1, samples=16))
    loader = DataLoader(CachedDataset(cache), 2, collate_fn=collate_fn, shuffle=True)
    config = TrainerConfig(
        total_steps=steps,
        gradient_accumulation=accumulation,
        dtype="float32",
        log_every=10**6,
        save_every_steps=0,
        save_every_epochs=0,
    )
    trainer = Trainer(TinyFluxDeep(TinyFluxConfig(**NARROW)), config, device="cpu", run_dir=folder / "run")
    trainer.setup(loader, cache)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    begun, profiled, reads = [], {}, Reads()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(Path(folder), args.steps, args.accumulation)
        trainer.optimizer.step = optimizer = Timed(trainer.optimizer.step)
        trainer.ema.update = ema = Timed(trainer.ema.update)
        plain, at = trainer.train_step, args.steps * 2 // 3  # the later steps are profiled

        def step(batches):
            begun.append(time.thread_time())
            number = len(begun)
            if number == at:
                profiled["profile"] = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
                profiled["profile"].__enter__()
            if number == at + 3:
                profiled["profile"].__exit__(None, None, None)
            if not at + 3 <= number < at + 6:
                return plain(batches)
            ready = iter([next(batches) for _ in range(args.accumulation)])  # what the loader reads is on the host
            with reads.counted():
                return plain(ready)

        trainer.train_step = step
        assert trainer.train() == 0
    seconds = [b - a for a, b in zip(begun, begun[1:], strict=False)][3 : at - 2]
    events = collections.Counter(event.name for event in profiled["profile"].events())
    names = ("c10d::allreduce_", "c10d::_allgather_base_", "c10d::_reduce_scatter_base_")
    top = sum(1 for e in profiled["profile"].events() if e.name.startswith("aten::") and e.cpu_parent is None)
    print(f"torch {torch.__version__}, {args.accumulation} micro-batches a step")
    figures = {
        "step_ms": median(seconds) * 1e3,
        "optimizer_ms": median(optimizer.seconds[3:at]) * 1e3,
        "average_of_the_weights_ms": median(ema.seconds[3:at]) * 1e3,
        "operations": top / 3,
        **{name: events[name] / 3 for name in names},
        "reads": sum(reads.reads.values()) / 3,
        "waits": sum(reads.waits.values()) / 3,
    }
    print(cli.table([*figures.items()]))
    print(f"reads and waits in 3 steps: {dict(reads.reads)} {dict(reads.waits)}")
    if args.json:
        args.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
