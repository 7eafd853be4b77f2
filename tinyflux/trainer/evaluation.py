"""Scores of a network on held-out samples, with the same samples, timesteps and noise every time.

The shards contain the prompts' encodings, so no text encoder is loaded. The drawn pictures are compared with the
samples' latents, decoded by the same VAE.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyflux.run.evaluation_page import page, png
from tinyflux.shards.stream import Stream
from tinyflux.trainer.sampling import Prompts, Sampler, evaluating, to_tokens
from tinyflux.trainer.scores import ClipScorer, clip_scores, cmmd, frechet
from tinyflux.util import rng
from tinyflux.util.files import atomic_write
from tinyflux.util.pixels import to_uint8
from tinyflux.util.predictions import flow_velocity, flow_x_t

TIMESTEPS = tuple((i + 0.5) / 10 for i in range(10))


@dataclass
class Samples:
    """Held-out samples: latents [N, C, H, W], their prompts' encodings, seeds int64 [N] and texts."""

    latents: Tensor
    prompts: Prompts
    seeds: Tensor

    @classmethod
    def read(cls, stream: Stream, count: int, batch_size: int = 8) -> "Samples":
        """The first `count` held-out samples of a stream, in their fixed order, with one latent shape; the same on all
        ranks. Raises ValueError if nothing is held out."""
        parts: dict[str, list[Tensor]] = {}
        texts, found, shape = [], 0, None
        for raw in stream.validation(batch_size, rank=0, world=1):
            shape = shape or raw["latents"].shape[1:]
            if raw["latents"].shape[1:] != shape:
                continue
            rows = raw["valid"].nonzero().flatten()[: count - found]
            for name in ("latents", "t5_embeds", "clip_pooled", "sample_seeds", "source_index"):
                parts.setdefault(name, []).append(raw[name][rows].clone())
            texts += [_prompt(stream, raw, row) for row in rows.tolist()]
            found += len(rows)
            if found >= count:
                break
        if not found:
            raise ValueError("no samples are held out: set data.val_fraction")
        x = {name: torch.cat(tensors) for name, tensors in parts.items()}
        nulls = (torch.stack([s.null[name] for s in stream.sources])[x["source_index"]]
                 for name in ("t5_embeds", "clip_pooled"))  # fmt: skip
        prompts = Prompts(texts, x["t5_embeds"].float(), x["clip_pooled"].float(), *(null.float() for null in nulls))
        return cls(x["latents"].float(), prompts, x["sample_seeds"])

    def __len__(self) -> int:
        return len(self.latents)


def _prompt(stream: Stream, raw: dict, row: int) -> str:
    source = stream.sources[int(raw["source_index"][row])]
    shard, place = source.manifest.locate(int(raw["local_indices"][row]))
    return source.open(int(shard)).meta(int(place))["prompts"][0]


@torch.no_grad()
def losses_by_t(model: nn.Module, samples: Samples, rows: Tensor, device: torch.device, batch_size: int = 8) -> Tensor:
    """The unweighted mean squared error of the velocity, float64 [rows, timesteps], with each sample's fixed noise."""
    out = torch.zeros(len(rows), len(TIMESTEPS), dtype=torch.float64)
    height, width = samples.latents.shape[2:]
    ids = model.create_img_ids(1, height, width, device)[0]
    with evaluating(model):
        for part in torch.arange(len(rows)).split(batch_size):
            chosen = rows[part]
            data = to_tokens(samples.latents[chosen].to(device))
            noise = to_tokens(rng.normal(samples.seeds[chosen].to(device), "noise", samples.latents.shape[1:]))
            text = samples.prompts.t5[chosen].to(device), samples.prompts.clip[chosen].to(device)
            for k, t in enumerate(TIMESTEPS):
                at = torch.full((len(part),), t, device=device)
                v = model(flow_x_t(data, noise, at), *text, at, ids)
                error = (v.float() - flow_velocity(data, noise)).square().mean((1, 2))
                out[part, k] = error.double().cpu()
    return out


class Evaluator:
    """Draws and scores held-out samples. sampler: decodes on its zoo's device; scorer: None skips CLIP's scores;
    inception: uint8 pictures -> FID's features."""

    def __init__(
        self,
        samples: Samples,
        sampler: Sampler,
        scorer: ClipScorer | None,
        inception: Callable[[Tensor], Tensor] | None = None,
        *,
        seed: int = 0,
    ):
        self.samples, self.sampler, self.scorer, self.inception, self.seed = samples, sampler, scorer, inception, seed
        self.real: Tensor | None = None  # the samples' decoded latents

    def forward(self, model: nn.Module, device: torch.device, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Losses [n, timesteps] and drawn latents [n, C, H, W] of this rank's samples. All ranks get the same number,
        because the forward of a sharded model needs all ranks. Must be called on all ranks."""
        count = len(self.samples)
        rows = (torch.arange(-(-count // world)) * world + rank) % count
        losses = losses_by_t(model, self.samples, rows, device, self.sampler.batch_size)
        latents = self.sampler.latents(model, self.samples.prompts, seed=self.seed, indices=rows, device=device)
        return losses, latents.cpu()

    def score(self, losses: Tensor, latents: Tensor) -> tuple[dict, Tensor, Tensor | None]:
        """The scores over all samples, the drawn pictures, and each picture's CLIP score."""
        if self.real is None:
            self.real = self.sampler.decode(self.samples.latents)
        drawn, by_t = self.sampler.decode(latents), losses.mean(0).tolist()
        scores = {
            "samples": len(self.samples),
            "loss": losses.mean().item(),
            "loss_by_t": {f"{t:.2f}": value for t, value in zip(TIMESTEPS, by_t, strict=True)},
        }
        each = None
        if self.scorer is not None:
            real, mine = (self._embed(x) for x in (self.real, drawn))
            texts = self.scorer.texts(self.samples.prompts.clip)
            each = clip_scores(mine, texts)
            scores["clip_score"] = each.mean().item()
            scores["clip_score_of_real"] = clip_scores(real, texts).mean().item()
            scores["cmmd"] = cmmd(real, mine)
        if self.inception is not None:
            real, mine = (torch.cat([self.inception(to_uint8(x)) for x in y.split(8)]) for y in (self.real, drawn))
            scores["fid"] = frechet(real, mine)
        return scores, drawn, each

    def _embed(self, pictures: Tensor) -> Tensor:
        return torch.cat([self.scorer.images(x) for x in pictures.split(self.sampler.batch_size)])

    def write(self, folder: Path, name: str, about: dict, losses: Tensor, latents: Tensor) -> dict:
        """Score, and write NAME.json and NAME.html. Returns the scores. about: written to both."""
        scores, drawn, each = self.score(losses, latents)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / f"{name}.json", json.dumps({**about, **scores}, indent=2) + "\n")
        order = (-each if each is not None else losses.mean(1)).argsort(stable=True).tolist()
        cells = [
            (self.samples.prompts.texts[i], png(drawn[i]), png(self.real[i]),
             f"CLIP {each[i]:.1f}" if each is not None else f"loss {losses[i].mean():.4f}")
            for i in order
        ]  # fmt: skip
        atomic_write(folder / f"{name}.html", page({**about, **scores}, cells))
        return scores


def board_values(scores: dict) -> dict[str, float]:
    """The scores for TensorBoard."""
    values = {f"evaluation/{k}": scores[k] for k in ("loss", "clip_score", "cmmd", "fid") if k in scores}
    return values | {f"evaluation_loss_by_t/{t}": value for t, value in scores["loss_by_t"].items()}
