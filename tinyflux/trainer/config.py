"""Configuration: dataclasses from a TOML file, overridden on the command line, refused when they make no sense."""

import argparse
import dataclasses
import json
import re
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

from tinyflux.model.model import TinyFluxConfig
from tinyflux.shards.stream import DataConfig
from tinyflux.trainer.optim.registry import OPTIMIZERS
from tinyflux.trainer.parallel import ParallelConfig


@dataclass
class TrainerConfig:
    optimizer: Literal[*OPTIMIZERS] = "adamw"
    """State of each trained weight: 8 bytes (adamw), 4 (muon: for training from scratch, in fewer steps), 2 (adamw8bit,
    from torchao: pip install 'tinyflux-deep[8bit]') or almost none (adafactor; its learning rate is relative to the
    weights' size: try 1e-2)."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only: norms, biases and gates have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's momentum factors; adafactor has none."""
    muon_scale: float = 0.2
    """Root mean square of Muon's updates before the learning rate: 0.2 is that of AdamW's; small networks take more."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    warmup_steps: int = 1000
    """Steps over which the learning rate rises."""
    warmup_type: Literal["linear", "cosine"] = "linear"
    """How the learning rate rises."""
    total_steps: int = 100_000
    """Optimizer steps of the whole run."""
    init_from: str | None = None
    """Weights to start from at step 0, published or our own: a file, a folder or user/repo[:sub/folder]. EMA where
    there is one. The network's shape comes with them."""
    freeze: list[str] = field(default_factory=list)
    """Parts that are not trained: names of modules or parameters, with * for any, such as double_blocks.* or txt_in."""
    max_epochs: int | None = None
    """End earlier, when the sources' samples were seen this often."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the last step."""
    gradient_accumulation: int = 1
    """Micro-batches of one optimizer step. With shards it follows from data.global_batch_size, data.micro_batch_size
    and the ranks: 1 is then any number, another one must agree."""
    gradient_checkpointing: Literal["none", "selective", "full"] = "none"
    """Compute each block's activations again in the backward: all of them, or all but products and attention."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    """torch.compile each block with this mode."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the network computes in; master weights, gradient reduction and EMA are float32 either way."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights, reached by min(decay, (1 + n) / (10 + n))."""

    shift: float = 3.0
    """Flux shift of the timesteps towards data, in training and in sampling."""
    logit_normal_sampling: bool = True
    """Logit-normal timesteps; uniform otherwise."""
    logit_mean: float = 0.0
    """Mean of the logit-normal."""
    logit_std: float = 1.0
    """Standard deviation of the logit-normal."""
    stratified_sampling: bool = False
    """Spread the timesteps of a global batch evenly: one in each of as many equal parts."""
    use_snr_weighting: bool = True
    """Weight the main loss by min-SNR."""
    snr_gamma: float = 5.0
    """Gamma of the min-SNR weights."""
    use_huber_loss: bool = False
    """Huber instead of squared error in the main loss."""
    huber_delta: float = 0.1
    """Where the Huber losses turn linear."""
    use_spatial_weighting: bool = False
    """Weight the main loss by the Sol teacher's spatial map."""
    text_dropout: float = 0.1
    """Probability that a sample is trained on the empty prompt, for classifier-free guidance."""

    enable_lune: bool = True
    """Distil the Lune teacher's features."""
    lune_weight: float = 0.1
    """Weight of the Lune loss."""
    lune_warmup_steps: int = 1000
    """Steps over which that weight rises."""
    lune_dropout: float = 0.1
    """Probability that the network sees its own Lune prediction instead of the teacher's features."""
    lune_mode: Literal["cosine", "huber", "soft", "hard"] = "cosine"
    """Distance of the Lune loss."""
    enable_sol: bool = True
    """Distil the Sol teacher's attention statistics."""
    sol_weight: float = 0.05
    """Weight of the Sol loss."""
    sol_warmup_steps: int = 2000
    """Steps over which that weight rises."""
    sol_dropout: float = 0.1
    """Probability that the network sees its own Sol prediction instead of the teacher's."""

    checkpoint_dir: str = "checkpoints"
    """Where checkpoints go, relative to the run folder."""
    save_every_steps: int = 5000
    """Steps between checkpoints; 0 saves none by step."""
    keep_last_n_steps: int = 3
    """Step checkpoints kept; 0 keeps all."""
    save_every_epochs: int = 1
    """Epochs between checkpoints; 0 saves none by epoch."""
    keep_last_n_epochs: int = 3
    """Epoch checkpoints kept; 0 keeps all."""
    save_pt: bool = False
    """Also write step_N.pt: weights, EMA, optimizer and configs in one file."""
    hf_repo_id: str | None = None
    """Model repo of the Hugging Face Hub, USER/NAME, that weights are uploaded to while training goes on."""
    hf_run_name: str | None = None
    """Folder in its checkpoint_runs/. Default: the run folder's name."""
    upload_every_steps: int = 0
    """Steps between uploads; 0 uploads none by step."""
    upload_every_epochs: int = 1
    """Epochs between uploads; 0 uploads none by epoch. The end of the run is always uploaded."""
    upload_wait: int = 600
    """Seconds that the end of a run waits for the last upload."""
    validate_every: int = 1000
    """Steps between validations on held-out samples (data.val_fraction); the best weights are kept. 0: none."""
    validation_samples: int = 1024
    """Held-out samples of a validation, each at 8 timesteps; all of them where there are fewer."""
    max_nonfinite_steps: int = 20
    """Steps in a row with a NaN or infinite loss or gradient, or a spike, each skipped, before the run stops."""
    max_loss_spike: float = 0.0
    """Skip a step whose loss is more than this many times the median of the last 100 steps; 0: none."""

    log_every: int = 100
    """Steps between progress lines and TensorBoard scalars; metrics.jsonl has every step."""
    tensorboard_dir: str = "logs"
    """Where TensorBoard's files go, relative to the run folder."""
    profile_at: int = 0
    """Step from which rank 0 is profiled; 0: never."""
    profile_steps: int = 5
    """Steps that are profiled."""
    sample_every: int = 2000
    """Steps between sample grids; 0 draws none."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts of the sample grids, encoded once at the start."""
    sample_dir: str = "samples"
    """Where sample grids go, relative to the run folder."""
    sample_steps: int = 28
    """Euler steps of a sample."""
    guidance_scale: float = 5.0
    """Classifier-free guidance of a sample."""
    zoo: str = "flux"
    """Models that encode sample prompts and decode samples: flux, tiny, or a directory."""

    def __post_init__(self):
        self.betas, self.sample_prompts = tuple(self.betas), list(self.sample_prompts or [])
        if isinstance(self.dtype, torch.dtype):
            self.dtype = str(self.dtype).removeprefix("torch.")
        if isinstance(self.gradient_checkpointing, bool):
            self.gradient_checkpointing = "full" if self.gradient_checkpointing else "none"
        for name, hint in typing.get_type_hints(type(self)).items():
            hint = next((part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is Literal), None)
            accepted = typing.get_args(hint) if hint else ()
            value = getattr(self, name)
            choice = f"must be one of {', '.join(accepted)}"
            _require(not accepted or value in (*accepted, getattr(type(self), name)), name, value, choice)
        positive = ("learning_rate", "muon_scale", "total_steps", "shift", "snr_gamma", "huber_delta")
        positive += (
            "logit_std",
            "gradient_accumulation",
            "log_every",
            "sample_steps",
            "max_nonfinite_steps",
            "validation_samples",
            "profile_steps",
        )
        for name in positive:
            _require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        _require(not 0 < self.max_loss_spike <= 1, "max_loss_spike", self.max_loss_spike, "must be 0 or more than 1")
        for name in ("text_dropout", "lune_dropout", "sol_dropout"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be in [0, 1]")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "must be in [0, 1)")
        _require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "must be two numbers in [0, 1)")
        not_negative = ("weight_decay", "grad_clip", "warmup_steps", "min_lr", "lune_weight", "lune_warmup_steps")
        not_negative += ("sol_weight", "sol_warmup_steps", "save_every_steps", "keep_last_n_steps", "sample_every")
        not_negative += ("save_every_epochs", "keep_last_n_epochs", "guidance_scale", "validate_every", "profile_at")
        not_negative += ("max_loss_spike", "upload_every_steps", "upload_every_epochs", "upload_wait")
        for name in not_negative:
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        _require(self.max_epochs is None or self.max_epochs > 0, "max_epochs", self.max_epochs, "must be positive")
        for name, pattern in (("hf_repo_id", r"[\w.-]+/[\w.-]+"), ("hf_run_name", r"\w[\w.-]*")):
            value = getattr(self, name)
            _require(value is None or re.fullmatch(pattern, value), name, value, f"must be like {pattern}")
        within = f"must be at most trainer.learning_rate = {self.learning_rate}"
        _require(self.min_lr <= self.learning_rate, "min_lr", self.min_lr, within)
        if self.use_spatial_weighting and not self.enable_sol:
            raise ValueError("trainer.use_spatial_weighting needs trainer.enable_sol = true: its map is the weight")


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"trainer.{name} is {value}: it {rule}")


@dataclass
class RunConfig:
    model: TinyFluxConfig = field(default_factory=TinyFluxConfig)
    """The network. Sizes that the shards fix are taken from their manifest unless given."""
    data: DataConfig = field(default_factory=DataConfig)
    """Sources and batches."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Optimization, losses, checkpoints, samples."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is spread over ranks."""
    run_dir: str = "runs/tinyflux"
    """Folder of the run. One that holds checkpoints is resumed."""
    dry_run: bool = False
    """Say what would run, with sizes, memory, the first batch and the speed of the data, and stop."""

    def to_dict(self) -> dict:
        """Plain values, as training_config.json has them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _arguments(table: dict, cls: type, prefix: str = "") -> list[str]:
    """A TOML table as command-line arguments of a dataclass. Raises ValueError on keys that it has not."""
    hints = typing.get_type_hints(cls)
    arguments = []
    for key, value in table.items():
        if key not in hints:
            raise ValueError(f"unknown key {prefix}{key}. Accepted here: {', '.join(sorted(hints))}")
        name = f"{prefix}{key}".replace("_", "-")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{key} = {value!r}: it must be a table, [{prefix}{key}]")
            arguments += _arguments(value, hints[key], f"{prefix}{key}.")
        elif isinstance(value, bool):
            head, _, last = name.rpartition(".")
            arguments.append("--" + name if value else f"--{head}.no-{last}".replace("--.", "--"))
        else:
            arguments += ["--" + name, *map(str, value if isinstance(value, list) else [value])]
    return arguments


def load_config(argv: list[str], presets: Path, description: str = "") -> tuple[RunConfig, set[str]]:
    """The run's config from `[--config FILE.toml|PRESET] [--group.key value ...]`, and the names of the keys given.

    The file's values are arguments that come before the command line's; a preset is a file of the folder `presets`.
    Exits with a message on a wrong type or value; raises ValueError on an unknown key of the file and
    FileNotFoundError where there is none.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(argv)
    arguments = []
    if known.config:
        path, preset = Path(known.config), presets / f"{known.config}.toml"
        if not path.is_file() and not preset.is_file():
            names = ", ".join(sorted(p.stem for p in presets.glob("*.toml")))
            raise FileNotFoundError(f"--config {known.config}: no such file, and no preset; these are {names}")
        path = path if path.is_file() else preset
        try:
            arguments = _arguments(tomllib.loads(path.read_text()), RunConfig)
        except ValueError as error:  # tomllib's own errors are ValueErrors too
            raise ValueError(f"{path}: {error}") from error
    arguments += rest
    given = {a.split("=")[0].removeprefix("--").replace("-", "_") for a in arguments if a.startswith("--")}
    return tyro.cli(RunConfig, args=arguments, description=description), given


def fit_model(config: TinyFluxConfig, given: set[str], fields: dict[str, tuple[int, ...]]) -> TinyFluxConfig:
    """The model config with the sizes that the shards fix.

    given: keys that the user set, as `model.in_channels`; fields: shape of each tensor of the shards. Raises
    ValueError where a key that was set contradicts the shards.
    """
    sizes = {"in_channels": ("latents", 0), "joint_attention_dim": ("t5_embeds", 1)}
    sizes |= {"pooled_projection_dim": ("clip_pooled", 0), "lune_expert_dim": ("lune", 1)}
    sizes |= {"sol_spatial_size": ("sol_spatial", 1)}
    changes = {}
    for key, (name, axis) in sizes.items():
        if name not in fields:
            continue
        size, value = fields[name][axis], getattr(config, key)
        if f"model.{key}" in given and value != size:
            raise ValueError(f"model.{key} is {value}, but the shards' {name} are {list(fields[name])}")
        changes[key] = size
    return dataclasses.replace(config, **changes)
