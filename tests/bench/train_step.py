"""Time of a training step (forward, loss, backward, AdamW), ours against the plain reference, on any device.

    python tests/bench/train_step.py                                     the demo's network, on the CPU
    python tests/bench/train_step.py --device cuda --dtype bfloat16      the full one, 64x64 latents
    python tests/bench/train_step.py --size short --variants ours-eager baseline-eager --batch 2

Steps of all variants take turns, so that other load on the machine slows all of them alike; with one CPU thread
(OMP_NUM_THREADS=1) the process's CPU time is measured, which other load hardly affects. Columns: samples/s of the
median and of the fastest step, the latter's TFLOP/s and MFU (of the model's operations, without recomputation),
memory of a step above that before it, and the speed-up over the eager and the compiled baseline (medians of the ratios
within a turn).
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.memory import Memory
from tests.reference_model import ReferenceTinyFlux
from tinyflux.model.loader import from_published
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep, flops_per_sample
from tinyflux.trainer.parallel import prepare_block
from tinyflux.util.devices import PEAK

# name: (network, compiled, activation checkpointing)
VARIANTS = {
    "baseline-eager": ("baseline", False, "none"),
    "baseline-compiled": ("baseline", True, "none"),
    "ours-eager": ("ours", False, "none"),
    "ours-eager-selective": ("ours", False, "selective"),
    "ours-eager-full": ("ours", False, "full"),
    "ours-compiled": ("ours", True, "none"),
    "ours-compiled-selective": ("ours", True, "selective"),
    "ours-compiled-full": ("ours", True, "full"),
}
# name: network, and the batch's shape
SIZES = {
    "demo": (
        TinyFluxConfig(
            hidden_size=128,
            attention_head_dim=32,
            joint_attention_dim=128,
            pooled_projection_dim=128,
            num_double_layers=2,
            num_single_layers=4,
            axes_dims_rope=(8, 12, 12),
            lune_expert_dim=128,
            lune_hidden_dim=128,
            sol_hidden_dim=64,
        ),
        {"grid": 8, "text": 32, "batch": 16},
    ),
    "short": (TinyFluxConfig(num_double_layers=2, num_single_layers=3), {"grid": 16, "text": 32, "batch": 4}),
    "deep": (TinyFluxConfig(), {"grid": 64, "text": 128, "batch": 16}),
}


class Runner:
    """One variant: its own copy of the weights, and a timed step."""

    def __init__(self, name: str, source: ReferenceTinyFlux, batch: dict, target: torch.Tensor):
        network, compiled, ac = VARIANTS[name]
        self.name, self.batch, self.target = name, batch, target
        if network == "ours":
            self.model = TinyFluxDeep(source.config)
            self.model.load_state_dict(from_published(source.state_dict(), source.config))
            self.model.to(target.device, target.dtype)
        else:
            self.model = copy.deepcopy(source)
        for block in (*self.model.double_blocks, *self.model.single_blocks):
            prepare_block(block, ac, "default" if compiled else None)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.seconds, self.memory = [], 0
        alone = target.device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.process_time if alone else time.perf_counter

    def step(self) -> float:
        start = self.clock()
        out = self.model(**self.batch)
        loss = F.mse_loss((out[0] if isinstance(out, tuple) else out).float(), self.target.float())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = loss.item()  # waits for the device
        self.seconds.append(self.clock() - start)
        return value

    def warm_up(self, steps: int) -> None:
        losses = [self.step() for _ in range(steps)]
        with Memory(self.target.device) as memory:
            self.step()
        self.memory, self.seconds = memory.bytes, []
        print(f"{self.name}: first loss {losses[0]:.5f}", flush=True)


def network(args) -> ReferenceTinyFlux:
    """The reference with its random initial weights, few of them zero: all of the backward has work."""
    torch.manual_seed(0)
    model = ReferenceTinyFlux(SIZES[args.size][0], F.scaled_dot_product_attention)
    return model.to(args.device, getattr(torch, args.dtype))


def inputs(args, config: TinyFluxConfig) -> tuple[dict, torch.Tensor]:
    B, tokens = args.batch, args.grid**2
    like = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    batch = {
        "hidden_states": torch.randn(B, tokens, config.in_channels, **like),
        "encoder_hidden_states": torch.randn(B, args.text, config.joint_attention_dim, **like),
        "pooled_projections": torch.randn(B, config.pooled_projection_dim, **like),
        "timestep": torch.rand(B, device=args.device),
        "img_ids": TinyFluxDeep.create_img_ids(1, args.grid, args.grid, args.device)[0],
        "lune_features": torch.randn(B, config.lune_expert_dim, **like),
        "sol_stats": torch.rand(B, 3, **like),
        "sol_spatial": torch.rand(B, config.sol_spatial_size, config.sol_spatial_size, **like),
        "lune_dropout_mask": torch.ones(B, config.lune_hidden_dim, **like),
    }
    return batch, torch.randn(B, tokens, config.in_channels, **like)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--size", choices=SIZES, help="default: demo on the CPU, deep elsewhere")
    parser.add_argument("--grid", type=int, help="latents along each side")
    parser.add_argument("--text", type=int, help="text tokens")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--turns", type=int, default=20, help="timed steps of each variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    args.size = args.size or ("demo" if args.device == "cpu" else "deep")
    for name, value in SIZES[args.size][1].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    args = parse()
    cuda = args.device != "cpu"
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    source = network(args)
    config = source.config
    batch, target = inputs(args, config)
    runners = {name: Runner(name, source, batch, target) for name in args.variants}
    figures: dict[str, dict] = {}
    for name, runner in list(runners.items()):
        try:
            runner.warm_up(3)
        except RuntimeError as error:  # such as too little memory, or no compiler: the others are measured
            figures[name] = {"error": (str(error).strip() or repr(error)).splitlines()[0]}
            print(f"{name}: {figures[name]['error']}", flush=True)
            del runners[name]
    if not runners:
        sys.exit("no variant could take a step")
    for _ in range(args.turns):
        for runner in runners.values():
            runner.step()

    flops = 3 * args.batch * flops_per_sample(config, args.grid**2, args.text)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    peak = next((value for key, value in PEAK.items() if key in name), None) if args.dtype == "bfloat16" else None
    print(
        f"\n{name}, torch {torch.__version__}, {args.dtype}, {args.size}: {config.num_double_layers} double and "
        f"{config.num_single_layers} single blocks of width {config.hidden_size}, {args.batch} samples of "
        f"{args.grid}x{args.grid} latents and {args.text} text tokens, {flops / 1e12:.3f} TFLOP a step"
    )
    head = ("samples/s", "fastest", "TFLOP/s", "MFU %", "MiB", "x eager", "x compiled")
    print(f"{'':24}" + "".join(f"{title:>12}" for title in head))
    for runner in runners.values():
        best = min(runner.seconds)
        figures[runner.name] = {
            "samples_per_s": args.batch / median(runner.seconds),
            "mfu": flops / best / peak if peak else None,
            "bytes_per_sample": runner.memory / args.batch,
            "batch": args.batch,
        }
        cells = [f"{args.batch / median(runner.seconds):.2f}", f"{args.batch / best:.2f}", f"{flops / best / 1e12:.3f}"]
        cells += [f"{100 * flops / best / peak:.1f}" if peak else "-", f"{runner.memory / 2**20:.0f}"]
        for baseline in ("baseline-eager", "baseline-compiled"):
            turns = zip(runners[baseline].seconds, runner.seconds, strict=True) if baseline in runners else ()
            ratios = [theirs / ours for theirs, ours in turns]
            if ratios and baseline != runner.name:
                figures[runner.name][f"times_{baseline}"] = median(ratios)
            cells.append(f"{median(ratios):.2f}" if ratios else "-")
        print(f"{runner.name:24}" + "".join(f"{cell:>12}" for cell in cells))
    if args.json:
        args.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
