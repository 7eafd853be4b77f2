"""The model card of a saved pipeline."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from tinyflux.util.cards import written


def write_card(folder: Path, config: dict, pictures: dict[str, Image.Image], with_code: bool, repo: str) -> None:
    """Write README.md and the pictures of its widget into a pipeline's folder.

    config: of the pipeline; pictures: prompt -> picture; repo: its Hub repo. An existing card keeps its text and gets
    new metadata. Raises ValueError for metadata that the Hub does not accept.
    """
    widget = []
    for k, (prompt, picture) in enumerate(pictures.items()):
        (folder / "images").mkdir(exist_ok=True)
        picture.save(folder / "images" / f"{k}.png")
        widget.append({"text": prompt, "output": {"url": f"images/{k}.png"}})
    path = folder / "README.md"
    old = ModelCard.load(path) if path.is_file() else None
    data = ModelCardData(
        license=config["license"],
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["tinyflux", "rectified-flow", "text-to-image", "diffusers"],
        base_model=_repos(config["base_model"]),
        datasets=_repos(config["datasets"]),
        widget=widget or (old.data.get("widget") if old else None),
    )
    text = old.text if old else _text(config, list(pictures), with_code, repo)
    ModelCard(written(data, text), ignore_metadata_errors=False).save(path)


def _repos(text: str) -> list[str] | None:
    return [repo.strip() for repo in text.split(",")] if text else None


def _text(config: dict, prompts: list[str], with_code: bool, repo: str) -> str:
    prompt = prompts[0] if prompts else "a red ring"
    lines = [
        "# A TinyFlux pipeline",
        "",
        "A rectified-flow transformer for text-to-image, with its VAE and text encoders.",
        "",
        *(["<Gallery />", ""] if prompts else []),
        "| | |",
        "|---|---|",
        f"| size | {config['image_size']} pixels a side |",
        f"| guidance | {config['guidance']:g} |",
        f"| flux shift | {config['shift']:g} |",
        f"| T5 tokens | {config['t5_length']} |",
        *([f"| base model | {config['base_model']} |"] if config["base_model"] else []),
        *([f"| datasets | {config['datasets']} |"] if config["datasets"] else []),
        "",
        "```python",
        "from tinyflux.trainer.pipeline import TinyFluxPipeline",
        "",
        f'pipe = TinyFluxPipeline.from_pretrained("{repo}")',
        f"image = pipe({prompt!r}).images[0]",
        "```",
    ]
    if with_code:
        lines += [
            "",
            "Its code is in `pipeline.py`; read it before you run it:",
            "",
            "```python",
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{repo}", trust_remote_code=True)',
            "```",
        ]
    return "\n".join(lines)
