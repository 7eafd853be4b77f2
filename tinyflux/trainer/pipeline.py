"""The Sampler as a diffusers pipeline: the same pictures, in the calls and the folder layout that diffusers users know.

    TinyFluxPipeline.of(from_pretrained("runs/mine"), ModelZoo(), shift=3.0).save_pretrained("mine-pipeline")
    TinyFluxPipeline.from_pretrained("mine-pipeline")("a red ring").images[0].save("ring.png")

A saved pipeline is safetensors and JSON, a folder each for the VAE, the encoders, the tokenizers and the transformer,
whose folder is a checkpoint in the published layout. Nothing in it chooses which code runs when it is loaded.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

from tinyflux.model.loader import REPO, check_place, load_model, save_published
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.pretrained import Pretrained, load_pretrained
from tinyflux.model.zoo import ModelZoo
from tinyflux.trainer.sampling import Prompts, Sampler, initial_noise, to_uint8

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMPONENTS = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
OUTPUTS = ("pil", "np", "pt", "latent")


class TinyFluxTransformer(TinyFluxDeep, ModelMixin):
    """TinyFluxDeep as diffusers saves, moves and offloads it."""

    @classmethod
    def of(cls, model: TinyFluxDeep) -> "TinyFluxTransformer":
        """The same network on the same memory, in eval mode."""
        with torch.device("meta"):
            transformer = cls(model.config)
        transformer.load_state_dict(model.state_dict(), assign=True)
        return transformer.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "TinyFluxTransformer":
        """Of a pipeline's folder `transformer`, strictly; errors as of `load_model`."""
        return cls.of(load_model(Path(folder, WEIGHTS), dtype=dtype))

    def save_pretrained(self, folder: str | Path) -> None:
        """The weights in the published layout, and config.json."""
        save_published(self, Path(folder, WEIGHTS))


def _vae(folder: Path, dtype: torch.dtype | None) -> AutoencoderKL:
    if dtype is None and (folder / WEIGHTS).is_file():  # diffusers would take float32, whatever the file has
        with safe_open(folder / WEIGHTS, "pt") as file:
            dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return load_pretrained(AutoencoderKL, Pretrained(str(folder), local=True), torch_dtype=dtype, use_safetensors=True)


def _encoder(kind: type, folder: Path, dtype: torch.dtype | None):
    return load_pretrained(kind, Pretrained(str(folder), local=True), dtype=dtype or "auto", use_safetensors=True)


def _load(folder: Path, name: str, dtype: torch.dtype | None):
    match name:
        case "vae":
            return _vae(folder / name, dtype)
        case "text_encoder":
            return _encoder(CLIPTextModel, folder / name, dtype)
        case "text_encoder_2":
            return _encoder(T5EncoderModel, folder / name, dtype)
        case "transformer":
            return TinyFluxTransformer.from_pretrained(folder / name, dtype)
        case _:
            return AutoTokenizer.from_pretrained(folder / name, local_files_only=True, trust_remote_code=False)


class TinyFluxPipeline(DiffusionPipeline):
    """Draws pictures for prompts: CLIP is `text_encoder`, T5 `text_encoder_2`, TinyFlux `transformer`.

    shift: the flux shift of the training; image_size: pixels a side unless asked otherwise; t5_length: tokens.
    """

    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: PreTrainedTokenizerBase,
        transformer: TinyFluxTransformer,
        shift: float = 3.0,
        image_size: int = 512,
        t5_length: int = 128,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
        )
        self.register_to_config(shift=shift, image_size=image_size, t5_length=t5_length)

    @classmethod
    def of(cls, model: TinyFluxDeep, zoo: ModelZoo, shift: float = 3.0) -> "TinyFluxPipeline":
        """A pipeline of a model and a zoo, which loads what it lacks; they keep their memory and their devices."""
        for name in ("vae", "clip", "t5"):
            if getattr(zoo, name) is None:
                getattr(zoo, f"load_{name}")()
        tokenizer, tokenizer_2 = zoo.tokenizers["clip"], zoo.tokenizers["t5"]
        transformer = TinyFluxTransformer.of(model)
        sizes = {"image_size": zoo.image_size, "t5_length": zoo.t5_length}
        return cls(zoo.vae, zoo.clip, tokenizer, zoo.t5, tokenizer_2, transformer, shift, **sizes)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **components,
    ) -> "TinyFluxPipeline":
        """A pipeline out of a folder or `user/repo`. dtype None: each part as it was saved; torch_dtype is the same.

        components: parts to take instead of the saved ones, by name. Errors: FileNotFoundError; ValueError for another
        pipeline's folder; those of `load_model`. A part that lacks weights is refused, not filled in.
        """
        if unknown := sorted(components.keys() - set(COMPONENTS)):
            raise TypeError(f"{', '.join(unknown)}: no part of this pipeline; it has {', '.join(COMPONENTS)}")
        check_place("cpu", dtype or torch_dtype)
        names = [name for name in COMPONENTS if name not in components]
        folder = Path(source)
        if not folder.is_dir():
            if not (match := REPO.fullmatch(str(source))) or match["folder"]:
                raise FileNotFoundError(f"{source}: no such folder, and not of the form user/repo")
            parts = [f"{name}/*.{end}" for name in names for end in ("json", "safetensors", "txt", "model")]
            where = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
            folder = Path(snapshot_download(str(source), allow_patterns=[cls.config_name, *parts], **where))
        index = cls._read_index(folder)
        for name in names:
            if not (folder / name).is_dir():
                raise FileNotFoundError(f"{folder} has no folder {name}")
        loaded = {name: _load(folder, name, dtype or torch_dtype) for name in names}
        return cls(**components, **loaded, **index)

    @classmethod
    def _read_index(cls, folder: Path) -> dict:
        """The settings in a pipeline's model_index.json."""
        path = folder / cls.config_name
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no pipeline: it has no {cls.config_name}")
        index = json.loads(path.read_text())
        if not isinstance(index, dict) or index.get("_class_name") != cls.__name__:
            found = index.get("_class_name") if isinstance(index, dict) else index
            raise ValueError(f"{path} is of a {found!r:.80}, not of a {cls.__name__}")
        kinds = {"shift": (int, float), "image_size": int, "t5_length": int}
        for key, kind in kinds.items():
            if not isinstance(index.get(key), kind) or index[key] <= 0:
                raise ValueError(f"{path}: {key} is {index.get(key)!r:.80}, must be a positive number")
        return {key: index[key] for key in kinds}

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, variant: str | None = None, **kwargs
    ) -> None:
        """Write the pipeline's folder; with push_to_hub=True and repo_id push it, too. ValueError for pickles and
        variants."""
        if not safe_serialization or variant is not None:
            raise ValueError("a pipeline is saved as plain safetensors: without safe_serialization=False or a variant")
        super().save_pretrained(str(save_directory), **kwargs)

    @property
    def zoo(self) -> ModelZoo:
        """The encoders and the decoder, as the Sampler takes them."""
        tokenizers = {"clip": self.tokenizer, "t5": self.tokenizer_2}
        models = {"vae": self.vae, "clip": self.text_encoder, "t5": self.text_encoder_2}
        return ModelZoo.of(self.config.image_size, self.config.t5_length, tokenizers, **models)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        *,
        batch_size: int = 8,
        **settings,
    ) -> ImagePipelineOutput | tuple:
        """Pictures, `num_images_per_prompt` in a row of each prompt: "pil" images, "np" [B, H, W, 3] or "pt"
        [B, 3, H, W] in [0, 1], or "latent" [B, C, h, w].

        generator: its initial seed s alone counts, and picture k is `Sampler`'s picture k of seed s; of a list of
        generators, one a picture, each gives its picture 0; None draws a seed from torch's own. latents: noise
        [B, C, h, w] to start from instead. callback_on_step_end(pipe, step, t, {"latents"}) is called after each step
        of each batch of `batch_size` with the t in [0, 1] that was reached; latents that it returns go on.
        settings: others of `Settings` (solver, shift, guidance_interval, guidance_rescale). ValueError for bad input.
        """
        prompts, B = self._encode(prompt, negative_prompt, num_images_per_prompt)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUTS)}, not {output_type!r}")
        if unknown := set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise ValueError(f"callback_on_step_end_tensor_inputs: {', '.join(sorted(unknown))} is none of latents")
        size = self.config.image_size
        shape = self.zoo.latent_shape_of(height or size, width or size)
        settings = {"shift": self.config.shift, "steps": num_inference_steps, "guidance": guidance_scale} | settings
        sampler = Sampler(self.zoo, batch_size=batch_size, latent_shape=shape, **settings)
        device = self._execution_device
        seed, noise = 0, latents
        if noise is not None:
            if noise.shape != (B, *shape):
                raise ValueError(f"latents must be {[B, *shape]} for these prompts and sizes, not {list(noise.shape)}")
            noise = noise.to(device)
        elif isinstance(generator, list | tuple):
            if len(generator) != B:
                raise ValueError(f"{len(generator)} generators for {B} pictures: give one, or one a picture")
            first = torch.zeros(1, dtype=torch.int64)
            noise = torch.cat([initial_noise(g.initial_seed(), first, shape, device) for g in generator])
        else:
            seed = int(torch.randint(1 << 62, ())) if generator is None else generator.initial_seed()

        with self.progress_bar(total=num_inference_steps * -(-B // batch_size)) as bar:

            def on_step(step: int, t: float, x: Tensor) -> Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return x
                return (callback_on_step_end(self, step, t, {"latents": x}) or {}).get("latents", x)

            x = sampler.latents(self.transformer, prompts, seed=seed, device=device, noise=noise, on_step=on_step)
        images = x if output_type == "latent" else _as(sampler.decode(x), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _encode(self, prompt: str | list[str], negative: str | list[str] | None, times: int) -> tuple[Prompts, int]:
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompt must be a text or a list of texts, not {prompt!r:.80}")
        if not isinstance(negative, str | None) and len(negative) != len(texts):
            raise ValueError(f"{len(negative)} negative prompts for {len(texts)} prompts: give one, or one a prompt")
        if times < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, not {times}")
        return Prompts.encode(self.zoo, list(texts), negative or "").repeat(times), times * len(texts)


def _as(images: Tensor, output_type: str):
    """Pictures [B, 3, H, W] in [-1, 1] as they are asked for."""
    if output_type == "pil":
        return [Image.fromarray(image) for image in to_uint8(images).permute(0, 2, 3, 1).numpy()]
    images = (images / 2 + 0.5).clamp(0, 1)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy()
