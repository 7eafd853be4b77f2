"""Load and save weights: the only module that knows how the published layout differs from the one in memory.

Published checkpoints have 0-d gates (1-d in memory, because FSDP2 refuses 0-d parameters), rotary frequencies as
buffers (computed in memory) and the unused `sol_prior.spatial_to_qk_scale` (not in memory). Its values are dropped when
loading; saving writes weight 0 and bias 1, as in all published checkpoints. Everything else maps one to one, bit for
bit. Loading is strict: partial checkpoints are refused.
"""

import functools
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.dcp import check_files, read_checkpoint, step_in
from tinyflux.model.layers import rope_frequencies
from tinyflux.model.locate import CheckpointError, locate
from tinyflux.model.model import TinyFluxDeep
from tinyflux.util.files import replaced
from tinyflux.util.plain import load_plain

log = logging.getLogger(__name__)

GATES = ("text_balance", "lune_predictor.expert_gate", "sol_prior.blend_gate")
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # left in names by torch.compile and activation checkpointing
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _constants(config: TinyFluxConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The published entries that have no counterpart in memory."""
    entries = {f"rope.freqs_{i}": rope_frequencies(dim).to(dtype) for i, dim in enumerate(config.axes_dims_rope)}
    if config.use_sol_prior:
        entries["sol_prior.spatial_to_qk_scale.weight"] = torch.zeros(config.num_attention_heads, 1, dtype=dtype)
        entries["sol_prior.spatial_to_qk_scale.bias"] = torch.ones(config.num_attention_heads, dtype=dtype)
    return entries


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same entries without wrapper prefixes in their names, and without heads for training only."""
    out = {}
    for key, value in state.items():
        for wrapper in WRAPPERS:
            key = key.replace(wrapper, "")
        if key.startswith("heads."):
            continue
        if key in out:
            raise CheckpointError(f"{key} is there twice, with and without a wrapper's prefix")
        out[key] = value
    return out


def _check(state: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
    """Raises CheckpointError with all missing, unexpected and mis-shaped entries."""
    faults = [f"  missing {key} {list(shape)}" for key, shape in expected.items() if key not in state]
    for key, value in state.items():
        if not isinstance(value, Tensor):
            faults.append(f"  {key} is a {type(value).__name__}, not a tensor")
        elif key not in expected:
            faults.append(f"  unexpected {key} {list(value.shape)}")
        elif value.shape != expected[key]:
            faults.append(f"  {key} has shape {list(value.shape)} instead of {list(expected[key])}")
        elif value.dtype not in DTYPES:
            faults.append(f"  {key} has dtype {value.dtype}; known are {', '.join(map(str, DTYPES))}")
    if faults:
        raise CheckpointError(f"{len(faults)} entries do not fit the model config:\n" + "\n".join(faults))


@functools.lru_cache(maxsize=8)
def _shapes(config_items: tuple) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = TinyFluxDeep(TinyFluxConfig(**dict(config_items)))
    return {key: value.shape for key, value in model.state_dict().items()}


def memory_shapes(config: TinyFluxConfig) -> dict[str, torch.Size]:
    """Name and shape of every entry of the model's own state dict."""
    return dict(_shapes(tuple(config.to_dict().items())))


def published_shapes(config: TinyFluxConfig) -> dict[str, torch.Size]:
    """Name and shape of every published entry: 683 at the default config."""
    shapes = {key: torch.Size() if key in GATES else shape for key, shape in memory_shapes(config).items()}
    return shapes | {key: value.shape for key, value in _constants(config).items()}


def to_published(state: dict[str, Tensor], config: TinyFluxConfig) -> dict[str, Tensor]:
    """The model's state dict in the published layout, unsharded. Raises CheckpointError if it does not fit config."""
    state = _unwrapped(state)
    _check(state, memory_shapes(config))
    out = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}
    out = {key: value.detach().reshape(()) if key in GATES else value.detach() for key, value in out.items()}
    return out | _constants(config, state["img_in.weight"].dtype)


def from_published(state: dict[str, Tensor], config: TinyFluxConfig) -> dict[str, Tensor]:
    """Published entries in the layout in memory, with unchanged dtypes. Raises CheckpointError with all misfits."""
    state = _unwrapped(state)
    _check(state, published_shapes(config))
    dropped = _constants(config)
    for key, value in dropped.items():
        # bfloat16 files round the frequencies; larger differences mean that it was trained with other positions
        if key.startswith("rope.") and not torch.allclose(state[key].float().cpu(), value, rtol=1e-2, atol=0):
            raise CheckpointError(f"{key} is not that of theta 10000: this is another network")
    return {k: v.reshape(1) if k in GATES else v for k, v in state.items() if k not in dropped}


def save_published(model_or_state: nn.Module | dict, path: str | Path, config: TinyFluxConfig | None = None) -> None:
    """Write a `.safetensors` file in the published layout, and `config.json` beside it.

    The write is atomic (temporary file, fsync, rename). Raises ValueError if config.json is another model's.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: published weights are written as .safetensors")
    if isinstance(model_or_state, nn.Module):
        config, model_or_state = config or model_or_state.config, model_or_state.state_dict()
    if config is None:
        raise ValueError(f"{path}: to save a state dict, pass its config too")
    state = {key: value.contiguous() for key, value in to_published(model_or_state, config).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name("config.json")
    if not beside.exists():
        with replaced(beside) as temporary:
            config.save_json(temporary)
    elif TinyFluxConfig.from_json(beside) != config:
        raise ValueError(f"{beside} is another model's: save to another folder")
    with replaced(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


def read_weights(path: Path) -> dict:
    """The content of a `.safetensors` or `.pt` file, on the CPU. Raises CheckpointError if it is damaged or unsafe."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged or cut short ({error}): fetch or export it again") from error
    if path.suffix not in (".pt", ".pth"):
        raise CheckpointError(f"{path}: weights are .safetensors or .pt files")
    try:
        content = load_plain(path)
    except ValueError as error:
        raise CheckpointError(f"{error}. Download it again, or use weights saved as .safetensors") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint's dictionary")
    return content


def _read_folder(folder: Path, config_path: Path | None, kinds: tuple[str, ...]) -> tuple[dict, TinyFluxConfig]:
    """A run's checkpoint folder with the content of its `.pt`, and the config."""
    if config_path is None:
        raise CheckpointError(f"{folder}: no config.json beside it, in {folder.parent}")
    config = TinyFluxConfig.from_json(config_path)
    try:
        check_files(folder)
        content = read_checkpoint(folder, *kinds)
        return content | {kind: to_published(content[kind], config) for kind in ("model", "ema")}, config
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _read(
    source: str | Path, use_ema: bool, revision: str | None, kinds: tuple[str, ...] = ("model", "ema")
) -> tuple[Path, dict, TinyFluxConfig]:
    """The file's path, a dictionary with at least `model` (published entries), and the config."""
    path, config_path = locate(source, use_ema, revision)
    if path.is_dir():
        return path, *_read_folder(path, config_path, kinds)
    content = read_weights(path)
    if path.suffix == ".safetensors" or not isinstance(content.get("model"), dict):
        content = {"model": content}
    if isinstance(content.get("model_config"), dict):
        return path, content, TinyFluxConfig.from_dict(content["model_config"])
    if config_path is not None:
        return path, content, TinyFluxConfig.from_json(config_path)
    config = TinyFluxConfig()
    try:
        _check(_unwrapped(content["model"]), published_shapes(config))
    except CheckpointError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: no config.json beside it, and with the default config {reason}") from error
    log.warning("%s: no config.json beside it; every entry fits the default config, which is used", path)
    return path, content, config


def check_place(device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Raises ValueError if the device cannot be used here, or the dtype is not supported."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: models are loaded in {', '.join(map(str, DTYPES))}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # kinds of devices raise different errors
        raise ValueError(f"device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def _build(path: Path, state: dict, config: TinyFluxConfig, device, dtype: torch.dtype | None) -> TinyFluxDeep:
    try:
        state = from_published(state, config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    # one dtype for all: if a file mixes them, the one that can represent every value
    dtype = dtype or functools.reduce(torch.promote_types, {value.dtype for value in state.values()})
    with torch.device("meta"):
        model = TinyFluxDeep(config)
    model.load_state_dict({key: value.to(device, dtype) for key, value in state.items()}, assign=True)
    return model.eval()


def load_model(
    source: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    use_ema: bool = False,
    revision: str | None = None,
) -> TinyFluxDeep:
    """The model, in eval mode, from a `.safetensors` or `.pt` file, a folder or `user/repo[:sub/folder]`.

    A folder may have weights, or be a run or a run's `checkpoints/step_N`. dtype None keeps the file's. use_ema selects
    averaged or trained weights, among a folder's files or in a `.pt` or step_N.
    Raises FileNotFoundError; CheckpointError for a damaged, unsafe or misfitting file, with all misfits; ValueError for
    an unusable device or dtype.
    """
    check_place(device, dtype)
    path, content, config = _read(source, use_ema, revision)
    state = content["model"]
    if use_ema and path.suffix != ".safetensors":
        if isinstance(content.get("ema"), dict):
            state = content["ema"]
        else:
            log.warning("%s has no averaged (EMA) weights: loading the trained ones", path)
    return _build(path, state, config, device, dtype)


def from_pretrained(
    repo: str | Path,
    use_ema: bool = True,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> TinyFluxDeep:
    """`load_model`, by default with the averaged weights; `revision`: a branch, tag or commit."""
    return load_model(repo, device, dtype, use_ema, revision)


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> dict:
    """A training checkpoint: `model` (a TinyFluxDeep), `step`, `epoch`, `ema` (a state dict for that model), and
    `optimizer`, `scheduler`, `best_loss`, `trainer_config` as in a `.pt`; missing ones are None.

    path: a `step_N.pt` or `best.pt` (if it was not written, the step's checkpoint folder beside it is read), a run's
    folder `checkpoints/step_N`, or anything that `load_model` takes. The step of a `.safetensors` file comes from its
    name.
    """
    check_place(device, dtype)
    path, content, config = _read(path, False, None, ("model", "ema", "optimizer"))
    keys = ("epoch", "optimizer", "scheduler", "best_loss", "trainer_config")
    checkpoint = {"step": step_in(path.name), "ema": None, **dict.fromkeys(keys)} | content
    checkpoint["model"] = _build(path, content["model"], config, device, dtype)
    if checkpoint["ema"] is not None:
        checkpoint["ema"] = from_published(checkpoint["ema"], config)
    return checkpoint
