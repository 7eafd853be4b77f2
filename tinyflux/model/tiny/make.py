"""Build the offline zoo: real diffusers and transformers classes with small configs, trained for minutes on a CPU.

    python -m tinyflux.model.tiny.make --out DIR [--effort 1.0] [--only vae sd_vae text lune sol]

Needs scikit-image for its photographs. `--effort` scales the training steps; `--only` rebuilds some of the models in an
existing DIR. A full build takes about ten minutes on two cores.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tinyflux.model.tiny import fit, text, vision

WIDTH = 128  # of both text encoders
PARTS = ("vae", "sd_vae", "text", "vision", "lune", "sol")
STEPS = {"vae": 1800, "sd_vae": 800, "text": 500, "vision": 700, "lune": 1000, "sol": 500}


def build_vae(latent_channels: int, widths: tuple[int, ...], quant_conv: bool) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=latent_channels,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=1,  # more groups would remove a flat colour: the first level has only eight channels
        mid_block_add_attention=False,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
        sample_size=64,
        force_upcast=False,
    )


def build_t5(tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
            relative_attention_max_distance=32, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def build_clip(tokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=64, projection_dim=WIDTH,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def build_unet(widths: tuple[int, int]) -> UNet2DConditionModel:
    """SD1.5's blocks at two levels: 8x8 latents become 4x4 in the mid block, whose width is the last of `widths`."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip


def save(model: nn.Module, folder: Path) -> None:
    model.half().save_pretrained(folder, safe_serialization=True)


def make(out: Path, parts: tuple[str, ...] = PARTS, effort: float = 1.0) -> None:
    """Build `parts` in the folder `out`; other parts that they need are read from there."""
    out.mkdir(parents=True, exist_ok=True)
    steps = {part: max(1, round(n * effort)) for part, n in STEPS.items()}
    torch.manual_seed(0)
    for part in parts:
        for folder in {"text": ("t5", "clip")}.get(part, (part,)):
            shutil.rmtree(out / folder, ignore_errors=True)
    if "vae" in parts:
        vae = build_vae(16, (8, 16, 32, 48), quant_conv=False)
        fit.fit_vae(vae, steps["vae"])
        save(vae, out / "vae")
    if "sd_vae" in parts:
        sd_vae = build_vae(4, (8, 16, 24, 32), quant_conv=True)
        fit.fit_vae(sd_vae, steps["sd_vae"])
        save(sd_vae, out / "sd_vae")
    if "text" in parts:
        t5_tokenizer, clip_tokenizer = text.train_t5_tokenizer(), text.train_clip_tokenizer()
        t5, clip = build_t5(t5_tokenizer), build_clip(clip_tokenizer)
        text.fit_text(t5, t5_tokenizer, clip, clip_tokenizer, steps["text"])
        for model, tokenizer, name in ((t5, t5_tokenizer, "t5"), (clip, clip_tokenizer, "clip")):
            save(model, out / name)
            tokenizer.save_pretrained(out / name)
            written = out / name / "tokenizer.json"
            written.write_text(json.dumps(json.loads(written.read_text()), ensure_ascii=False, separators=(",", ":")))
    if "vision" in parts:  # into the folder of the text tower, so that it is a complete CLIP like the published one
        tokenizer = AutoTokenizer.from_pretrained(out / "clip")
        whole = vision.build_clip_model(CLIPTextModel.from_pretrained(out / "clip", dtype=torch.float32))
        vision.fit_vision(whole, tokenizer, steps["vision"])
        save(whole, out / "clip")
    if "lune" in parts or "sol" in parts:
        sd_vae = AutoencoderKL.from_pretrained(out / "sd_vae", torch_dtype=torch.float32)
        clip = CLIPTextModel.from_pretrained(out / "clip", dtype=torch.float32)
        latents, contexts = fit.encode_captioned(sd_vae, clip, AutoTokenizer.from_pretrained(out / "clip"))
        for name, widths in (("lune", (16, 48)), ("sol", (16, 32))):
            if name in parts:
                unet = build_unet(widths)
                fit.fit_unet(unet, latents, contexts, steps[name])
                save(unet, out / name)
    (out / "zoo.json").write_text(json.dumps({"image_size": 64, "t5_length": text.T5_LENGTH}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--effort", type=float, default=1.0)
    arguments = parser.parse_args()
    make(arguments.out, tuple(arguments.only), arguments.effort)


if __name__ == "__main__":
    main()
