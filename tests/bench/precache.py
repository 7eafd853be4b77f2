"""Time and memory of the precache, ours against the obvious way, on models of the real sizes with random weights.

    python tests/bench/precache.py                                    the CPU, one image at two timesteps
    python tests/bench/precache.py --device cuda --dtype float16 --batch 32
    python tests/bench/precache.py --whole --batch 1                  an image's whole pass, all timesteps

The obvious way runs the whole UNet and hooks its mid block for Lune, keeps every self-attention layer's probabilities
for Sol, and calls CLIP once for the pooled vector and once for the hidden states. The whole pass is the FLUX VAE, the
SD1.5 VAE, T5, CLIP, Lune and Sol. All variants take turns in one process; ratios are medians within a turn.
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

from tests.bench import flux
from tests.bench.memory import Memory
from tinyflux.model.teachers import lune_features, sol_statistics
from tinyflux.model.zoo import ModelZoo
from tinyflux.precache.extract import Batch, extract_batches, teacher_inputs


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
        maps.append(F.interpolate(probs.sum(1).view(-1, 1, side, side), size=(8, 8), mode="bilinear"))
    locality, entropy = torch.stack(localities).mean(0), torch.stack(entropies).mean(0)
    spatial = torch.stack(maps).mean(0).flatten(1)
    stats = torch.stack((locality, entropy, 1 - entropy), dim=1)
    return torch.cat((stats, spatial / spatial.sum(1, keepdim=True)), dim=1)


def our_sol(*inputs) -> Tensor:
    stats, spatial = sol_statistics(*inputs)
    return torch.cat((stats, spatial.flatten(1)), dim=1)


VARIANTS = {"lune": (lune_features, plain_lune), "sol": (our_sol, plain_sol)}


def random_zoo(unet: UNet2DConditionModel, side: int) -> ModelZoo:
    """Models of the real zoo's sizes; `unet` is both Lune and Sol. side: of the latents."""
    tokenizers = {"t5": flux.t5_tokenizer(), "clip": flux.clip_tokenizer()}
    models = {"vae": flux.flux_vae(), "sd_vae": flux.sd_vae(), "t5": flux.t5(), "clip": flux.clip()}
    models = {name: model.eval().to(unet.device, unet.dtype) for name, model in models.items()}
    return ModelZoo.of(8 * side, 128, tokenizers, lune=unet, sol=unet, **models)


def plain_pass(zoo: ModelZoo, batch: Batch, timesteps_at_once: int) -> dict[str, Tensor]:
    """What `extract_batches` gives of one batch, with the plain teachers."""
    device, dtype = zoo.sol.device, zoo.sol.dtype
    pixels = batch.on(device)
    found = {"latents": zoo.encode_images(pixels), "t5_embeds": zoo.encode_t5(batch.prompts)}
    found |= {"clip_pooled": zoo.encode_clip(batch.prompts)}
    context = zoo.encode_clip_hidden(batch.prompts).to(dtype)
    noised, timesteps = teacher_inputs(zoo.encode_sd(pixels), batch.seeds.to(device))
    for name, function in (("lune", plain_lune), ("sol", plain_sol)):
        rows = []
        for x, seen in zip(noised.to(dtype), context, strict=True):
            for chunk in torch.arange(len(timesteps)).split(timesteps_at_once):
                rows.append(function(zoo.sol, x[chunk], seen.expand(len(chunk), -1, -1), timesteps[chunk]))
        found[name] = torch.cat(rows).unflatten(0, (len(noised), -1))
    found["sol_stats"], found["sol_spatial"] = found.pop("sol").split((3, 64), dim=-1)
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def whole_pass(unet: UNet2DConditionModel, args: argparse.Namespace) -> dict[str, float]:
    """Prints seconds an image, ours and plain, a line a turn, and where ours went; returns the figures."""
    zoo, images = random_zoo(unet, args.side), max(1, args.batch // 10)
    pixels = torch.randint(0, 256, (images, 8 * args.side, 8 * args.side, 3), dtype=torch.uint8)
    batch = Batch(pixels, ["a photograph of a house by the sea"] * images, torch.arange(images))
    ways = (lambda: extract_batches(zoo, [batch], dtype=torch.float32)[0], lambda: plain_pass(zoo, batch, args.batch))
    ratios, ours = [], []
    for turn in range(args.turns):
        seconds, outputs = [], []
        for way in ways:
            start = time.perf_counter()
            outputs.append(way())
            seconds.append((time.perf_counter() - start) / images)
        ratios.append(seconds[1] / seconds[0])
        ours.append(seconds[0])
        differ = max(((outputs[0][n].flatten() - x.flatten()).abs().max() / x.abs().max()).item()
                     for n, x in outputs[1].items())  # fmt: skip
        print(f"whole pass, turn {turn + 1}: ours {seconds[0]:.1f} s an image, plain {seconds[1]:.1f} s, "
              f"{ratios[-1]:.2f} times; differ by {differ:.1e}", flush=True)  # fmt: skip
    shares = {name: spent / args.turns / images for name, spent in zoo.seconds.items()}
    print("of ours: " + ", ".join(f"{name} {spent:.2f} s" for name, spent in shares.items()))
    return {"seconds_per_image": median(ours), "times_the_plain_way": median(ratios)} | shares


def teachers_alone(unet: UNet2DConditionModel, args: argparse.Namespace) -> dict[str, dict]:
    """Prints time and memory of Lune and Sol, a line each; returns the figures."""
    latents = torch.randn(args.batch, 4, args.side, args.side, device=unet.device, dtype=unet.dtype)
    context = torch.randn(args.batch, 77, 768, device=unet.device, dtype=unet.dtype)
    inputs = unet, latents, context, torch.linspace(50, 950, args.batch, device=unet.device)
    head = ("ours, s", "plain, s", "times", "ours, MiB", "plain, MiB", "part", "differ")
    print(f"{'':6}" + "".join(f"{title:>12}" for title in head))
    figures = {}
    for name, pair in VARIANTS.items():
        outputs, memory = [], []
        for function in pair:  # warms up, too
            with Memory(unet.device) as used:
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
    return figures


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--batch", type=int, default=2, help="timesteps that go through a teacher at once")
    parser.add_argument("--side", type=int, default=64, help="latents along each side; 64 is a 512 x 512 image")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--channels", type=int, nargs=4, default=[320, 640, 1280, 1280], help="SD1.5's, or fewer")
    parser.add_argument("--whole", action="store_true", help="an image's whole pass instead of the teachers alone")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()

    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    # the other defaults are SD1.5's
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, block_out_channels=args.channels)
    unet = unet.eval().to(device, dtype)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    count = sum(p.numel() for p in unet.parameters())
    print(f"{where}, torch {torch.__version__}, {args.dtype}, UNet of {count / 1e6:.0f}M, {args.side} x {args.side}")
    figures = (whole_pass if args.whole else teachers_alone)(unet, args)
    if args.json:
        args.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
