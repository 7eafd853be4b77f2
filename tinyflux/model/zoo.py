"""ModelZoo: the frozen models that encode images and captions and extract the teachers' features."""

import json
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, T5EncoderModel

from tinyflux.model.loader import check_place, load_model
from tinyflux.model.pretrained import Pretrained, load_pretrained, load_tokenizer, load_unet, vocabulary_hash
from tinyflux.model.teachers import SolAttnProcessor
from tinyflux.util.devices import configure
from tinyflux.util.pixels import to_pixels

__all__ = ["FLUX", "TINY_DIR", "ModelZoo", "SolAttnProcessor"]

log = logging.getLogger(__name__)

TINY_DIR = Path(__file__).parent / "tiny"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
EXPERTS = "AbstractPhil/tinyflux-experts"
FLUX = {
    "vae": Pretrained("black-forest-labs/FLUX.1-schnell", "vae"),
    "sd_vae": Pretrained(SD15, "vae"),
    "clip": Pretrained("openai/clip-vit-large-patch14"),
    "t5": Pretrained("google/flan-t5-base"),
    "lune": Pretrained(EXPERTS, file="sd15-flow-lune-unet.safetensors"),
    "sol": Pretrained(EXPERTS, file="sd15-flow-sol-unet.safetensors"),
}
UNET_CONFIG = Pretrained(SD15, "unet")  # the config for a UNet that is a single weights file
CLIP_LENGTH = 77
WARNED = 10  # prompts that get their own warning; more are only counted


class ModelZoo:
    """Loads, runs and unloads the frozen models: vae, sd_vae, clip, t5, lune, sol, and tinyflux itself.

    zoo: "flux" (the real models, from the Hub), "tiny" (the offline ones that come with this package), or a folder
    with `vae`, `sd_vae`, `clip`, `t5`, `lune` and `sol` in it and an optional `zoo.json` {"image_size", "t5_length"}.
    dtype: one for all or {name: dtype}; default bfloat16 on CUDA, else float32. revision: one for all Hub repos or
    {name: revision}; "unet" is SD1.5's repo, whose config is used for a UNet that is a single file.
    one_at_a_time: `using` keeps a model on the device (or, on the CPU, in memory) only while it is used.
    extraction_only: models that are loaded without the parts that extraction never runs (Lune's up blocks, the VAEs'
    decoders), which saves 2.5 GB in float32.
    Every model is None until its `load_*`, then in eval mode without gradients.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        zoo: str | Path = "flux",
        revision: str | dict[str, str] | None = None,
        *,
        one_at_a_time: bool = False,
        extraction_only: Collection[str] = (),
    ):
        self.one_at_a_time, self.extraction_only = one_at_a_time, extraction_only
        self._dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys((*FLUX, "tinyflux"), dtype)
        for given in {None, *self._dtypes.values()}:
            check_place(device, given)
        self.device = torch.device(device)
        configure(self.device)
        revisions = revision if isinstance(revision, dict) else dict.fromkeys((*FLUX, "unet"), revision)
        for given, names in ((self._dtypes, (*FLUX, "tinyflux")), (revisions, (*FLUX, "unet"))):
            if unknown := given.keys() - {*names}:
                raise ValueError(f"no such model: {', '.join(sorted(unknown))}; known: {', '.join(names)}")
        if zoo != "flux" and any(revisions.values()):
            raise ValueError(f"revision: zoo {str(zoo)!r} has local files; only models of the Hub have revisions")
        self._unet_config = replace(UNET_CONFIG, revision=revisions.get("unet"))
        settings = {"image_size": 512, "t5_length": 128}
        if zoo == "flux":
            self._places = {name: replace(place, revision=revisions.get(name)) for name, place in FLUX.items()}
        else:
            folder = TINY_DIR if zoo == "tiny" else Path(zoo)
            if not folder.is_dir():
                raise FileNotFoundError(f'{folder}: a zoo is "flux", "tiny" or a folder of models')
            self._places = {name: Pretrained(str(folder), name, local=True) for name in FLUX}
            if (folder / "zoo.json").is_file():
                settings |= json.loads((folder / "zoo.json").read_text())
        self.image_size: int = settings["image_size"]
        self.t5_length: int = settings["t5_length"]
        self.vae: AutoencoderKL | None = None
        self.sd_vae: AutoencoderKL | None = None
        self.clip: CLIPTextModel | None = None
        self.t5: T5EncoderModel | None = None
        self.lune: UNet2DConditionModel | None = None
        self.sol: UNet2DConditionModel | None = None
        self.tinyflux: nn.Module | None = None
        self.tokenizers: dict = {}
        self._identities: dict[str, dict] = {}
        self._known: dict[Pretrained, dict] = {}
        self.truncated: Counter[str] = Counter()
        """For each model, the number of truncated prompts so far."""
        self.timed = False
        """Wait for the device after each model, so that `seconds` is also right on CUDA."""
        self.seconds: Counter[str] = Counter()
        """For each model, the seconds within `using`; on CUDA only correct if `timed` is set."""
        self._warned: set[str] = set()

    @classmethod
    def of(cls, image_size: int, t5_length: int, tokenizers: dict, **models: nn.Module) -> "ModelZoo":
        """A zoo of loaded models, each on its own device; tokenizers {"t5", "clip"}."""
        zoo = cls()
        zoo.image_size, zoo.t5_length, zoo.tokenizers = image_size, t5_length, tokenizers
        for name, model in models.items():
            cls._check_name(name)
            setattr(zoo, name, model)
        return zoo

    def load_vae(self, source: str | Path | None = None) -> AutoencoderKL:
        """The FLUX VAE. `source`, here and below: a folder or `user/repo[:sub/folder]` that replaces the zoo's."""
        return self._load_vae("vae", source)

    def load_sd_vae(self, source: str | Path | None = None) -> AutoencoderKL:
        """The SD1.5 VAE, for the teachers' inputs."""
        return self._load_vae("sd_vae", source)

    def load_clip(self, source: str | Path | None = None) -> CLIPTextModel:
        """The CLIP text encoder and its tokenizer."""
        return self._load_text("clip", source, CLIPTextModel)

    def load_whole_clip(self) -> CLIPModel:
        """The zoo's CLIP with vision tower and projections, for scores; the zoo does not keep it.

        Raises ValueError if the zoo's CLIP is only a text encoder.
        """
        clip = load_pretrained(CLIPModel, self._find("clip", None), dtype=self._dtype("clip"))
        return clip.eval().requires_grad_(False).to(self.device)

    def load_t5(self, source: str | Path | None = None) -> T5EncoderModel:
        """The T5 encoder and its tokenizer."""
        return self._load_text("t5", source, T5EncoderModel)

    def load_lune(self, source: str | Path | None = None) -> UNet2DConditionModel:
        """The Lune teacher. `source` may also be a safetensors file of a UNet with SD1.5's config."""
        return self._load_unet("lune", source)

    def load_sol(self, source: str | Path | None = None) -> UNet2DConditionModel:
        """The Sol teacher. `source` may also be a safetensors file of a UNet with SD1.5's config."""
        return self._load_unet("sol", source)

    def load_tinyflux(self, source: str | Path) -> nn.Module:
        """TinyFlux from a file, a folder or `user/repo[:sub/folder]`."""
        self.tinyflux = load_model(source, device=self.device, dtype=self._dtypes.get("tinyflux")).requires_grad_(False)
        return self.tinyflux

    def _load_vae(self, name: str, source: str | Path | None) -> AutoencoderKL:
        place = self._find(name, source)
        vae = load_pretrained(AutoencoderKL, place, torch_dtype=self._dtype(name))
        if name in self.extraction_only:
            vae.decoder = None
        self._keep(name, place, vae)
        self._identities[name]["scaling_factor"] = vae.config.scaling_factor
        return vae

    def _load_text(self, name: str, source: str | Path | None, kind: type[nn.Module]) -> nn.Module:
        place = self._find(name, source)
        model = load_pretrained(kind, place, dtype=self._dtype(name))
        self.tokenizers[name] = load_tokenizer(place, model.config.vocab_size)
        self._keep(name, place, model)
        self._identities[name]["vocabulary"] = vocabulary_hash(self.tokenizers[name])
        return model

    def _load_unet(self, name: str, source: str | Path | None) -> UNet2DConditionModel:
        place = self._find(name, source, single_file=True)
        if place.file:
            self._unet_config = self._unet_config.resolve()  # only once, like those of the models
            unet = load_unet(place.path(), self._unet_config, self._dtype(name), skipped=self._skipped(name))
        else:
            unet = load_pretrained(UNet2DConditionModel, place, torch_dtype=self._dtype(name))
        if extra := [key for key in ("addition_embed_type", "class_embed_type") if unet.config.get(key) is not None]:
            raise ValueError(f"{name}: {place} is not an SD1.5-type UNet: its config has {', '.join(extra)}")
        for part in self._skipped(name):
            setattr(unet, part, None)
        self._keep(name, place, unet)
        if place.file:
            self._identities[name]["config"] = self._unet_config.identity()
        return unet

    def _skipped(self, name: str) -> tuple[str, ...]:
        return ("up_blocks", "conv_norm_out", "conv_out") if name == "lune" and name in self.extraction_only else ()

    def _find(self, name: str, source: str | Path | None, single_file: bool = False) -> Pretrained:
        if source is None:
            self._places[name] = self._places[name].resolve()  # only once, so that the commit stays the same
            return self._places[name]
        place = Pretrained.parse(source, name)
        if place.file and not single_file:
            raise ValueError(f"{name}: {place} is a single file; a folder with config.json is needed")
        return place.resolve()

    def _keep(self, name: str, place: Pretrained, model: nn.Module) -> nn.Module:
        model = model.eval().requires_grad_(False).to(self.device)
        if self.device.type == "cuda" and isinstance(model, AutoencoderKL | UNet2DConditionModel):
            model = model.to(memory_format=torch.channels_last)  # the layout for convolutions on tensor cores
        setattr(self, name, model)
        if place not in self._known:
            self._known[place] = place.identity()  # only once: it reads whole files
        self._identities[name] = self._known[place] | {"dtype": str(self._dtype(name)).removeprefix("torch.")}
        return model

    def _dtype(self, name: str) -> torch.dtype:
        return self._dtypes.get(name) or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)

    def loaded(self) -> list[str]:
        """Names of the models that are loaded."""
        return [name for name in (*FLUX, "tinyflux") if getattr(self, name) is not None]

    def unload(self, name: str) -> None:
        """Unload a model and free its memory. Does nothing if it isn't loaded."""
        self._check_name(name)
        setattr(self, name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def unload_all(self) -> None:
        """Unload all models."""
        for name in self.loaded():
            self.unload(name)

    def offload(self, name: str) -> None:
        """Move a model to the CPU, where it still works."""
        self.required(name).to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def onload(self, name: str) -> None:
        """Move a model back to the zoo's device."""
        self.required(name).to(self.device)

    @contextmanager
    def using(self, name: str) -> Iterator[nn.Module]:
        """A loaded model, for a `with` block.

        With `one_at_a_time`, it is moved to the device only for the block, or, if the device is the CPU, loaded only
        for the block.
        """
        start = time.perf_counter()
        if self.one_at_a_time and getattr(self, name) is None:
            getattr(self, f"load_{name}")()
        elif self.one_at_a_time:
            self.onload(name)
        try:
            yield self.required(name)
            if self.timed and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            self.seconds[name] += time.perf_counter() - start
            if self.one_at_a_time and self.device.type == "cpu":
                self.unload(name)
            elif self.one_at_a_time:
                self.offload(name)

    def compile(self, **options) -> None:
        """Compile the slow parts of the loaded models: the VAEs' encoders and the UNets.

        options: of `torch.compile`. Sol's self-attention is not compiled, because its processor collects statistics
        outside of any graph.
        """
        for vae in (self.vae, self.sd_vae):
            if vae is not None:
                vae.encoder.compile(**options)
        if self.lune is not None:
            for block in (*self.lune.down_blocks, self.lune.mid_block):
                block.compile(**options)
        if self.sol is not None:
            for module in self.sol.modules():
                if isinstance(module, ResnetBlock2D | FeedForward):
                    module.compile(**options)

    def revision(self, name: str) -> str | None:
        """The commit of a model, None for local files. Raises as loading."""
        return (self._unet_config.resolve() if name == "unet" else self._find(name, None)).revision

    def required(self, name: str) -> nn.Module:
        """A loaded model. Raises RuntimeError, with the call that loads it, if it is not loaded."""
        self._check_name(name)
        if (model := getattr(self, name)) is None:
            raise RuntimeError(f"{name} is not loaded: call zoo.load_{name}({'source' * (name == 'tinyflux')}) first")
        return model

    @staticmethod
    def _check_name(name: str) -> None:
        if name not in (*FLUX, "tinyflux"):
            raise ValueError(f"no model {name!r} in a zoo; known: {', '.join(FLUX)}, tinyflux")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of an image of the zoo's size."""
        return self.latent_shape_of(self.image_size, self.image_size)

    @property
    def factor(self) -> int:
        """Pixels per side of a latent pixel."""
        return 2 ** (len(self._vae_config()["block_out_channels"]) - 1)

    def _vae_config(self) -> Mapping:
        """The VAE's config; if the VAE isn't loaded, only the config is read."""
        if self.vae is not None:
            return self.vae.config
        return AutoencoderKL.load_config(**self._find("vae", None).arguments())

    def latent_shape_of(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of an image. If the VAE isn't loaded, only its config is read."""
        config, factor = self._vae_config(), self.factor
        if height < 1 or width < 1 or height % factor or width % factor:
            raise ValueError(f"height and width must be multiples of {factor}, not {height} x {width}")
        return config["latent_channels"], height // factor, width // factor

    @torch.no_grad()
    def encode_images(self, pixels: Tensor | list) -> Tensor:
        """Latents [B, C, h, w]: the VAE's mode times its scaling factor, without a shift.

        pixels: [B, 3, H, W] in [-1, 1], or PIL images of the same size.
        """
        return _encode(self.required("vae"), pixels)

    encode_image = encode_images

    @torch.no_grad()
    def encode_sd(self, pixels: Tensor | list) -> Tensor:
        """The SD1.5 VAE's latents [B, 4, h, w] of the same images."""
        return _encode(self.required("sd_vae"), pixels)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels float32 [B, 3, H, W] in [-1, 1] of latents [B, C, h, w]."""
        vae = self.required("vae")
        pixels = vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample
        return pixels.float().clamp(-1, 1)

    @torch.no_grad()
    def encode_t5(self, prompts: str | list[str]) -> Tensor:
        """T5 states [B, L, D], L = `t5_length`. Padding is masked in the encoder; its states are included."""
        t5 = self.required("t5")
        tokens = self._tokenize("t5", prompts, self.t5_length).to(t5.device)
        return t5(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state

    @torch.no_grad()
    def encode_clip(self, prompts: str | list[str]) -> Tensor:
        """CLIP's pooled vectors [B, D]."""
        return self._clip(prompts).pooler_output

    @torch.no_grad()
    def encode_clip_hidden(self, prompts: str | list[str]) -> Tensor:
        """CLIP's last hidden states [B, 77, D], the teachers' text condition."""
        return self._clip(prompts).last_hidden_state

    @torch.no_grad()
    def encode_clip_both(self, prompts: str | list[str]) -> tuple[Tensor, Tensor]:
        """Pooled vectors [B, D] and last hidden states [B, 77, D] of one run."""
        states = self._clip(prompts)
        return states.pooler_output, states.last_hidden_state

    def _clip(self, prompts: str | list[str]):
        clip = self.required("clip")
        return clip(input_ids=self._tokenize("clip", prompts, CLIP_LENGTH).input_ids.to(clip.device))

    def _tokenize(self, name: str, prompts: str | list[str], length: int):
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        tokenizer = self.tokenizers[name]
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        full = tokens.attention_mask.all(dim=1)
        if (unknown := tokenizer.unk_token_id) is not None and unknown != tokenizer.pad_token_id:
            full |= (tokens.input_ids == unknown).any(dim=1)
        for row in full.nonzero().flatten().tolist():
            self.truncated[name] += len(tokenizer(prompts[row], verbose=False).input_ids) > length
            self._warn_of(prompts[row])
        return tokens

    def _warn_of(self, prompt: str) -> None:
        """Warn, once per prompt, if the loaded tokenizers truncate it or do not know a word."""
        if prompt in self._warned or len(self._warned) >= WARNED:
            return
        faults = []
        for name, tokenizer in self.tokenizers.items():
            length = {"t5": self.t5_length, "clip": CLIP_LENGTH}[name]
            encoded = tokenizer(prompt, verbose=False, return_offsets_mapping=True)
            ids, places = encoded.input_ids, encoded.offset_mapping
            if len(ids) > length:
                end = places[length - 2][1]  # of the last token before the end token
                faults.append(f"{name} keeps {length} of {len(ids)} tokens, up to '...{prompt[:end][-40:]}'")
            lost = [prompt[a:b] for i, (a, b) in zip(ids, places, strict=True) if i == tokenizer.unk_token_id and a < b]
            if lost and tokenizer.unk_token_id != tokenizer.pad_token_id:
                faults.append(f"{name} does not know {' '.join(dict.fromkeys(lost))}")
        if faults:
            log.warning("prompt %r: %s", prompt[:40], "; ".join(faults))
            self._warned.add(prompt)
            if len(self._warned) == WARNED:
                log.warning("further warnings about prompts are only counted")

    def fingerprint(self) -> dict:
        """Everything that the outputs depend on, for each model that was loaded, even if it has been unloaded.

        Its repo and commit (or the hash of its local files), dtype and scaling factor; which latent of the VAE's
        distribution is used; T5's length.
        """
        return {**self._identities, "latent": "mode", "t5_length": self.t5_length}


def _encode(vae: AutoencoderKL, pixels: Tensor | list) -> Tensor:
    if not isinstance(pixels, Tensor):
        if len(sizes := {image.size for image in pixels}) != 1:
            raise ValueError(f"all images of a batch must have the same size, these have {sorted(sizes)}")
        pixels = to_pixels(torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in pixels])))
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or any(side % factor for side in pixels.shape[2:]):
        raise ValueError(f"pixels are {list(pixels.shape)}, must be [B, 3, H, W] with sides divisible by {factor}")
    return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
