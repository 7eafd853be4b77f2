"""The real models' sizes, end to end: four photographs at 512 pixels through `sharding.build --zoo flux`, on the CPU.

    python tests/bench/flux.py [FOLDER]     FOLDER (default: a temporary one, 5 GB) keeps the models for another run

It needs no network: models with random weights in the real layouts (FLUX VAE, flan-t5-base, CLIP-L, SD1.5's UNet and
VAE, both experts) are served on loopback. Prints the requested files, the time of each model, the peak of the resident
memory, and the build's messages for bad answers of the Hub.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.hub import Hub
from tinyflux.model.tiny.pictures import PHOTOGRAPHS, photograph
from tinyflux.model.zoo import FLUX, UNET_CONFIG

ROOT = Path(__file__).parents[2]
PHOTOS = ("astronaut", "cat", "coffee", "rocket")
BLOCKS = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
VAE = {
    "down_block_types": BLOCKS[0],
    "up_block_types": BLOCKS[1],
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
FAULTS = {
    "gated": (403, b"", {"X-Error-Code": "GatedRepo"}),
    "rate-limited": (429, b"", {"Retry-After": "1"}),
    "failing": (500, b"", {}),
    "damaged": (200, b"<html>not what you think</html>", {"X-Repo-Commit": "0" * 40, "ETag": '"damaged"'}),
}


def words(count: int, special: list[str]) -> list[str]:
    """That many different words, the special ones first and every letter among them."""
    letters = [chr(c) for c in range(33, 127)] + ["▁"]
    rest = count - len(special) - len(letters)
    return [*special, *letters, *(f"w{i}" for i in range(rest))]


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """A unigram tokenizer of flan-t5's size: 32,100 pieces."""
    pieces = words(32_100, ["<pad>", "</s>", "<unk>"])
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer without merges of CLIP's size: 49,408 tokens."""
    ends = ["<|startoftext|>", "<|endoftext|>"]
    tokens = words(49_408 - 2, []) + ends
    tokens[95 : 95 + 94] = [f"{token}</w>" for token in tokens[:94]]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token=ends[1], end_of_word_suffix="</w>")
    )
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{ends[0]} $A {ends[1]}", special_tokens=[(end, len(tokens) - 2 + i) for i, end in enumerate(ends)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=ends[1], bos_token=ends[0], eos_token=ends[1], unk_token=ends[1],
        model_max_length=77,
    )  # fmt: skip


def flux_vae() -> AutoencoderKL:
    """The VAE of FLUX."""
    return AutoencoderKL(**VAE, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159,
                         use_quant_conv=False, use_post_quant_conv=False)  # fmt: skip


def sd_vae() -> AutoencoderKL:
    """The VAE of SD1.5."""
    return AutoencoderKL(**VAE, latent_channels=4, scaling_factor=0.18215)


def t5() -> T5EncoderModel:
    """The encoder of flan-t5-base."""
    return T5EncoderModel(
        T5Config(d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12, vocab_size=32_128,
                 feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    )  # fmt: skip


def clip() -> CLIPTextModel:
    """The text encoder of CLIP-L."""
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                       vocab_size=49_408, eos_token_id=49_407, bos_token_id=49_406)
    )  # fmt: skip


def make_models(folder: Path) -> None:
    """Every repo of the flux zoo, with random weights, in folders of their names."""
    torch.manual_seed(0)
    flux_vae().to(torch.bfloat16).save_pretrained(folder / FLUX["vae"].at / "vae")
    sd_vae().save_pretrained(folder / FLUX["sd_vae"].at / "vae")
    t5().save_pretrained(folder / FLUX["t5"].at)
    t5_tokenizer().save_pretrained(folder / FLUX["t5"].at)
    clip().save_pretrained(folder / FLUX["clip"].at)
    clip_tokenizer().save_pretrained(folder / FLUX["clip"].at)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # the other defaults are SD1.5's
    unet.save_config(folder / UNET_CONFIG.at / UNET_CONFIG.subfolder)
    for name in ("lune", "sol"):
        path = folder / FLUX[name].at / FLUX[name].file
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.half() for key, value in unet.state_dict().items()}, path)
    (folder / "complete").touch()


def build(work: Path, url: str, *options: str) -> tuple[int, str, float]:
    """(exit status, output, peak resident GB) of a build of the photographs."""
    environment = os.environ | {
        "HF_ENDPOINT": url, "HF_HOME": str(work / "home"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)
    }  # fmt: skip
    command = [sys.executable, "-m", "sharding.build", "--source", str(work / "photos"), "--kind", "imagefolder",
               "--zoo", "flux", "--batch-size", "1", *options]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), output, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder, work = Path(sys.argv[1] if len(sys.argv) > 1 else scratch) / "repos", Path(scratch)
        if not (folder / "complete").exists():
            make_models(folder)
        (work / "photos").mkdir()
        for name in PHOTOS:
            photograph(name).resize((512, 512)).save(work / "photos" / f"{name}.png")
            (work / "photos" / f"{name}.txt").write_text(PHOTOGRAPHS[name])
        repos = {place.at: {"main": folder / place.at} for place in (*FLUX.values(), UNET_CONFIG)}
        with Hub(repos) as hub:
            threading.Thread(target=hub.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{hub.server_port}"
            status, output, peak = build(work, url, "--out", "built")
            print(output, f"\nexit status {status}, peak {peak:.2f} GB resident\nfiles asked for:", sep="")
            print(*(f"  {name}" for name in hub.fetched), sep="\n")
            for name, fault in FAULTS.items():
                for file in ("tokenizer.json", FLUX["lune"].file):
                    for path in (work / "home").rglob(file):  # else it is taken from the Hub's cache
                        path.resolve().unlink()
                        path.unlink()
                    hub.faults = {file: fault}
                    status, output, _ = build(work, url, "--out", f"{name}-{file}", "--limit", "1")
                    said = [line for line in re.split("[\r\n]", output) if "rror" in line]
                    print(json.dumps({"answer": name, "file": file, "status": status, "said": said[-1:]}))
            hub.shutdown()


if __name__ == "__main__":
    main()
