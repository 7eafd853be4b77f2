"""The Sampler as a diffusers pipeline: the same pictures, with the API and the folder layout of diffusers.

    TinyFluxPipeline.from_checkpoint("runs/mine").save_pretrained("mine-pipeline")
    TinyFluxPipeline.from_pretrained("mine-pipeline")("a red ring").images[0].save("ring.png")

A saved pipeline is safetensors and JSON, with a folder for each of the VAE, the encoders, the tokenizers and the
transformer, which is a checkpoint in the published layout. `TinyFluxPipeline.from_pretrained` runs no code from the
folder; `code=True` also saves this code, for `DiffusionPipeline` and `trust_remote_code`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import PipelineImageInput
from huggingface_hub import HfApi
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

from tinyflux.model.loader import check_place, load_model, save_published
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.zoo import ModelZoo
from tinyflux.trainer.adapters import Adapters
from tinyflux.trainer.pipeline_card import write_card
from tinyflux.trainer.pipeline_files import (
    COMPONENTS,
    INDEX,
    find_pipeline,
    load_part,
    place,
    read_index,
    weights_name,
)
from tinyflux.trainer.pipeline_inputs import (
    OUTPUTS,
    as_asked,
    device_of,
    encode_pictures,
    encode_texts,
    given_times,
    last_part,
    starting_noise,
)
from tinyflux.trainer.sampling import Sampler, Settings, at_once


class TinyFluxTransformer(TinyFluxDeep, ModelMixin):
    """TinyFluxDeep with the methods that diffusers uses to save, move and offload it."""

    @classmethod
    def of(cls, model: TinyFluxDeep) -> "TinyFluxTransformer":
        """The same network, sharing its memory, in eval mode."""
        with torch.device("meta"):
            transformer = cls(model.config)
        transformer.load_state_dict(model.state_dict(), assign=True)
        return transformer.eval()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        *,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        **_of_diffusers,
    ) -> "TinyFluxTransformer":
        """Load the network from a pipeline's folder `transformer`, strictly. Raises as `load_model`.

        torch_dtype: the same as dtype. Other arguments of DiffusionPipeline are ignored.
        """
        return cls.of(load_model(Path(folder, weights_name(variant)), dtype=dtype or torch_dtype))

    def save_pretrained(self, folder: str | Path, variant: str | None = None) -> None:
        """Write the weights in the published layout, and config.json."""
        save_published(self, Path(folder, weights_name(variant)))


class TinyFluxPipeline(DiffusionPipeline):
    """Draws pictures for prompts: CLIP is `text_encoder`, T5 `text_encoder_2`, TinyFlux `transformer`.

    shift: the flux shift of the training; guidance: default of a call; image_size: default side in pixels; t5_length:
    tokens. license, base_model and datasets (Hub repos, separated by commas) go into the model card.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: PreTrainedTokenizerBase,
        transformer: ModelMixin,  # a TinyFluxTransformer; in code saved with a pipeline, each folder has its own class
        shift: float = 3.0,
        guidance: float = 5.0,
        image_size: int = 512,
        t5_length: int = 128,
        license: str = "mit",
        base_model: str = "",
        datasets: str = "",
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
        self.register_to_config(
            shift=shift,
            guidance=guidance,
            image_size=image_size,
            t5_length=t5_length,
            license=license,
            base_model=base_model,  # not a list, because diffusers treats a list in a config as a part
            datasets=datasets,
        )
        self._interrupt = False
        self._adapters = Adapters()

    @classmethod
    def of(cls, model: TinyFluxDeep, zoo: ModelZoo, shift: float = 3.0, **config) -> "TinyFluxPipeline":
        """A pipeline from a model and a zoo, which loads missing models; both keep their memory and devices.

        config: guidance, license, base_model and datasets.
        """
        for name in ("vae", "clip", "t5"):
            if getattr(zoo, name) is None:
                getattr(zoo, f"load_{name}")()
        tokenizer, tokenizer_2 = zoo.tokenizers["clip"], zoo.tokenizers["t5"]
        sizes = {"image_size": zoo.image_size, "t5_length": zoo.t5_length}
        transformer = TinyFluxTransformer.of(model)
        return cls(zoo.vae, zoo.clip, tokenizer, zoo.t5, tokenizer_2, transformer, shift, **sizes, **config)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | Path, *, zoo: str | None = None, ema: bool = True, license: str = "mit"
    ) -> "TinyFluxPipeline":
        """A pipeline from a run, a checkpoint or a Hub repo, with the zoo, shift and guidance of its run.

        Raises as `load_model` and `ModelZoo`.
        """
        from tinyflux.trainer.drawing import Artist

        artist = Artist.load(str(checkpoint), zoo=zoo, ema=ema)
        recorded = artist.recorded
        return cls.of(
            artist.model,
            artist.zoo,
            recorded.shift,
            guidance=recorded.guidance,
            license=license,
            base_model=", ".join(recorded.base_model),
            datasets=", ".join(recorded.datasets),
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        device_map: str | dict[str, str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **components,
    ) -> "TinyFluxPipeline":
        """A pipeline from a folder or `user/repo`. dtype None: each part as saved; torch_dtype is the same.

        variant: of the weights files, e.g. "fp16". device_map: a device for all parts, {part: device}, or "balanced"
        over the GPUs. components: parts that replace the saved ones, by name.
        Raises FileNotFoundError; ValueError for another pipeline's folder, an unknown device, use_safetensors=False, or
        a part with missing weights; TypeError for an unknown argument; and as `load_model`.
        """
        if unknown := sorted(components.keys() - set(COMPONENTS)):
            raise TypeError(
                f"from_pretrained: unknown argument {', '.join(unknown)}; parts that can be given:"
                f" {', '.join(COMPONENTS)}"
            )
        if use_safetensors is False:
            raise ValueError("use_safetensors=False is not supported: a pipeline has only safetensors files")
        dtype = dtype or torch_dtype
        check_place("cpu", dtype)
        names = [name for name in COMPONENTS if name not in components]
        folder = find_pipeline(
            source, names, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        index = read_index(folder, cls.__name__)
        loaded = {name: load_part(folder, name, dtype, variant) for name in names if name != "transformer"}
        if "transformer" in names:
            loaded["transformer"] = TinyFluxTransformer.from_pretrained(folder / "transformer", dtype, variant=variant)
        pipe = cls(**components, **loaded, **index)
        if device_map is not None:
            place({n: part for n, part in pipe.components.items() if isinstance(part, torch.nn.Module)}, device_map)
        return pipe

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        *,
        code: bool = False,
        prompts: list[str] | tuple[str, ...] = (),
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
    ) -> None:
        """Write the pipeline's folder and its model card; with push_to_hub=True, also push it to `repo_id`.

        variant: a word in the names of the weights files, such as fp16. prompts: the card shows a picture for each.
        code: also write pipeline.py, so that `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` loads the
        folder without this package. Raises ValueError for safe_serialization=False.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False is not supported: a pipeline is saved as safetensors")
        folder = Path(save_directory)
        super().save_pretrained(str(folder), variant=variant)
        if code:
            self._write_code(folder)
        pictures = {prompt: self(prompt, generator=torch.Generator().manual_seed(0)).images[0] for prompt in prompts}
        write_card(folder, dict(self.config), pictures, code, repo_id or "user/repo")
        if push_to_hub:
            repo_id = repo_id or folder.name
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            api.upload_folder(
                folder_path=folder, repo_id=repo_id, commit_message=commit_message or "Upload TinyFluxPipeline"
            )

    def push_to_hub(self, repo_id: str, **options) -> None:
        """Save the pipeline and push it to `user/repo`; options: see `save_pretrained`."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **options)

    @staticmethod
    def _write_code(folder: Path) -> None:
        from tinyflux.trainer.pipeline_code import single_file

        path = folder / INDEX
        index = json.loads(path.read_text())
        index |= {"_class_name": ["pipeline", "TinyFluxPipeline"], "transformer": ["pipeline", "TinyFluxTransformer"]}
        path.write_text(json.dumps(index, indent=2) + "\n")
        for place_of_code in (folder, folder / "transformer"):  # diffusers loads a part's code from the part's folder
            (place_of_code / "pipeline.py").write_text(single_file(), encoding="utf-8")

    @property
    def zoo(self) -> ModelZoo:
        """The encoders and the decoder as a ModelZoo, for the Sampler."""
        tokenizers = {"clip": self.tokenizer, "t5": self.tokenizer_2}
        models = {"vae": self.vae, "clip": self.text_encoder, "t5": self.text_encoder_2}
        return ModelZoo.of(self.config.image_size, self.config.t5_length, tokenizers, **models)

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after that step."""
        return self._interrupt

    def load_lora_weights(self, source: str | Path, adapter_name: str = "default", scale: float = 1.0) -> None:
        """Add an adapter to those that are loaded: a PEFT folder, a file, or `user/repo`.

        Raises FileNotFoundError; ValueError if it is not a plain LoRA of this network.
        """
        self._adapters.load(self.transformer, source, adapter_name, scale)

    def set_adapters(self, adapter_names: str | list[str], adapter_weights: float | list[float] | None = None) -> None:
        """Set the scales of these adapters (default 1), and 0 for all others. Raises ValueError for unknown names."""
        self._adapters.scale(self.transformer, adapter_names, adapter_weights)

    def unload_lora_weights(self) -> None:
        """Remove all adapters; the original weights are restored exactly."""
        self._adapters.unload(self.transformer)

    def enable_vae_slicing(self) -> None:
        """Decode one picture at a time, for less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode all pictures of a batch at once."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode a picture in overlapping tiles, for less memory; tile edges may be visible."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode a picture as a whole."""
        self.vae.disable_tiling()

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        *,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode prompts for a call. Returns prompt_embeds and negative_prompt_embeds (T5 states [B, L, D]),
        pooled_prompt_embeds and negative_pooled_prompt_embeds (CLIP vectors [B, D]). Given tensors are returned
        unchanged. Raises ValueError."""
        prompts = encode_texts(
            self.zoo,
            prompt,
            negative_prompt,
            num_images_per_prompt,
            (prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds),
        )
        tensors = (prompts.t5, prompts.null_t5, prompts.clip, prompts.null_clip)
        return tuple(x.expand(len(prompts), *x.shape[1:]).to(device_of(self.transformer)) for x in tensors)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        *,
        image: PipelineImageInput | None = None,
        strength: float = 0.6,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        batch_size: int = 8,
        solver: str = "euler",
        shift: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
    ) -> ImagePipelineOutput | tuple:
        """Pictures, `num_images_per_prompt` in a row for each prompt: "pil" images, "np" [B, H, W, 3] or "pt"
        [B, 3, H, W] in [0, 1], or "latent" [B, C, h, w].

        guidance_scale, shift: default, the pipeline's. generator: only its initial seed s is used, so calling twice
        gives the same pictures: picture k is `Sampler`'s picture k of seed s; with a list of generators, one per
        picture, each gives its picture 0; None draws a seed from torch. latents: noise [B, C, h, w] instead.
        image: one, or one per prompt, to draw over, with only the last part `strength` in (0, 1] of the steps.
        timesteps: ascending t in [0, 1] (1 is data); sigmas: the same as descending 1 - t, with a final 0 added if
        missing. prompt_embeds etc.: from `encode_prompt`, instead of texts.
        callback_on_step_end(pipe, step, t, {"latents"}) is called after each step of each batch of `batch_size` with
        the current t in [0, 1]. Latents that it returns replace the current ones; `pipe._interrupt = True` stops.
        solver, guidance_interval, guidance_rescale: see `Settings`. ValueError for bad input.
        """
        given = (prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds)
        prompts = encode_texts(self.zoo, prompt, negative_prompt, num_images_per_prompt, given)
        B = len(prompts)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUTS)}, not {output_type!r}")
        if unknown := set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise ValueError(f"callback_on_step_end_tensor_inputs: {', '.join(sorted(unknown))} is none of latents")
        settings = Settings(
            steps=num_inference_steps,
            guidance=self.config.guidance if guidance_scale is None else guidance_scale,
            shift=self.config.shift if shift is None else shift,
            solver=solver,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            timesteps=given_times(timesteps, sigmas),
        )
        device, size = device_of(self.transformer), self.config.image_size
        if image is None:
            shape = self.zoo.latent_shape_of(*(size if side is None else side for side in (height, width)))
            start = starting_noise(B, shape, generator, latents, device)
        else:
            data = encode_pictures(self.vae, image, height, width, B, num_images_per_prompt).to(device)
            settings = last_part(settings, strength)
            t = settings.timesteps[0]
            start = (1 - t) * starting_noise(B, tuple(data.shape[1:]), generator, latents, device) + t * data
        steps = len(settings.schedule()) - 1
        sampler = Sampler(self.zoo, batch_size=batch_size, latent_shape=tuple(start.shape[1:]), **vars(settings))
        self._interrupt = False

        with self.progress_bar(total=steps * -(-B // batch_size)) as bar:

            def on_step(step: int, t: float, x: Tensor) -> Tensor | None:
                bar.update()
                if callback_on_step_end is not None and not self._interrupt:
                    x = (callback_on_step_end(self, step, t, {"latents": x}) or {}).get("latents", x)
                return None if self._interrupt else x

            x = sampler.latents(self.transformer, prompts, device=device, noise=start, on_step=on_step)
        images = x if output_type == "latent" else as_asked(self._decode(x, batch_size), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decode(self, latents: Tensor, batch_size: int) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1], on the CPU."""
        device = device_of(self.vae)
        latents = (latents / self.vae.config.scaling_factor).to(device, self.vae.dtype)
        some = latents.split(at_once(device, batch_size))
        return torch.cat([self.vae.decode(x).sample.float().cpu() for x in some]).clamp(-1, 1)
