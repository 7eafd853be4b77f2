"""The settings of a run: dataclasses read from TOML and the command line, refused where they make no sense.

Nothing here needs torch, so that commands show their options at once.
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
    """State of each trained weight: 8 bytes (adamw), 4 (muon: for training from scratch, in fewer steps), 2 (adamw8bit,
    from torchao: pip install 'tinyflux-deep[8bit]') or almost none (adafactor; its learning rate is relative to the
    weights' size: try 1e-2)."""
    learning_rate: Annotated[float, Above(0)] = 1e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.01
    """Decoupled weight decay, on matrices only: norms, biases and gates have none."""
    betas: Annotated[tuple[float, float], Within(0, 1, open_high=True)] = (0.9, 0.95)
    """Adam's momentum factors; adafactor has none."""
    muon_scale: Annotated[float, Above(0)] = 0.2
    """Root mean square of Muon's updates before the learning rate: 0.2 is that of AdamW's; small networks take more."""
    grad_clip: Annotated[float, AtLeast(0)] = 1.0
    """Largest global gradient norm; 0 does not clip."""
    warmup_steps: Annotated[int, AtLeast(0)] = 1000
    """Steps over which the learning rate rises."""
    warmup_type: Literal["linear", "cosine"] = "linear"
    """How the learning rate rises."""
    total_steps: Annotated[int, AtLeast(1)] = 100_000
    """Optimizer steps of the whole run."""
    init_from: str | None = None
    """Weights to start from at step 0, published or our own: a file, a folder or user/repo[:sub/folder]. EMA where
    there is one. The network's shape comes with them."""
    freeze: list[str] = field(default_factory=list)
    """Parts that are not trained: names of modules or parameters, with * for any, such as double_blocks.* or txt_in."""
    lora_rank: Annotated[int, AtLeast(0)] = 0
    """Train adapters of this rank instead of the weights that init_from gives (LoRA, from peft: pip install
    'tinyflux-deep[lora]'); 0: the weights themselves."""
    lora_alpha: Annotated[float, Above(0)] = 16.0
    """The adapters' products are scaled by lora_alpha / lora_rank."""
    lora_targets: list[str] = field(default_factory=lambda: ["*_blocks.*.attn.*", "*_blocks.*mlp.*"])
    """Linear layers that get adapters: their names, with * for any, such as single_blocks.*.attn.qkv."""
    max_epochs: Annotated[int | None, AtLeast(1)] = None
    """End earlier, when the sources' samples were seen this often; the learning rate's schedule ends there too."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    min_lr: Annotated[float, AtLeast(0)] = 0.0
    """Learning rate at the last step."""
    gradient_accumulation: Annotated[int, AtLeast(1)] = 1
    """Micro-batches of one optimizer step. With shards it follows from data.global_batch_size, data.micro_batch_size
    and the ranks: 1 is then any number, another one must agree."""
    gradient_checkpointing: Literal["none", "selective", "full"] = "none"
    """Compute each block's activations again in the backward: all of them, or all but products and attention."""
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] | None = None
    """torch.compile each block with this mode. Those with CUDA graphs fail with sharded weights, which move."""
    deterministic: bool = False
    """Only kernels that give the same bits every time, so that a run can be repeated bitwise on the same number of the
    same devices; attention's backward is slower."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the network computes in; master weights, gradient reduction and EMA are float32 either way."""
    ema_decay: Annotated[float, Within(0, 1, open_high=True)] = 0.9999
    """Decay of the averaged weights, reached by min(decay, (1 + n) / (10 + n))."""

    shift: Annotated[float, Above(0)] = 3.0
    """Flux shift of the timesteps towards data, in training and in sampling."""
    logit_normal_sampling: bool = True
    """Logit-normal timesteps; uniform otherwise."""
    logit_mean: float = 0.0
    """Mean of the logit-normal."""
    logit_std: Annotated[float, Above(0)] = 1.0
    """Standard deviation of the logit-normal."""
    stratified_sampling: bool = False
    """Spread the timesteps of a global batch evenly: one in each of as many equal parts."""
    use_snr_weighting: bool = True
    """Weight the main loss by min-SNR."""
    snr_gamma: Annotated[float, Above(0)] = 5.0
    """Gamma of the min-SNR weights."""
    snr_form: Literal["noise", "velocity"] = "noise"
    """Min-SNR weights of noise prediction, min(snr, gamma) / snr, as published, or of velocity prediction,
    min(snr, gamma) / (snr + 1), which weighs what is mostly noise less."""
    use_huber_loss: bool = False
    """Huber instead of squared error in the main loss."""
    huber_delta: Annotated[float, Above(0)] = 0.1
    """Where the Huber losses turn linear."""
    use_spatial_weighting: bool = False
    """Weight the main loss by the Sol teacher's spatial map."""
    text_dropout: Annotated[float, Within(0, 1)] = 0.1
    """Probability that a sample is trained on the empty prompt, for classifier-free guidance."""

    enable_lune: bool = True
    """Distil the Lune teacher's features."""
    lune_weight: Annotated[float, AtLeast(0)] = 0.1
    """Weight of the Lune loss."""
    lune_warmup_steps: Annotated[int, AtLeast(0)] = 1000
    """Steps over which that weight rises."""
    lune_dropout: Annotated[float, Within(0, 1)] = 0.1
    """Probability that the network sees its own Lune prediction instead of the teacher's features."""
    lune_mode: Literal["cosine", "huber", "soft", "hard"] = "cosine"
    """Distance of the Lune loss."""
    enable_sol: bool = True
    """Distil the Sol teacher's attention statistics."""
    sol_weight: Annotated[float, AtLeast(0)] = 0.05
    """Weight of the Sol loss."""
    sol_warmup_steps: Annotated[int, AtLeast(0)] = 2000
    """Steps over which that weight rises."""
    sol_dropout: Annotated[float, Within(0, 1)] = 0.1
    """Probability that the network sees its own Sol prediction instead of the teacher's."""
    enable_align: bool = False
    """Align a block's features with a teacher's grid, the shards' group `align` (REPA), by a head that exported weights
    do not hold."""
    align_block: Annotated[int, AtLeast(0)] = 8
    """The block that is aligned, counted from 0 through double blocks, then single ones."""
    align_weight: Annotated[float, AtLeast(0)] = 0.5
    """Weight of the alignment loss."""
    align_warmup_steps: Annotated[int, AtLeast(0)] = 0
    """Steps over which that weight rises."""

    checkpoint_dir: str = "checkpoints"
    """Where checkpoints go, relative to the run folder."""
    save_every_steps: Annotated[int, AtLeast(0)] = 5000
    """Steps between checkpoints; 0 saves none by step."""
    keep_last_n_steps: Annotated[int, AtLeast(0)] = 3
    """Step checkpoints kept; 0 keeps all."""
    save_every_minutes: Annotated[float, AtLeast(0)] = 15.0
    """Minutes between checkpoints, and the fewest between those that epochs ask for; 0 saves none by the clock."""
    save_every_epochs: Annotated[int, AtLeast(0)] = 1
    """Epochs between checkpoints; 0 saves none by epoch. Where an epoch is shorter than save_every_minutes, that long
    between them."""
    keep_last_n_epochs: Annotated[int, AtLeast(0)] = 3
    """Epoch checkpoints kept; 0 keeps all."""
    save_pt: bool = False
    """Also write step_N.pt: weights, EMA, optimizer and configs in one file."""
    hf_repo_id: Annotated[str | None, Match(r"[\w.-]+/[\w.-]+", "like USER/NAME")] = None
    """Model repo of the Hugging Face Hub, USER/NAME, that weights are uploaded to while training continues."""
    hf_run_name: Annotated[str | None, Match(r"\w[\w.-]*", "a plain name, of letters, digits, _, . and -")] = None
    """Folder in its checkpoint_runs/. Default: the run folder's name."""
    hf_license: str = "mit"
    """License of the weights, by its name on the Hub; said in the model card."""
    upload_every_steps: Annotated[int, AtLeast(0)] = 0
    """Steps between uploads; 0 uploads none by step."""
    upload_every_epochs: Annotated[int, AtLeast(0)] = 1
    """Epochs between uploads, which come with checkpoints; 0 uploads none by epoch. The end of the run is always
    uploaded."""
    upload_wait: Annotated[int, AtLeast(0)] = 600
    """Seconds that the end of a run waits for the last upload."""
    validate_every: Annotated[int, AtLeast(0)] = 1000
    """Steps between validations on held-out samples (data.val_fraction); the best weights are kept. 0: none."""
    validation_samples: Annotated[int, AtLeast(1)] = 1024
    """Held-out samples of a validation, each at 8 timesteps; all of them where there are fewer."""
    evaluate_every: Annotated[int, AtLeast(0)] = 0
    """Steps between evaluations: held-out samples are drawn and scored as by the command evaluate. 0: none."""
    evaluation_samples: Annotated[int, AtLeast(1)] = 64
    """Held-out samples (data.val_fraction) of an evaluation; all of them where there are fewer."""
    max_nonfinite_steps: Annotated[int, AtLeast(1)] = 20
    """Steps in a row with a NaN or infinite loss or gradient, or a spike, each skipped, before the run stops."""
    max_loss_spike: Annotated[float, AtLeast(0)] = 0.0
    """Skip a step whose loss is more than this many times the median of the last 100 steps; 0: none."""

    log_every: Annotated[int, AtLeast(1)] = 100
    """Steps between progress lines and TensorBoard scalars; metrics.jsonl has every step."""
    tensorboard_dir: str = "logs"
    """Where TensorBoard's files go, relative to the run folder."""
    profile_at: Annotated[int, AtLeast(0)] = 0
    """Step from which rank 0 is profiled; 0: never."""
    profile_steps: Annotated[int, AtLeast(1)] = 5
    """Steps that are profiled."""
    sample_every: Annotated[int, AtLeast(0)] = 2000
    """Steps between sample grids; 0 draws none."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts of the sample grids, encoded once at the start."""
    sample_raw: bool = True
    """Draw each grid with the trained weights too, beside the averaged ones."""
    sample_dir: str = "samples"
    """Where sample grids go, relative to the run folder."""
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
            raise ValueError("trainer.use_spatial_weighting needs trainer.enable_sol = true: its map is the weight")


@dataclass
class ParallelConfig:
    shard_size: Annotated[int, AtLeast(0)] = 0
    """Ranks that one copy of the model is sharded over; 0 is all of them. Fewer: HSDP, replicas of shard groups
    (set it to the GPUs of a node to keep the gathering of weights inside the node)."""
    reshard_after_forward: bool = True
    """Free gathered weights after the forward and gather them again for the backward: less memory, more traffic."""
    timeout: Annotated[int, AtLeast(1)] = 600
    """Seconds after which a collective that a dead rank never joins ends the job."""

    def __post_init__(self):
        check(self, "parallel.")


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
    start_over: bool = False
    """Begin at step 0 in a folder that has what remains of a run but no checkpoint; one that has is resumed."""
    dry_run: bool = False
    """Say what would run, with sizes, memory, the first batch and the speed of the data, and stop."""

    def __post_init__(self):
        # a rank gives up its wait for data somewhat later than data.timeout says
        least, data, parallel = math.ceil(1.2 * self.data.timeout) + 1, self.data.timeout, self.parallel.timeout
        if parallel < least:
            raise ValueError(
                f"data.timeout is {data:g}: with parallel.timeout = {parallel} the other ranks would end the run"
                " before the one that waits for data could say for which shard. parallel.timeout must be at least"
                f" {least}, or data.timeout at most {max(0.0, (parallel - 1) / 1.2):g}"
            )

    def to_dict(self) -> dict:
        """Plain values, as training_config.json has them: URLs without secrets."""
        return public(json.loads(json.dumps(dataclasses.asdict(self))))


def load_config(argv: list[str], presets: Path, description: str = "") -> tuple[RunConfig, set[str]]:
    """The run's config and the names of the keys that were given; see `settings.load`."""
    return settings.load(RunConfig, argv, presets=presets, description=description, prog="launch/train.py")


def check_accumulation(config: RunConfig, ranks: int) -> None:
    """Raises ValueError where trainer.gradient_accumulation is given and contradicts the batch sizes."""
    data, given, follows = config.data, config.trainer.gradient_accumulation, config.data.accumulation(ranks)
    if given not in (1, follows):
        raise ValueError(
            f"trainer.gradient_accumulation is {given}, but it follows from data.global_batch_size / (ranks x"
            f" data.micro_batch_size) = {data.global_batch_size} / ({ranks} x {data.micro_batch_size}) = {follows}:"
            " leave it out, or change those"
        )


# sizes of the network that the shards fix: the field, and its axis
SIZES = {
    "in_channels": ("latents", 0),
    "joint_attention_dim": ("t5_embeds", 1),
    "pooled_projection_dim": ("clip_pooled", 0),
    "lune_expert_dim": ("lune", 1),
    "sol_spatial_size": ("sol_spatial", 1),
}


def fit_model(config: TinyFluxConfig, given: set[str], fields: dict[str, tuple[int, ...]]) -> TinyFluxConfig:
    """The model config with the sizes that the shards fix.

    given: keys that the user set, as `model.in_channels`; fields: shape of each tensor of the shards. Raises
    ValueError where a key that was set contradicts the shards.
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
