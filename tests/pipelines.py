"""A small pipeline and its pictures, for tests."""

from pathlib import Path

import torch

from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.model.zoo import ModelZoo
from tinyflux.trainer.pipeline import TinyFluxPipeline

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
WIDTHS = {"joint_attention_dim": 128, "pooled_projection_dim": 128, "lune_expert_dim": 128}
SMALL = TinyFluxConfig(
    **SIZES, **WIDTHS, num_double_layers=1, num_single_layers=1, lune_hidden_dim=16, sol_hidden_dim=8
)
PROMPTS = ["a red ring", "a green star"]


def small_model() -> TinyFluxDeep:
    torch.manual_seed(0)
    model = TinyFluxDeep(SMALL).eval()
    torch.nn.init.normal_(model.final_linear.weight, std=0.3)  # zero at the start: every velocity would be 0
    return model


def save(model: TinyFluxDeep, folder: Path) -> Path:
    """Save a pipeline of the model; returns the folder."""
    TinyFluxPipeline.of(model, ModelZoo(zoo="tiny"), shift=2.0).save_pretrained(folder)
    return folder


def load(folder: Path) -> TinyFluxPipeline:
    pipe = TinyFluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe, *args, **given):
    return pipe(*args, **{"num_inference_steps": 2, "generator": seeded(3), "output_type": "pt"} | given).images
