"""Evaluations during training: all ranks draw, rank 0 scores in a thread on the CPU."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyflux.run.metrics import Metrics
from tinyflux.shards.stream import Stream
from tinyflux.trainer.background import Background
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.evaluation import Evaluator, Samples, board_values
from tinyflux.trainer.sampling import Sampler
from tinyflux.util.files import Stopped
from tinyflux.util.log import say


class Scoreboard:
    """Scores the averaged weights on `count` held-out samples of the run; each rank holds all of them.

    Only rank 0's zoo decodes and scores, on the CPU. Raises ValueError if nothing is held out.
    """

    def __init__(self, stream: Stream, sampler: Sampler, count: int, folder: Path, device: torch.device, seed: int):
        self.folder, self.device, self.seed = folder, device, seed
        samples = Samples.read(stream, count)
        sampler.latent_shape = tuple(samples.latents.shape[1:])
        scorer = None
        if dist.get_rank() == 0:
            from tinyflux.trainer.scores import ClipScorer

            try:
                scorer = ClipScorer(sampler.zoo)
            except ValueError as error:
                say(f"WARNING: no CLIP score and no CMMD: {error}")
        self.evaluator = Evaluator(samples, sampler, scorer, seed=seed)
        self.background = Background("scores")

    def draw(self, model: nn.Module, ema: EMA, step: int, metrics: Metrics, last: bool) -> None:
        """Compute losses and pictures, each rank its share; rank 0 then scores them in a thread. Skipped while earlier
        scores are still being computed, unless this is the `last`. Must be called on all ranks."""
        if self.background.is_busy() and not last:
            say(f"no scores of step {step}: the previous ones are not done yet (raise trainer.evaluate_every)")
            return
        with ema.average_parameters():
            mine = self.evaluator.forward(model, self.device, dist.get_rank(), dist.get_world_size())
        losses, latents = (self._gathered(x.to(self.device)) for x in mine)
        if dist.get_rank() == 0:
            self.background.submit(self._write, losses, latents, step, metrics)

    def _gathered(self, part: Tensor) -> Tensor:
        everyone = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, part.contiguous())
        return torch.stack(everyone, 1).flatten(0, 1)[: len(self.evaluator.samples)].cpu()

    def _write(self, losses: Tensor, latents: Tensor, step: int, metrics: Metrics) -> None:
        about = {"step": step, "held_out": True, "seed": self.seed}
        try:
            scores = self.evaluator.write(self.folder, f"step_{step}_ema", about, losses, latents)
        except Stopped:
            say(f"no scores of step {step}: the training stops")
            return
        except (RuntimeError, OSError, ValueError) as error:  # such as out of memory, or a full disk
            say(f"WARNING: no scores of step {step}: {error}")
            return
        metrics.scalars(board_values(scores), step)
        told = "  ".join(f"{name} {scores[name]:.4g}" for name in ("loss", "clip_score", "cmmd") if name in scores)
        say(f"scores of step {step}: {told}  {self.folder / f'step_{step}_ema.html'}")

    def wait(self, patience: float | None = None) -> None:
        """Wait at most `patience` seconds for the scores that are being computed, then drop them."""
        if not self.background.wait(patience):
            self.evaluator.sampler.stop()
