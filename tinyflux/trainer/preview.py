"""Pictures of a run while it trains: prompts encoded once, sampled on all ranks, decoded beside the training."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyflux.run.metrics import Metrics
from tinyflux.trainer.sampling import Prompts, Sampler, image_grid, save_samples
from tinyflux.util.log import say


class Preview:
    """Sample grids of fixed prompts and noise. Building one is a collective: rank 0 alone loads the encoders."""

    def __init__(self, sampler: Sampler, texts: list[str], folder: Path, device: torch.device, seed: int):
        self.sampler, self.folder, self.device, self.seed = sampler, folder, device, seed
        self.executor, self.pending = ThreadPoolExecutor(1, "preview"), None
        encoded = [None]
        if dist.get_rank() == 0:
            encoded = [Prompts.encode(sampler.zoo, texts)]
            sampler.zoo.unload("t5")
            sampler.zoo.unload("clip")
        dist.broadcast_object_list(encoded, src=0)
        self.prompts: Prompts = encoded[0]
        self.pending: Future | None = None

    def draw(self, model: nn.Module, step: int, metrics: Metrics) -> None:
        """Sample the prompts, each rank its share; rank 0 then decodes in a thread. A collective."""
        rank, world, count = dist.get_rank(), dist.get_world_size(), len(self.prompts)
        # every rank draws equally many, for the forwards of a sharded model are collectives
        mine = (torch.arange(-(-count // world)) * world + rank) % count
        latents = self.sampler.latents(model, self.prompts, seed=self.seed, indices=mine, device=self.device)
        everyone = [torch.empty_like(latents) for _ in range(world)]
        dist.all_gather(everyone, latents.contiguous())
        if rank == 0:
            self.wait()
            latents = torch.stack(everyone, 1).flatten(0, 1)[:count].cpu()
            self.pending = self.executor.submit(self._decode, latents, step, metrics)

    def _decode(self, latents: Tensor, step: int, metrics: Metrics) -> None:
        images = self.sampler.decode(latents)
        path = save_samples(images, self.folder / f"step_{step}.png")
        metrics.image("samples", image_grid(images), step)
        say(f"samples of step {step}: {path}")

    def wait(self) -> None:
        """Wait for the grid that is being decoded; raises what went wrong there."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None
