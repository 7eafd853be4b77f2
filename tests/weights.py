"""A run folder with untrained weights of a small network, for tests that draw with the packaged zoo."""

import json
from pathlib import Path

import torch

from tinyflux.model.loader import save_published
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
WIDTHS = {"joint_attention_dim": 128, "pooled_projection_dim": 128, "lune_expert_dim": 128}
NETWORK = TinyFluxConfig(
    **SIZES, **WIDTHS, num_double_layers=1, num_single_layers=1, lune_hidden_dim=16, sol_hidden_dim=8
)


def write_run(folder: Path, seeds: dict[str, int]) -> Path:
    """A run whose checkpoints are these names, each with weights of its seed. Returns the folder."""
    for name, seed in seeds.items():
        torch.manual_seed(seed)
        model = TinyFluxDeep(NETWORK)
        torch.nn.init.normal_(model.final_linear.weight, std=0.3)
        save_published(model, folder / "checkpoints" / f"{name}.safetensors")
    seen = {"latent_shapes": [[8, 8], [6, 8]], "words": ["a", "red", "ring", "green", "star"]}
    config = {"trainer": {"shift": 2.0, "guidance_scale": 3.0, "zoo": "tiny"}, "seen": seen}
    (folder / "checkpoints" / "training_config.json").write_text(json.dumps(config))
    return folder
