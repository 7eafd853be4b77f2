"""Time and memory of the teachers' features, ours against the obvious way, on a full-size UNet of SD1.5's shape.

    python tests/bench/precache.py                                    the CPU, one image at two timesteps
    python tests/bench/precache.py --device cuda --dtype float16 --batch 32

The obvious way runs the whole UNet and hooks its mid block for Lune, and keeps every self-attention layer's
probabilities for Sol. All variants take turns in one process; ratios are medians within a turn. Weights are random.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.memory import Memory
from tinyflux.model.teachers import lune_features, sol_statistics


def plain_lune(unet: UNet2DConditionModel, latents: Tensor, context: Tensor, timesteps: Tensor) -> Tensor:
    """The mid block's output, averaged over space, caught by a hook while the whole UNet runs."""
    caught = []
    hook = unet.mid_block.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    unet(latents, timesteps, encoder_hidden_states=context)
    hook.remove()
    return caught[0].float().mean(dim=(2, 3))


class KeepProbabilities:
    """Attention processor that keeps the whole of the layer's attention."""

    def __init__(self, kept: list[Tensor]):
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        q, k, v = (
            attn.head_to_batch_dim(project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )  # [B*H, n, d]
        probs = attn.get_attention_scores(q, k)  # [B*H, n, n]
        self.kept.append(probs.unflatten(0, (-1, attn.heads)))
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(probs @ v)))


def plain_sol(unet: UNet2DConditionModel, latents: Tensor, context: Tensor, timesteps: Tensor) -> Tensor:
    """Sol's statistics and map [B, 3 + 64], from the attention of all layers, kept until the UNet is through."""
    kept: list[Tensor] = []
    before = unet.attn_processors
    keep = KeepProbabilities(kept)
    unet.set_attn_processor({name: keep if ".attn1." in name else old for name, old in before.items()})
    unet(latents, timesteps, encoder_hidden_states=context)
    unet.set_attn_processor(before)
    localities, entropies, maps = [], [], []
    for layer in kept:
        probs = layer.float().mean(dim=1)  # [B, n, n]
        side = math.isqrt(probs.shape[-1])
        axis = torch.arange(side, device=probs.device).float()
        points = torch.cartesian_prod(axis, axis)  # [n, 2]
        distance = (probs * torch.cdist(points, points)).sum(-1).mean(-1)
        localities.append(1 - distance / math.hypot(side - 1, side - 1))
        entropies.append(-(probs.clamp(min=1e-8) * probs.clamp(min=1e-8).log()).sum(-1).mean(-1) / math.log(side**2))
        maps.append(F.interpolate(probs.mean(1).view(-1, 1, side, side), size=(8, 8), mode="bilinear"))
    locality, entropy = torch.stack(localities).mean(0), torch.stack(entropies).mean(0)
    spatial = torch.stack(maps).mean(0).flatten(1)
    stats = torch.stack((locality, entropy, 1 - entropy), dim=1)
    return torch.cat((stats, spatial / spatial.sum(1, keepdim=True)), dim=1)


def our_sol(*inputs) -> Tensor:
    stats, spatial = sol_statistics(*inputs)
    return torch.cat((stats, spatial.flatten(1)), dim=1)


VARIANTS = {"lune": (lune_features, plain_lune), "sol": (our_sol, plain_sol)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--batch", type=int, default=2, help="timesteps that go through a teacher at once")
    parser.add_argument("--side", type=int, default=64, help="latents along each side; 64 is a 512 x 512 image")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--channels", type=int, nargs=4, default=[320, 640, 1280, 1280], help="SD1.5's, or fewer")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()

    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    # the other defaults are SD1.5's
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, block_out_channels=args.channels)
    unet = unet.eval().to(device, dtype)
    latents = torch.randn(args.batch, 4, args.side, args.side, device=device, dtype=dtype)
    context = torch.randn(args.batch, 77, 768, device=device, dtype=dtype)
    inputs = unet, latents, context, torch.linspace(50, 950, args.batch, device=device)

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    count = sum(p.numel() for p in unet.parameters())
    print(f"{where}, torch {torch.__version__}, {args.dtype}, UNet of {count / 1e6:.0f}M, {list(latents.shape)}")
    head = ("ours, s", "plain, s", "times", "ours, MiB", "plain, MiB", "part", "differ")
    print(f"{'':6}" + "".join(f"{title:>12}" for title in head))
    figures = {}
    for name, pair in VARIANTS.items():
        outputs, memory = [], []
        for function in pair:  # warms up, too
            with Memory(device) as used:
                outputs.append(function(*inputs).float())
            memory.append(used.bytes)
        seconds: tuple[list, list] = [], []
        for _ in range(args.turns):
            for function, spent in zip(pair, seconds, strict=True):
                start = time.perf_counter()
                function(*inputs).sum().item()  # waits for the device
                spent.append(time.perf_counter() - start)
        ratio = median(theirs / ours for ours, theirs in zip(*seconds, strict=True))
        differ = (outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()
        ours = {"samples_per_s": args.batch / median(seconds[0]), "times_the_plain_way": ratio}
        figures[name] = ours | {"bytes": memory[0], "plain_bytes": memory[1], "differs_by": differ.item()}
        print(
            f"{name:6}{median(seconds[0]):12.2f}{median(seconds[1]):12.2f}{ratio:12.2f}{memory[0] / 2**20:12.0f}"
            f"{memory[1] / 2**20:12.0f}{memory[0] / memory[1]:12.2f}{differ:12.1e}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
