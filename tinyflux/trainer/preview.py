"""Sample pictures during training: prompts are encoded once, all ranks draw, rank 0 decodes in the background."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyflux.run.metrics import Metrics
from tinyflux.trainer.background import Background
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.sampling import Prompts, Sampler, image_grid, save_samples
from tinyflux.util.files import Stopped
from tinyflux.util.log import say


class Preview:
    """Sample grids of fixed prompts and noise. Must be built on all ranks; only rank 0 loads the encoders."""

    def __init__(
        self,
        sampler: Sampler,
        texts: list[str],
        folder: Path,
        device: torch.device,
        seed: int,
        *,
        raw: bool = True,
    ):
        self.raw, self.texts = raw, list(texts)
        self.sampler, self.folder, self.device, self.seed = sampler, folder, device, seed
        self.background = Background("preview")
        encoded = [None]
        if dist.get_rank() == 0:
            encoded = [Prompts.encode(sampler.zoo, texts)]
            sampler.zoo.unload("t5")
            sampler.zoo.unload("clip")
        dist.broadcast_object_list(encoded, src=0)
        self.prompts: Prompts = encoded[0]

    def draw(self, model: nn.Module, ema: EMA, step: int, metrics: Metrics, last: bool) -> None:
        """Draw the prompts with the averaged weights, and with the trained ones if `raw`, each rank its share; rank 0
        then decodes in a thread. Skipped while the previous grid is still being decoded, unless this is the `last`.
        Must be called on all ranks."""
        if self.background.is_busy() and not last:
            say(f"no samples of step {step}: the previous ones are not decoded yet (raise trainer.sample_every)")
            return
        with ema.average_parameters():
            drawn = {"": self._latents(model)}
        if self.raw:
            drawn["_raw"] = self._latents(model)
        if dist.get_rank() == 0:
            self.background.submit(self._decode, drawn, step, metrics)

    def _latents(self, model: nn.Module) -> Tensor:
        rank, world, count = dist.get_rank(), dist.get_world_size(), len(self.prompts)
        # every rank draws the same number, because the forward of a sharded model needs all ranks
        mine = (torch.arange(-(-count // world)) * world + rank) % count
        latents = self.sampler.latents(model, self.prompts, seed=self.seed, indices=mine, device=self.device)
        everyone = [torch.empty_like(latents) for _ in range(world)]
        dist.all_gather(everyone, latents.contiguous())
        return torch.stack(everyone, 1).flatten(0, 1)[:count].cpu()

    def _decode(self, drawn: dict[str, Tensor], step: int, metrics: Metrics) -> None:
        try:
            for kind, latents in drawn.items():
                images = self.sampler.decode(latents)
                path = self.folder / f"step_{step}{kind}.png"
                save_samples(images, path, parameters={"prompts": self.texts, "height": images.shape[2]})
                metrics.image(f"samples{kind}", image_grid(images), step)
            say(f"samples of step {step}: {self.folder / f'step_{step}.png'}")
        except Stopped:
            say(f"no samples of step {step}: the training stops")
        except (RuntimeError, OSError, ValueError) as error:  # such as too little memory, or a full disk
            say(f"WARNING: no samples of step {step}: {error}")

    def wait(self, patience: float | None = None) -> None:
        """Wait at most `patience` seconds for the grid that is being decoded, then drop it."""
        if not self.background.wait(patience):
            self.sampler.stop()
