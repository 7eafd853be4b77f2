"""A saved pipeline's files: its index and its parts, in safetensors and JSON; and the placement of parts on devices."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from tinyflux.model.locate import REPO
from tinyflux.model.pretrained import Pretrained, load_pretrained

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
COMPONENTS = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
NUMBERS = {"shift": (int, float), "guidance": (int, float), "image_size": int, "t5_length": int}
CARD = ("license", "base_model", "datasets")


def weights_name(variant: str | None) -> str:
    """The name of a diffusers part's weights file; a variant is a word before the suffix, such as fp16."""
    return WEIGHTS.replace(".safetensors", f".{variant}.safetensors") if variant else WEIGHTS


def find_pipeline(source: str | Path, names: list[str], **where) -> Path:
    """The folder of a pipeline. From a Hub repo, only the files of these parts are downloaded, and no code."""
    folder = Path(source)
    if not folder.is_dir():
        if not (match := REPO.fullmatch(str(source))) or match["folder"]:
            raise FileNotFoundError(f"{source}: no such folder, and not of the form user/repo")
        parts = [f"{name}/*.{end}" for name in names for end in ("json", "safetensors", "txt", "model")]
        folder = Path(snapshot_download(str(source), allow_patterns=[INDEX, *parts], **where))
    for name in names:
        if (folder / INDEX).is_file() and not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder} has no folder {name}")
    return folder


def read_index(folder: Path, kind: str) -> dict:
    """The settings in a pipeline's model_index.json. Raises FileNotFoundError; ValueError for another pipeline."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a pipeline: it has no {INDEX}")
    index = json.loads(path.read_text())
    found = index.get("_class_name") if isinstance(index, dict) else index
    if isinstance(found, list):  # a pipeline with its code beside it: [module, class]
        found = found[-1]
    if found != kind:
        raise ValueError(f"{path} is of a {found!r:.80}, not of a {kind}")
    for key, accepted in NUMBERS.items():
        if not isinstance(index.get(key), accepted) or index[key] <= 0:
            raise ValueError(f"{path}: {key} is {index.get(key)!r:.80}, must be a positive number")
    card = {key: index[key] for key in CARD if isinstance(index.get(key), str)}
    return {key: index[key] for key in NUMBERS} | card


def load_part(folder: Path, name: str, dtype: torch.dtype | None, variant: str | None):
    """A frozen part of a pipeline's folder: vae, an encoder or a tokenizer. dtype None: as saved."""
    origin = Pretrained(str(folder / name), local=True)
    if name == "vae":
        path = folder / name / weights_name(variant)
        if dtype is None and path.is_file():  # diffusers would use float32, whatever the file has
            with safe_open(path, "pt") as file:
                dtype = file.get_tensor(next(iter(file.keys()))).dtype
        return load_pretrained(AutoencoderKL, origin, torch_dtype=dtype, variant=variant, use_safetensors=True)
    if name.startswith("tokenizer"):
        return AutoTokenizer.from_pretrained(folder / name, local_files_only=True, trust_remote_code=False)
    kind = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}[name]
    return load_pretrained(kind, origin, dtype=dtype or "auto", variant=variant, use_safetensors=True)


def place(parts: dict[str, nn.Module], device_map: str | dict[str, str]) -> None:
    """Move parts to devices: one for all; {part: device}; or "balanced", over the GPUs, largest part first.

    Raises ValueError for an unknown part or device.
    """
    if device_map == "balanced":
        free = {f"cuda:{i}": 0 for i in range(torch.cuda.device_count())} or {"cpu": 0}
        device_map = {}
        for name, size in sorted(((n, sum(p.nbytes for p in part.parameters())) for n, part in parts.items()),
                                 key=lambda pair: -pair[1]):  # fmt: skip
            device_map[name] = min(free, key=free.get)
            free[device_map[name]] += size
    elif isinstance(device_map, str):
        device_map = dict.fromkeys(parts, device_map)
    if unknown := device_map.keys() - parts.keys():
        raise ValueError(f"device_map: {', '.join(sorted(unknown))} is none of {', '.join(parts)}")
    for name, device in device_map.items():
        try:
            parts[name].to(device)
        except (RuntimeError, AssertionError) as error:  # torch raises either if there is no such device
            raise ValueError(f"device_map: {name} cannot be on {device}: {str(error).splitlines()[0]}") from error
