"""LoRA: low-rank adapters of a network's linear layers (Hu et al. 2021, arXiv 2106.09685).

They are trained with peft (the extra [lora]) and stored in two layouts: PEFT's folder, with adapter_config.json and
adapter_model.safetensors, and the original package's file, with NAME.lora_A and NAME.lora_B for each layer (NAME is its
path with underscores). Reading needs no peft: adapters are merged into the layers' weights.
"""

import json
import math
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # names of PEFT's folder
PREFIX = "base_model.model."  # of PEFT's keys
A, B = ".lora_A.default.weight", ".lora_B.default.weight"  # peft's names of an adapter in memory
BASE = ".base_layer."  # peft's name of the adapted layer
HEADS = "heads."  # heads for training only
PLAIN = {  # other settings of a PEFT adapter, and their values in a plain LoRA
    "bias": "none",
    "modules_to_save": None,
    "use_dora": False,
    "fan_in_fan_out": False,
    "alpha_pattern": {},
    "peft_type": "LORA",
}


@dataclass(frozen=True)
class Lora:
    """An adapter: by a layer's path, A [rank, in] and B [out, rank]; `scale` * B @ A is added to the layer's weight."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]

    @torch.no_grad()
    def add_to(self, model: nn.Module, strength: float = 1.0) -> None:
        """Add it to a network's weights. Raises ValueError with the misfitting layers; then nothing is changed."""
        layers = linear_layers(model)
        faults = [f"  the network has no layer {path}" for path in self.pairs if path not in layers]
        for path, (a, b) in self.pairs.items():
            if path in layers and (b.shape[0], a.shape[1]) != layers[path].weight.shape:
                shape = list(layers[path].weight.shape)
                faults.append(f"  {path} is {shape}, the adapter is for {[b.shape[0], a.shape[1]]}")
        if faults:
            raise ValueError("the LoRA does not fit this network:\n" + "\n".join(faults))
        for path, (a, b) in self.pairs.items():
            weight = layers[path].weight
            change = b.to(weight.device).float() @ a.to(weight.device).float()
            weight.add_(change.to(weight.dtype), alpha=strength * self.scales[path])

    def save_peft(self, folder: Path) -> None:
        """Write PEFT's folder. All layers must have one rank and one scale."""
        from peft import LoraConfig

        rank = self._rank()
        config = LoraConfig(
            r=rank,
            lora_alpha=self.scales[next(iter(self.pairs))] * rank,
            target_modules=sorted(self.pairs),
            inference_mode=True,
        )
        tensors = {}
        for path, (a, b) in self.pairs.items():
            tensors |= {
                f"{PREFIX}{path}.lora_A.weight": a.contiguous(),
                f"{PREFIX}{path}.lora_B.weight": b.contiguous(),
            }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))

    def save_original(self, path: Path) -> None:
        """Write the original package's file. All layers must have one rank and one scale."""
        rank, tensors = self._rank(), {}
        for layer, (a, b) in self.pairs.items():
            key = layer.replace(".", "_")
            tensors |= {f"{key}.lora_A": a.contiguous(), f"{key}.lora_B": b.contiguous()}
        defaults = {"rank": rank, "alpha": self.scales[next(iter(self.pairs))] * rank}
        metadata = {"config_json": json.dumps({"defaults": defaults}), "num_adapters": str(len(self.pairs))}
        save_file(tensors, path, metadata=metadata)

    def _rank(self) -> int:
        ranks, scales = {len(a) for a, _ in self.pairs.values()}, set(self.scales.values())
        if len(ranks) != 1 or len(scales) != 1:
            raise ValueError(f"a saved LoRA must have one rank and one scale; this one has {ranks} and {scales}")
        return ranks.pop()


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that can get adapters, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def attach(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: list[str],
    seed: int = 0,
    weights: dict[str, Tensor] | None = None,
) -> dict[str, Tensor] | None:
    """Freeze a network and add adapters, which have no effect yet, to the layers that match `targets` (fnmatch). Heads
    for training only are trained themselves: they are new, and not exported.

    weights: of a network on the meta device; they are returned under the new names, with the adapters' initial values,
    which depend only on the seed. Raises ValueError if a target matches no layer, or peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f"trainer.lora_rank: {error}. Install it: pip install 'tinyflux-deep[lora]'") from error

    layers, paths = [path for path in linear_layers(model) if not path.startswith(HEADS)], []
    for pattern in targets:
        if not (found := [path for path in layers if fnmatch(path, pattern)]):
            raise ValueError(
                f"trainer.lora_targets: {pattern!r} matches no linear layer, such as single_blocks.0.attn.qkv"
            )
        paths += found
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(set(paths)), lora_dropout=0.0)
    meta = next(model.parameters()).is_meta
    inject_adapter_in_model(config, model, low_cpu_mem_usage=meta)
    first, generator = {}, torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith(A):  # as peft draws it: uniform with the bound 1 / sqrt(in)
            first[name] = torch.empty(p.shape).uniform_(-1, 1, generator=generator) / math.sqrt(p.shape[1])
        elif name.endswith(B):
            first[name] = torch.zeros(p.shape)
        else:
            p.requires_grad_(name.startswith(HEADS))
            continue
        p.requires_grad_(True)
        if not p.is_meta:
            p.data.copy_(first[name])
    if not weights:
        return weights
    adapted = {name.removesuffix(A) for name in first}
    renamed = {}
    for name, value in weights.items():
        path, _, entry = name.rpartition(".")
        renamed[f"{path}{BASE}{entry}" if path in adapted else name] = value
    return renamed | first


def detach(state: dict[str, Tensor], alpha: float) -> tuple[dict[str, Tensor], Lora]:
    """Split a state dict with adapters into that of the network and the adapters."""
    base = {name.replace(BASE, "."): x for name, x in state.items() if not name.endswith((A, B))}
    paths = [name.removesuffix(A) for name in state if name.endswith(A)]
    pairs = {path: (state[path + A], state[path + B]) for path in paths}
    return base, Lora(pairs, {path: alpha / len(a) for path, (a, _) in pairs.items()})


def merged(state: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A state dict with the adapters merged into the weights."""
    base, lora = detach(state, alpha)
    for path, (a, b) in lora.pairs.items():
        base[f"{path}.weight"] = base[f"{path}.weight"] + lora.scales[path] * (b @ a)
    return base


def read_lora(path: str | Path, model: nn.Module) -> Lora:
    """An adapter for a network, from PEFT's folder, its weights file, or a file of the original package.

    Raises FileNotFoundError, and ValueError for a damaged file or one that is not a plain LoRA.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = folder / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no LoRA here: a .safetensors file, or a folder with {CONFIG} and {WEIGHTS}")
    try:
        with safe_open(file, "pt") as content:
            metadata, tensors = content.metadata() or {}, {key: content.get_tensor(key) for key in content.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a .safetensors file: {error}") from error
    try:
        if any(key.startswith(PREFIX) for key in tensors):
            return _from_peft(tensors, json.loads((folder / CONFIG).read_text()))
        return _from_original(tensors, json.loads(metadata.get("config_json", "{}")), model)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: {error}") from error


def _pairs(tensors: dict[str, Tensor], a: str, b: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer, from keys with these suffixes."""
    pairs = {
        key.removesuffix(a): (tensors[key], tensors.get(key.removesuffix(a) + b)) for key in tensors if key.endswith(a)
    }
    known = {path + end for path in pairs for end in (a, b)}
    if faults := sorted(known ^ tensors.keys()):
        raise ValueError(f"unexpected or missing {', '.join(faults[:5])}: not a plain LoRA")
    for path, (first, second) in pairs.items():
        if first.ndim != 2 or second.ndim != 2 or len(first) != second.shape[1]:
            raise ValueError(f"{path}: A {list(first.shape)} and B {list(second.shape)} do not match")
    return pairs


def _from_peft(tensors: dict[str, Tensor], config: dict) -> Lora:
    for key, plain in PLAIN.items():
        if config.get(key, plain) not in (plain, None):
            raise ValueError(f"{CONFIG} has {key} = {config[key]!r}: only a plain LoRA is supported")
    found = _pairs(tensors, ".lora_A.weight", ".lora_B.weight")
    pairs = {path.removeprefix(PREFIX): pair for path, pair in found.items()}
    power = 0.5 if config.get("use_rslora") else 1  # Kalajdzievski 2023, arXiv 2312.03732
    return Lora(pairs, {path: float(config["lora_alpha"]) / len(a) ** power for path, (a, _) in pairs.items()})


def _from_original(tensors: dict[str, Tensor], config: dict, model: nn.Module) -> Lora:
    if config.get("targets") or config.get("layers"):
        raise ValueError("it has separate settings for some layers: only a LoRA with one scale is supported")
    names = {path.replace(".", "_"): path for path in linear_layers(model)}
    found = _pairs(tensors, ".lora_A", ".lora_B")
    if unknown := [name for name in found if name not in names]:
        raise ValueError(f"the network has no layer {', '.join(unknown[:5])}")
    pairs = {names[name]: pair for name, pair in found.items()}
    defaults = config.get("defaults") or {}
    alpha = defaults.get("alpha")  # none: the rank, as in the original
    return Lora(pairs, {path: 1.0 if alpha is None else float(alpha) / len(a) for path, (a, _) in pairs.items()})
