"""One path for 1 to N ranks: process group, mesh, then activation checkpointing -> compile -> fully_shard."""

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
# most graphs, for latent shapes, batch sizes, training and sampling. Checkpointed blocks of both kinds count together,
# for their code is torch's `checkpoint`. After torch.compile's own 8 they would run uncompiled, in silence
GRAPHS = 64
# what selective activation checkpointing keeps: matrix products and attention; the cheap rest is computed again
SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def local_device() -> torch.device:
    """The device of this rank: its GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device of that name; "cuda" alone, or None, is this rank's. ValueError where it cannot be used."""
    if device is None:
        return local_device()
    check_place(device, None)
    device = torch.device(device)
    return local_device() if device.type == "cuda" and device.index is None else device


def join_process_group(device: torch.device, timeout: int = 600) -> None:
    """Join torchrun's process group, or make one of a single rank where torchrun did not start this process.

    CUDA tensors go through NCCL; gloo is there too, for checkpoints and other host-side exchanges. NCCL keeps a record
    of its last collectives and writes it to a file when one is not joined in time.
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
            # torch 2.13: torchrun that starts its ranks again keeps the store, with the dead ones' addresses in it.
            # On several nodes it may count its restarts differently on each: launch/torchrun.py has a new store then
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=patience, device_id=device_id
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device_id)
        atexit.register(_leave)  # one group serves all trainers of a notebook, and their models after training


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def process_group(device: torch.device, timeout: int = 600) -> Iterator[None]:
    """`join_process_group` for the length of a `with` block. After an error NCCL's collectives are aborted: to destroy
    the group would wait for ranks that wait for this one."""
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
    """Turn off the gradients of the modules and parameters that match. Raises ValueError where nothing does."""
    for pattern in patterns:
        matching = [
            p for name, p in model.named_parameters() if any(fnmatch(name, x) for x in (pattern, f"{pattern}.*"))
        ]
        if not matching:
            names = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"trainer.freeze: {pattern!r} names no parameter. The parts are {names}")
        for p in matching:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("trainer.freeze leaves nothing to train")


def _save_products(_context, op, *_args, **_kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def prepare_block(block: nn.Module, gradient_checkpointing: str = "none", compile_mode: str | None = None) -> None:
    """Activation checkpointing, then compilation, of a block, in place.

    The forward is wrapped, not the module, so that parameter names stay as they are.
    """
    if gradient_checkpointing != "none":
        # every random draw of the network is handed in, so no generator state needs restoring
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
    """Shard a TinyFluxDeep over all ranks, in place; each block is gathered, used and freed by itself.

    A model on the meta device gets memory, not values: `init_weights` or a checkpoint fills it. Parameters are float32;
    with `dtype="bfloat16"` they are gathered and used in bfloat16, and gradients are reduced in float32.
    """
    mesh = make_mesh(device, config.shard_size)
    # a warning for callers who change the network's output in place: ours never do
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # inputs are cast by the caller: FSDP would round timesteps and rotary tables to bfloat16 too
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[dtype], reduce_dtype=torch.float32, cast_forward_inputs=False)
    meta = any(p.is_meta for p in model.parameters())
    if not meta:
        model.to(device=device, dtype=torch.float32)
    blocks = [*model.double_blocks, *model.single_blocks]
    for block in blocks:
        prepare_block(block, gradient_checkpointing, compile_mode)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    # the root's weights are used last in the forward and first in the backward: freed between, they are gathered twice
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for block, following in pairwise([model, *blocks]):
        block.set_modules_to_forward_prefetch([following])
    if meta:
        model.to_empty(device=device)


def load_full(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Fill a sharded model from the unsharded state dict that rank 0 has; other ranks pass {}. Must be
    called on all ranks."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(model, state, options=options)


def local_gradients(model: nn.Module) -> list[Tensor]:
    """This rank's shards of the gradients. Plain tensors: DTensor's dispatch of long lists takes longer than the
    arithmetic."""
    return [p.grad._local_tensor for p in model.parameters() if p.grad is not None]


@torch.no_grad()
def squared_norm(model: nn.Module, gradients: list[Tensor]) -> Tensor:
    """This rank's part of the squared norm of the whole gradient, 0-d: those of all ranks add up to it."""
    mesh = next(model.parameters()).device_mesh
    replicas = dist.get_world_size() // mesh.size(mesh.ndim - 1)  # they hold the same shards
    return torch.stack(torch._foreach_norm(gradients)).square().sum() / replicas


@torch.no_grad()
def scale(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients of this norm down to `max_norm`; 0 leaves them as they are."""
    if max_norm:
        torch._foreach_mul_(gradients, (max_norm / (norm.squeeze() + 1e-6)).clamp(max=1))


def set_last_micro_batch(model: nn.Module, last: bool, *, keep_gathered: bool) -> None:
    """Whether the next backward is a step's last: gradients are reduced then, and gathered weights are freed that are
    kept until then (`keep_gathered`)."""
    model.set_requires_gradient_sync(last)
    if keep_gathered:
        model.set_reshard_after_backward(last)
