"""The dry run: config, sizes, memory, the first batch, and whether data loading keeps up with training."""

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from tinyflux.model.lora import attach
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep, flops_per_sample
from tinyflux.shards.stream import Stream
from tinyflux.trainer.config import RunConfig
from tinyflux.trainer.optim.registry import OPTIMIZERS
from tinyflux.trainer.parallel import DTYPES, freeze
from tinyflux.util import devices

EXPECTED_MFU = 0.4  # of a GPU with a known peak
COMPILED = 0.7  # least activation memory of compiled or selectively checkpointed blocks, relative to plain ones
MOST_KEPT = 100  # upper bound of the values per token and hidden unit that autograd keeps of a block
SECONDS = 3.0  # time to measure the data speed


def activation_bytes(
    config: TinyFluxConfig, B: int, grid: tuple[int, int], text_tokens: int, dtype: torch.dtype
) -> int:
    """Bytes that autograd keeps for the backward of a micro-batch, counted with fake tensors."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    # fake CPU tensors, because on the meta device attention would keep its whole matrix
    with FakeTensorMode():
        model = TinyFluxDeep(config)
        for module in model.modules():  # Module.to cannot swap fake tensors
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(p.to(dtype)))
        image = torch.empty(B, grid[0] * grid[1], config.in_channels)
        text = torch.empty(B, text_tokens, config.joint_attention_dim), torch.empty(B, config.pooled_projection_dim)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(image, *text, torch.empty(B), TinyFluxDeep.create_img_ids(1, *grid)[0])
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        return sum(storage.nbytes() for at, storage in kept.items() if at not in weights)


def network(config: RunConfig) -> TinyFluxDeep:
    """The network that a run trains, on the meta device."""
    with torch.device("meta"):
        model = TinyFluxDeep(config.model)
    c = config.trainer
    if c.lora_rank:
        attach(model, c.lora_rank, c.lora_alpha, c.lora_targets)
    freeze(model, c.freeze)
    return model


def memory(
    config: RunConfig, grid: tuple[int, int], text_tokens: int, world: int, rough: bool = False
) -> dict[str, float]:
    """Estimated GiB on each device: sharded `state` (weights, gradients, optimizer, EMA), `gathered` blocks,
    `activations` of a micro-batch. rough: an upper bound, without running the network."""
    model = network(config)
    blocks = [sum(p.numel() for p in b.parameters()) for b in (*model.double_blocks, *model.single_blocks)]
    total, trained = model.num_parameters(), model.num_parameters(trainable_only=True)
    dtype = DTYPES[config.trainer.dtype]
    # weights and EMA of all parameters; gradients and the optimizer's moments of the trained ones
    moments = OPTIMIZERS[config.trainer.optimizer].state_bytes
    state = (8 * total + (4 + moments) * trained) / (config.parallel.shard_size or world)
    # parameters outside the blocks stay gathered; of the blocks, two at a time or all
    gathered = (
        total - sum(blocks) + (2 * max(blocks, default=0) if config.parallel.reshard_after_forward else sum(blocks))
    )
    B, tokens = config.data.micro_batch_size, grid[0] * grid[1] + text_tokens
    of_block = B * tokens * config.model.hidden_size * dtype.itemsize  # its input
    if rough:
        activations = MOST_KEPT * len(blocks) * of_block
    else:
        activations = activation_bytes(config.model, B, grid, text_tokens, dtype)
    if config.trainer.gradient_checkpointing == "full":  # the input of each block, and one block's activations
        activations = len(blocks) * of_block + activations / len(blocks)
    parts = {"state": state, "gathered": gathered * dtype.itemsize, "activations": activations}
    return {name: value / 2**30 for name, value in parts.items()}


def largest(stream: Stream) -> tuple[int, int]:
    """The latent shape with the most tokens in the sources."""
    return max((shape for source in stream.sources for shape in source.shapes), key=lambda shape: shape[0] * shape[1])


def available(device: torch.device) -> float:
    """GiB of memory that a rank can use: its GPU's, or its share of the machine's free memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / 2**30
    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(free.split()[1]) / 2**20 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_memory(config: RunConfig, stream: Stream, device: torch.device) -> None:
    """Raises ValueError if a micro-batch does not fit the device by the estimate of `memory`; names a size that fits.

    The estimate is for blocks without compilation; compiled blocks keep about a third less, so their activations count
    COMPILED times.
    """
    c, shape, tokens = config.trainer, largest(stream), stream.fields["t5_embeds"].shape[0]
    if sum(memory(config, shape, tokens, dist.get_world_size(), rough=True).values()) <= available(device):
        return
    parts = memory(config, shape, tokens, dist.get_world_size())
    if c.compile_mode is not None or c.gradient_checkpointing == "selective":
        parts["activations"] *= COMPILED
    fixed, room, B = parts["state"] + parts["gathered"], available(device), config.data.micro_batch_size
    if fixed + parts["activations"] <= room:
        return
    most = int(max(0.0, room - fixed) / parts["activations"] * B)
    fits = max((n for n in range(1, most + 1) if B % n == 0), default=0)  # a divisor suits everything that B suits
    what = f"data.micro_batch_size = {fits} would fit" if fits else "not even 1 would fit: shard over more ranks"
    raise ValueError(
        f"data.micro_batch_size is {B}: with latents of {shape[0]} x {shape[1]} it needs about"
        f" {fixed + parts['activations']:.1f} GiB on each device, which has {room:.1f}; {what}, and"
        " trainer.gradient_checkpointing = selective or full needs less"
    )


def measure(stream: Stream) -> tuple[dict, float, float]:
    """The first batch, and the samples and megabytes of tensors per second that this rank's stream delivers."""
    first, samples, size, started = None, 0, 0, time.perf_counter()
    for batch in stream:
        if first is None:
            first, started = batch, time.perf_counter()  # do not count the stream's start
            continue
        samples += len(batch["keys"])
        size += sum(x.nbytes for x in batch.values() if isinstance(x, torch.Tensor))
        if time.perf_counter() - started > SECONDS:
            break
    seconds = time.perf_counter() - started
    return first, samples / seconds, size / seconds / 1e6


def describe(config: RunConfig, stream: Stream, device: torch.device) -> str:
    """The text of a dry run. Reads the first batches of this rank; does not train or write anything."""
    world, (height, width) = dist.get_world_size(), largest(stream)
    text_tokens = stream.fields["t5_embeds"].shape[0]
    model = network(config)
    parts = memory(config, (height, width), text_tokens, world)
    first, rate, megabytes = measure(stream)
    peak, dtype = devices.peak_flops(device), DTYPES[config.trainer.dtype]
    speed = EXPECTED_MFU * peak if peak else devices.measured_flops(device, dtype)
    basis = f"{EXPECTED_MFU:.0%} of its peak" if peak else "the rate of a matrix product here"
    needed = speed / (3 * flops_per_sample(config.model, height * width, text_tokens))
    sources = ", ".join(f"{s.name} {s.manifest.count:,}" for s in stream.sources)
    G, B = config.data.global_batch_size, config.data.micro_batch_size
    estimate = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
    if config.trainer.gradient_checkpointing == "selective":
        estimate += " (without checkpointing: an upper bound)"
    verdict = "fast enough" if rate > needed else "THE DATA ARE TOO SLOW: raise data.threads, use faster storage"
    rows = {
        "parameters": f"{model.num_parameters():,}, {model.num_parameters(trainable_only=True):,} of them trained",
        "devices": f"{world} x {device.type}",
        "memory of each": f"{sum(parts.values()):.2f} GiB: {estimate}",
        "sources": f"{sources}; {stream.plan.total:,} samples to train on, {stream.plan.total / G:.1f} steps per epoch",
        "a step": f"{G} samples, {stream.accumulation} micro-batches of {B} on each rank",
        "data": f"{rate:.0f} samples/s, {megabytes:.1f} MB/s on this rank",
        "needed": f"{needed:.0f} samples/s, {needed * megabytes / rate:.1f} MB/s, at {basis}: {verdict}",
        "first batch": " ".join(first["keys"]),
    }
    table = [f"{name:16}{text}" for name, text in rows.items()]
    return "\n".join([json.dumps(config.to_dict(), indent=2), *table])
