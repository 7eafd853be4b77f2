"""LoRA adapters of a network, by name: load, scale and unload."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from tinyflux.model.locate import REPO
from tinyflux.model.lora import Lora, linear_layers, read_lora


class Adapters:
    """The adapters that are merged into a network, and a copy of its original weights."""

    def __init__(self):
        self._loras: dict[str, tuple[Lora, float]] = {}  # by name, with their scales
        self._plain: dict[str, Tensor] = {}  # by layer

    def load(self, network: nn.Module, source: str | Path, name: str, scale: float) -> None:
        """Add an adapter: a PEFT folder, a file, or `user/repo`. Raises FileNotFoundError; ValueError if it is not a
        plain LoRA of this network."""
        path = Path(source)
        if not path.exists() and REPO.fullmatch(str(source)):
            path = Path(snapshot_download(str(source), allow_patterns=["adapter_config.json", "*.safetensors"]))
        self._set(network, self._loras | {name: (read_lora(path, network), scale)})

    def scale(self, network: nn.Module, names: str | list[str], scales: float | list[float] | None) -> None:
        """Set the scales of these adapters (default 1), and 0 for all others. Raises ValueError for unknown names."""
        names = [names] if isinstance(names, str) else list(names)
        given = scales if isinstance(scales, list | tuple) else [scales] * len(names)
        if len(given) != len(names):
            raise ValueError(f"{len(given)} adapter_weights for {len(names)} adapters: give one, or one per adapter")
        chosen = {name: 1.0 if scale is None else scale for name, scale in zip(names, given, strict=True)}
        if unknown := [name for name in names if name not in self._loras]:
            raise ValueError(f"no adapter {', '.join(unknown)}; loaded adapters: {', '.join(self._loras) or 'none'}")
        self._set(network, {name: (lora, chosen.get(name, 0.0)) for name, (lora, _) in self._loras.items()})

    def unload(self, network: nn.Module) -> None:
        """Restore the original weights, bit for bit."""
        self._set(network, {})

    @torch.no_grad()
    def _set(self, network: nn.Module, loras: dict[str, tuple[Lora, float]]) -> None:
        layers = linear_layers(network)
        for path, weight in self._plain.items():
            layers[path].weight.copy_(weight)
        changed = {path for lora, _ in loras.values() for path in lora.pairs if path in layers}
        self._plain = {path: layers[path].weight.cpu().clone() for path in changed}
        try:
            for lora, scale in loras.values():
                lora.add_to(network, scale)
        except ValueError:  # it does not fit: go back to the adapters that do
            self._set(network, self._loras)
            raise
        self._loras = loras
