"""The settings of a run: dataclasses read from TOML and the command line, checked when they are built.

This module does not import torch, so that --help is fast.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tinyflux.model.config import TinyFluxConfig
from tinyflux.shards.config import DataConfig
from tinyflux.trainer.optim.registry import OPTIMIZERS
from tinyflux.util import settings
from tinyflux.util.settings import Above, AtLeast, Match, Within, check, require
from tinyflux.util.urls import public


@dataclass
class TrainerConfig:
    optimizer: Literal[*OPTIMIZERS] = "adamw"
    """adamw keeps 8 bytes of state per trained weight, muon 4 (trains from scratch in fewer steps), adamw8bit 2 (from
    torchao: pip install 'tinyflux-deep[8bit]'), adafactor almost none (its learning rate is relative to the size of the
    weights: try 1e-2)."""
    learning_rate: Annotated[float, Above(0)] = 1e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.01
    """Decoupled weight decay of matrices; norms, biases and gates do not decay."""
    betas: Annotated[tuple[float, float], Within(0, 1, open_high=True)] = (0.9, 0.95)
    """Adam's betas; adafactor does not use them."""
    muon_scale: Annotated[float, Above(0)] = 0.2
    """Root mean square of Muon's updates before the learning rate. 0.2 matches AdamW; small networks can use more."""
    grad_clip: Annotated[float, AtLeast(0)] = 1.0
    """Clip the global gradient norm to this value; 0 does not clip."""
    warmup_steps: Annotated[int, AtLeast(0)] = 1000
    """Steps over which the learning rate rises."""
    warmup_type: Literal["linear", "cosine"] = "linear"
    """How the learning rate rises."""
    total_steps: Annotated[int, AtLeast(1)] = 100_000
    """Optimizer steps of the whole run."""
    init_from: Annotated[str | None, Match(r".+", "a file, a folder or user/repo")] = None
    """Weights to start from at step 0: a file, a folder or user/repo[:sub/folder]. Averaged weights are preferred. They
    also set the sizes of the network."""
    freeze: list[str] = field(default_factory=list)
    """Names of modules or parameters that are not trained; * matches anything: double_blocks.* or txt_in."""
    lora_rank: Annotated[int, AtLeast(0)] = 0
    """Train LoRA adapters of this rank on top of init_from (pip install 'tinyflux-deep[lora]'); 0 trains the weights
    themselves."""
    lora_alpha: Annotated[float, Above(0)] = 16.0
    """The adapters' products are scaled by lora_alpha / lora_rank."""
    lora_targets: list[str] = field(default_factory=lambda: ["*_blocks.*.attn.*", "*_blocks.*mlp.*"])
    """Names of linear layers that get adapters; * matches anything: single_blocks.*.attn.qkv."""
    max_epochs: Annotated[int | None, AtLeast(1)] = None
    """Stop after this many epochs, if that is before total_steps; the learning rate schedule ends there too."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    min_lr: Annotated[float, AtLeast(0)] = 0.0
    """Learning rate at the last step."""
    gradient_accumulation: Annotated[int, AtLeast(1)] = 1
    """Micro-batches per optimizer step. With shards it follows from data.global_batch_size, data.micro_batch_size and
    the number of ranks: leave it at 1, or give exactly that value."""
    gradient_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute each block's activations in the backward: full recomputes all, selective all except matrix products and
    attention."""
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] | None = None
    """torch.compile each block with this mode. Modes with CUDA graphs do not work with sharded weights."""
    deterministic: bool = False
    """Use only deterministic kernels, so that a run is bitwise repeatable on the same number of the same devices;
    attention's backward is slower."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the network's computations; master weights, gradient reduction and EMA are always float32."""
    ema_decay: Annotated[float, Within(0, 1, open_high=True)] = 0.9999
    """Decay of the averaged weights; after n updates it is min(decay, (1 + n) / (10 + n))."""

    shift: Annotated[float, Above(0)] = 3.0
    """Flux shift of the timesteps towards data, in training and in sampling."""
    logit_normal_sampling: bool = True
    """Draw logit-normal timesteps; otherwise uniform ones."""
    logit_mean: float = 0.0
    """Mean of the logit-normal."""
    logit_std: Annotated[float, Above(0)] = 1.0
    """Standard deviation of the logit-normal."""
    stratified_sampling: bool = False
    """Spread the timesteps of a global batch evenly: of as many equal parts as it has samples, each gets one."""
    use_snr_weighting: bool = True
    """Weight the main loss by min-SNR."""
    snr_gamma: Annotated[float, Above(0)] = 5.0
    """Gamma of the min-SNR weights."""
    snr_form: Literal["noise", "velocity"] = "noise"
    """Min-SNR weights: noise is min(snr, gamma) / snr, as published; velocity is min(snr, gamma) / (snr + 1), which
    gives noisy timesteps less weight."""
    use_huber_loss: bool = False
    """Huber instead of squared error in the main loss."""
    huber_delta: Annotated[float, Above(0)] = 0.1
    """Error above which the Huber losses are linear."""
    use_spatial_weighting: bool = False
    """Weight the main loss by the Sol teacher's spatial map."""
    text_dropout: Annotated[float, Within(0, 1)] = 0.1
    """Probability that a sample is trained on the empty prompt, for classifier-free guidance."""

    enable_lune: bool = True
    """Distil the Lune teacher's features."""
    lune_weight: Annotated[float, AtLeast(0)] = 0.1
    """Weight of the Lune loss."""
    lune_warmup_steps: Annotated[int, AtLeast(0)] = 1000
    """Steps over which the weight rises from 0."""
    lune_dropout: Annotated[float, Within(0, 1)] = 0.1
    """Probability that the network sees its own Lune prediction instead of the teacher's features."""
    lune_mode: Literal["cosine", "huber", "soft", "hard"] = "cosine"
    """Distance function of the Lune loss."""
    enable_sol: bool = True
    """Distil the Sol teacher's attention statistics."""
    sol_weight: Annotated[float, AtLeast(0)] = 0.05
    """Weight of the Sol loss."""
    sol_warmup_steps: Annotated[int, AtLeast(0)] = 2000
    """Steps over which the weight rises from 0."""
    sol_dropout: Annotated[float, Within(0, 1)] = 0.1
    """Probability that the network sees its own Sol prediction instead of the teacher's."""
    enable_align: bool = False
    """Align a block's features with a third teacher's grid (REPA), the group `align` of the shards. The head for it is
    used in training only and is not exported."""
    align_block: Annotated[int, AtLeast(0)] = 8
    """The block to align, counted from 0: first the double blocks, then the single blocks."""
    align_weight: Annotated[float, AtLeast(0)] = 0.5
    """Weight of the alignment loss."""
    align_warmup_steps: Annotated[int, AtLeast(0)] = 0
    """Steps over which the weight rises from 0."""

    checkpoint_dir: str = "checkpoints"
    """Folder of the checkpoints, relative to the run folder."""
    save_every_steps: Annotated[int, AtLeast(0)] = 5000
    """Steps between checkpoints; 0: do not save by steps."""
    keep_last_n_steps: Annotated[int, AtLeast(0)] = 3
    """Number of step checkpoints to keep; 0 keeps all."""
    save_every_minutes: Annotated[float, AtLeast(0)] = 15.0
    """Minutes between checkpoints, and the least time between epoch checkpoints; 0: do not save by time."""
    save_every_epochs: Annotated[int, AtLeast(0)] = 1
    """Epochs between checkpoints, but never less than save_every_minutes; 0: do not save by epochs."""
    keep_last_n_epochs: Annotated[int, AtLeast(0)] = 3
    """Number of epoch checkpoints to keep; 0 keeps all."""
    save_pt: bool = False
    """Also write step_N.pt: weights, EMA, optimizer and configs in one file."""
    hf_repo_id: Annotated[str | None, Match(r"[\w.-]+/[\w.-]+", "like USER/NAME")] = None
    """Model repo on the Hugging Face Hub, USER/NAME; weights are uploaded to it in the background."""
    hf_run_name: Annotated[str | None, Match(r"\w[\w.-]*", "a plain name, of letters, digits, _, . and -")] = None
    """Folder in checkpoint_runs/ of that repo. Default: the run folder's name."""
    hf_license: str = "mit"
    """License of the weights for the model card, by its Hub identifier."""
    upload_every_steps: Annotated[int, AtLeast(0)] = 0
    """Steps between uploads; 0: do not upload by steps."""
    upload_every_epochs: Annotated[int, AtLeast(0)] = 1
    """Epochs between uploads, which happen at checkpoints; 0: do not upload by epochs. The end of the run is always
    uploaded."""
    upload_wait: Annotated[int, AtLeast(0)] = 600
    """Seconds that the end of a run waits for the last upload."""
    validate_every: Annotated[int, AtLeast(0)] = 1000
    """Steps between validations on held-out samples (data.val_fraction); the best weights are kept. 0: never."""
    validation_samples: Annotated[int, AtLeast(1)] = 1024
    """Held-out samples per validation, each at 8 timesteps; all if there are fewer. For a remote source, they come from
    a quarter of its shards at most, are downloaded once, and stay in memory."""
    evaluate_every: Annotated[int, AtLeast(0)] = 0
    """Steps between evaluations, which draw and score held-out samples like the command evaluate. 0: never."""
    evaluation_samples: Annotated[int, AtLeast(1)] = 64
    """Held-out samples (data.val_fraction) per evaluation; all if there are fewer."""
    max_nonfinite_steps: Annotated[int, AtLeast(1)] = 20
    """Stop the run after this many skipped steps in a row (NaN or infinite loss or gradient, or a loss spike)."""
    max_loss_spike: Annotated[float, AtLeast(0)] = 0.0
    """Skip a step whose loss is more than this many times the median of the last 100 steps; 0: never."""

    log_every: Annotated[int, AtLeast(1)] = 100
    """Steps between progress lines and TensorBoard scalars; metrics.jsonl has every step."""
    tensorboard_dir: str = "logs"
    """Folder of TensorBoard's files, relative to the run folder."""
    profile_at: Annotated[int, AtLeast(0)] = 0
    """Profile rank 0 from this step on; 0: never."""
    profile_steps: Annotated[int, AtLeast(1)] = 5
    """Number of steps to profile."""
    sample_every: Annotated[int, AtLeast(0)] = 2000
    """Steps between sample grids; 0: never."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts of the sample grids, encoded once at the start."""
    sample_raw: bool = True
    """Draw each grid with the trained weights too, not only with the averaged ones."""
    sample_dir: str = "samples"
    """Folder of the sample grids, relative to the run folder."""
    sample_steps: Annotated[int, AtLeast(1)] = 28
    """Euler steps of a sample."""
    guidance_scale: Annotated[float, AtLeast(0)] = 5.0
    """Classifier-free guidance of a sample."""
    zoo: str = "flux"
    """Models that encode sample prompts and decode samples: flux, tiny, or a directory."""

    def __post_init__(self):
        self.betas, self.sample_prompts = tuple(self.betas), list(self.sample_prompts or [])
        if not isinstance(self.dtype, str):  # a torch.dtype
            self.dtype = str(self.dtype).removeprefix("torch.")
        if isinstance(self.gradient_checkpointing, bool):
            self.gradient_checkpointing = "full" if self.gradient_checkpointing else "none"
        check(self, "trainer.")
        require(not 0 < self.max_loss_spike <= 1, "trainer.max_loss_spike", self.max_loss_spike, "0 or more than 1")
        at_most = f"at most trainer.learning_rate = {self.learning_rate}"
        require(self.min_lr <= self.learning_rate, "trainer.min_lr", self.min_lr, at_most)
        if self.use_spatial_weighting and not self.enable_sol:
            raise ValueError("trainer.use_spatial_weighting needs trainer.enable_sol = true: Sol's map is the weight")


@dataclass
class ParallelConfig:
    shard_size: Annotated[int, AtLeast(0)] = 0
    """Ranks that one copy of the model is sharded over; 0 is all ranks. Fewer ranks is HSDP: each group of that many
    holds a replica (with the number of GPUs per node, weights are gathered inside the node)."""
    reshard_after_forward: bool = True
    """Free gathered weights after the forward and gather them again for the backward: less memory, more traffic."""
    timeout: Annotated[int, AtLeast(1)] = 600
    """Seconds after which a collective that a rank does not join ends the job."""

    def __post_init__(self):
        check(self, "parallel.")


@dataclass
class RunConfig:
    model: TinyFluxConfig = field(default_factory=TinyFluxConfig)
    """The network. Sizes that depend on the shards are taken from their manifest unless given."""
    data: DataConfig = field(default_factory=DataConfig)
    """Sources and batches."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Optimization, losses, checkpoints, samples."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is sharded over ranks."""
    run_dir: str = "runs/tinyflux"
    """Folder of the run. If it has checkpoints, the run is resumed."""
    start_over: bool = False
    """Start at step 0 in a folder that has remains of a run but no checkpoint. If it has one, the run is resumed."""
    dry_run: bool = False
    """Print the config, sizes, memory, the first batch and the data speed, and stop."""

    def __post_init__(self):
        # a rank stops waiting for data slightly later than data.timeout
        least, data, parallel = math.ceil(1.2 * self.data.timeout) + 1, self.data.timeout, self.parallel.timeout
        if parallel < least:
            raise ValueError(
                f"data.timeout is {data:g}: with parallel.timeout = {parallel}, the other ranks would end the run"
                " before the rank that waits for data could name its shard. parallel.timeout must be at least"
                f" {least}, or data.timeout at most {max(0.0, (parallel - 1) / 1.2):g}"
            )

    def to_dict(self) -> dict:
        """Plain values for training_config.json: URLs without secrets."""
        return public(json.loads(json.dumps(dataclasses.asdict(self))))


def load_config(argv: list[str], presets: Path, description: str = "") -> tuple[RunConfig, set[str]]:
    """The run's config and the names of the keys that were given; see `settings.load`."""
    return settings.load(RunConfig, argv, presets=presets, description=description, prog="launch/train.py")


def check_accumulation(config: RunConfig, ranks: int) -> None:
    """Raises ValueError if trainer.gradient_accumulation is given and contradicts the batch sizes."""
    data, given, follows = config.data, config.trainer.gradient_accumulation, config.data.accumulation(ranks)
    if given not in (1, follows):
        raise ValueError(
            f"trainer.gradient_accumulation is {given}, but it follows from data.global_batch_size / (ranks x"
            f" data.micro_batch_size) = {data.global_batch_size} / ({ranks} x {data.micro_batch_size}) = {follows}:"
            " leave it out, or change the batch sizes"
        )


# sizes of the network that depend on the shards: the field, and its axis
SIZES = {
    "in_channels": ("latents", 0),
    "joint_attention_dim": ("t5_embeds", 1),
    "pooled_projection_dim": ("clip_pooled", 0),
    "lune_expert_dim": ("lune", 1),
    "sol_spatial_size": ("sol_spatial", 1),
}


def fit_model(config: TinyFluxConfig, given: set[str], fields: dict[str, tuple[int, ...]]) -> TinyFluxConfig:
    """The model config with the sizes of the shards.

    given: keys that the user set, such as `model.in_channels`; fields: shape of each field of the shards. Raises
    ValueError if a key that the user set contradicts the shards.
    """
    changes = {}
    for key, (name, axis) in SIZES.items():
        if name not in fields:
            continue
        size, value = fields[name][axis], getattr(config, key)
        if f"model.{key}" in given and value != size:
            raise ValueError(f"model.{key} is {value}, but the shards' {name} are {list(fields[name])}")
        changes[key] = size
    return dataclasses.replace(config, **changes)
