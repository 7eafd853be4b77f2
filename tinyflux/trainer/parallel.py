"""One code path for 1 to N ranks: process group, mesh, then activation checkpointing -> compile -> fully_shard."""

import atexit
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from fnmatch import fnmatch
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tinyflux.model.loader import check_place
from tinyflux.trainer.config import ParallelConfig

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NCCL_SETTINGS = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}  # the flight recorder
# most graphs per code object (latent shapes, batch sizes, training and sampling). All checkpointed blocks share one
# code object, torch's `checkpoint`. Beyond torch.compile's default of 8 they would silently run uncompiled
GRAPHS = 64
# ops that selective activation checkpointing keeps: matrix products and attention; the cheap rest is recomputed
SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def local_device() -> torch.device:
    """The device of this rank: its GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device of that name; "cuda" or None is this rank's GPU. Raises ValueError if it cannot be used."""
    if device is None:
        return local_device()
    check_place(device, None)
    device = torch.device(device)
    return local_device() if device.type == "cuda" and device.index is None else device


def join_process_group(device: torch.device, timeout: int = 600) -> None:
    """Join torchrun's process group, or create one with a single rank if torchrun did not start this process.

    CUDA tensors use NCCL; gloo is used for checkpoints and other host-side exchanges. NCCL records its last collectives
    and writes them to a file on a timeout.
    """
    if dist.is_initialized():
        return
    backend, device_id = "gloo", None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend, device_id = "cpu:gloo,cuda:nccl", device  # connects at once, and to the right GPU
        for variable, value in NCCL_SETTINGS.items():
            os.environ.setdefault(variable, value)
    if "RANK" in os.environ:
        patience = timedelta(seconds=timeout)
        store, rank, world = next(rendezvous("env://", timeout=patience))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torch 2.13: when torchrun restarts its ranks, it keeps the store with the addresses of the dead ranks. On
            # several nodes the restart counts may differ per node; there launch/torchrun.py uses a new store
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=patience, device_id=device_id
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device_id)
        atexit.register(_leave)  # all trainers of a notebook, and their models after training, share one group


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def process_group(device: torch.device, timeout: int = 600) -> Iterator[None]:
    """`join_process_group` for a `with` block. After an error NCCL's collectives are aborted, because destroying the
    group would wait for ranks that wait for this one."""
    join_process_group(device, timeout)
    try:
        yield
    except BaseException:
        if device.type == "cuda":
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or does not answer."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def make_mesh(device: torch.device, shard_size: int = 0) -> DeviceMesh:
    """The mesh that the model is sharded over: one axis, or two (replicate, shard) for HSDP."""
    world = dist.get_world_size()
    size = shard_size or world
    if world % size:
        raise ValueError(f"parallel.shard_size is {size}: it must divide the {world} ranks")
    if size == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Turn off the gradients of matching modules and parameters. Raises ValueError if a pattern matches none."""
    for pattern in patterns:
        matching = [
            p for name, p in model.named_parameters() if any(fnmatch(name, x) for x in (pattern, f"{pattern}.*"))
        ]
        if not matching:
            names = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"trainer.freeze: {pattern!r} matches no parameter. The parts are {names}")
        for p in matching:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("trainer.freeze leaves nothing to train")


def _save_products(_context, op, *_args, **_kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def prepare_block(block: nn.Module, gradient_checkpointing: str = "none", compile_mode: str | None = None) -> None:
    """Apply activation checkpointing, then compilation, to a block, in place.

    The forward is wrapped, not the module, so that parameter names do not change.
    """
    if gradient_checkpointing != "none":
        # all random draws are passed in, so no generator state has to be restored
        how = {"use_reentrant": False, "preserve_rng_state": False}
        if gradient_checkpointing == "selective":
            how["context_fn"] = partial(create_selective_checkpoint_contexts, _save_products)
        block.forward = partial(checkpoint, block.forward, **how)
    if compile_mode is not None:
        torch._dynamo.config.recompile_limit = GRAPHS
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        block.forward = torch.compile(block.forward, mode=compile_mode)


def distribute(
    model: nn.Module,
    device: torch.device,
    config: ParallelConfig,
    *,
    dtype: str = "float32",
    gradient_checkpointing: str = "none",
    compile_mode: str | None = None,
) -> None:
    """Shard a TinyFluxDeep over all ranks, in place; blocks are gathered, used and freed one by one.

    A model on the meta device gets memory but no values: call `init_weights` or load a checkpoint. Parameters are
    float32; with `dtype="bfloat16"` they are gathered and used in bfloat16, and gradients are reduced in float32.
    """
    mesh = make_mesh(device, config.shard_size)
    # the warning is for callers that change the network's output in place, which we never do
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # the caller casts inputs, because FSDP would round timesteps and rotary tables to bfloat16 too
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[dtype], reduce_dtype=torch.float32, cast_forward_inputs=False)
    meta = any(p.is_meta for p in model.parameters())
    if not meta:
        model.to(device=device, dtype=torch.float32)
    blocks = [*model.double_blocks, *model.single_blocks]
    for block in blocks:
        prepare_block(block, gradient_checkpointing, compile_mode)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    # the root's weights are used last in the forward and first in the backward: keep them gathered in between
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for block, following in pairwise([model, *blocks]):
        block.set_modules_to_forward_prefetch([following])
    if meta:
        model.to_empty(device=device)


def load_full(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load an unsharded state dict on rank 0 into a sharded model; other ranks pass {}. Must be called on all ranks."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(model, state, options=options)


def local_gradients(model: nn.Module) -> list[Tensor]:
    """This rank's gradient shards as plain tensors, because DTensor's dispatch of long lists takes longer than the
    arithmetic."""
    return [p.grad._local_tensor for p in model.parameters() if p.grad is not None]


@torch.no_grad()
def squared_norm(model: nn.Module, gradients: list[Tensor]) -> Tensor:
    """This rank's part of the squared norm of the whole gradient, 0-d. The sum over all ranks is the squared norm."""
    mesh = next(model.parameters()).device_mesh
    replicas = dist.get_world_size() // mesh.size(mesh.ndim - 1)  # replicas hold the same shards
    return torch.stack(torch._foreach_norm(gradients)).square().sum() / replicas


@torch.no_grad()
def scale(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients of this norm down to `max_norm`; 0 does nothing."""
    if max_norm:
        torch._foreach_mul_(gradients, (max_norm / (norm.squeeze() + 1e-6)).clamp(max=1))


def set_last_micro_batch(model: nn.Module, last: bool, *, keep_gathered: bool) -> None:
    """Tell whether the next backward is a step's last. Gradients are reduced only then, and weights that stay gathered
    (`keep_gathered`) are freed."""
    model.set_requires_gradient_sync(last)
    if keep_gathered:
        model.set_reshard_after_backward(last)
