"""The dataset card of a Hub repo of sources: one `datasets` config per source, and what each source contains."""

import io
import json

import numpy as np
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image

from tinyflux.shards.format import SUFFIX
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.schema import flat
from tinyflux.shards.source import Source
from tinyflux.util import cards

BEGIN, END = "<!-- tinyflux: each push rewrites what stands between these marks -->", "<!-- /tinyflux -->"
PREVIEW = "preview.jpg"
COLUMNS, ROWS, SIDE = 8, 3, 128  # of the sheet of previews, pixels a side


def render(
    old: str, repo: str, manifests: dict[str, Manifest], with_preview: set[str], license_id: str | None = None
) -> str:
    """The text of README.md: `old` with its configs and its marked section updated, and the rest unchanged.

    manifests: by their folder in the repo. with_preview: folders that have a `PREVIEW`. license_id: the Hub's
    identifier; without one, that of `old` is kept.
    """
    card = DatasetCard(cards.begun(old, repo))
    data = card.data.to_dict()
    kept = [config for config in data.get("configs") or [] if config.get("config_name") not in manifests]
    data["configs"] = kept + [
        {"config_name": folder, "data_files": [{"split": "train", "path": f"{folder}/{tars}"}]}
        for folder, tars in ((name, "*/*.tar" if m.subfolders else "*.tar") for name, m in sorted(manifests.items()))
    ]
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or []), "webdataset", "tinyflux"]))
    data["task_categories"] = data.get("task_categories") or ["text-to-image"]
    data["size_categories"] = [size_category(sum(m.count for m in manifests.values() if m.base is None))]
    if license_id:
        data["license"] = license_id
    parts = [section(repo, folder, manifests[folder], folder in with_preview) for folder in sorted(manifests)]
    text = cards.renewed(card.text, "\n\n".join([BEGIN, *parts, END]))
    return cards.written(DatasetCardData(**data), text)


def size_category(count: int) -> str:
    """The Hub's name for this number of samples."""
    edges = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    at = sum(count >= 10**power for power in range(3, 13))
    if at == 0:
        return f"n<{edges[0]}"
    return f"{edges[at - 1]}<n<{edges[at]}" if at < len(edges) else f"n>{edges[-1]}"


def joined(name: str, dtype: str) -> str:
    """A line of numpy that joins the planes of a field of the member `x`; bfloat16 becomes float32."""
    if dtype == "float16":
        return f'(x["{name}.1"].astype("<u2") << 8 | x["{name}.0"]).view("<f2")'
    if dtype == "bfloat16":
        return f'(x["{name}.1"].astype("<u4") << 24 | x["{name}.0"].astype("<u4") << 16).view("<f4")'
    return f'np.stack([x[f"{name}.{{i}}"] for i in range(4)], -1).view("<f4")[..., 0]'


def section(repo: str, folder: str, manifest: Manifest, preview: bool) -> str:
    """The card's section about one source."""
    fields = flat(manifest.groups)
    rows = [f"| `{name}` | {field.dtype} | {', '.join(map(str, field.shape))} |" for name, field in fields.items()]
    producers = {name: group.producer for name, group in manifest.groups.items()}
    produced = json.dumps(producers, indent=2, ensure_ascii=False)
    grid = next((group.timesteps for group in manifest.groups.values() if group.timesteps), ())
    first, field = next(iter(fields.items()))
    member = next(name for name, group in manifest.groups.items() if first in group.fields)
    return "\n".join(
        [
            f"## {folder}",
            "",
            f"{manifest.count} samples in {len(manifest.shards)} shards, {manifest.bytes / 1e6:.1f} MB; "
            f"dataset id {manifest.dataset_id}"
            + (f"; teacher features at t = {', '.join(f'{t:g}' for t in grid)}." if grid else "."),
            *_of_base(manifest),
            "",
            *([f"![previews of {folder}]({folder}/{PREVIEW})", ""] if preview else []),
            "| field | dtype | shape |",
            "|---|---|---|",
            *rows,
            "",
            *_counts(manifest),
            "A sample is a few members of a WebDataset tar: its tensors as zstd-compressed safetensors, a `.json` with "
            "the prompts and the image's origin, and optionally a `.jpg` preview. Tensors are stored as byte planes, "
            "the lowest byte first; one line of numpy joins them:",
            "",
            f"    x = safetensors.numpy.load(zstandard.decompress(data))     # data: a member {member}*{SUFFIX}",
            f"    {joined(first, field.dtype)}",
            "",
            f'    datasets.load_dataset("{repo}", "{folder}", streaming=True)     # each member as bytes',
            f"    torchrun launch/train.py --data.sources hf://datasets/{repo}/{folder}",
            "",
            "Produced by:",
            "",
            *("    " + line for line in produced.splitlines()),  # indented, so that no text in it can end the block
        ]
    )


def _of_base(manifest: Manifest) -> list[str]:
    if manifest.base is None:
        return []
    groups = ", ".join(f"`{name}`" for name in manifest.groups)
    base = manifest.base.location.replace("`", "")
    return ["", f"An overlay: it adds {groups} to the samples of its base, `{base}`. Name it to read both."]


def _counts(manifest: Manifest) -> list[str]:
    """Samples per latent shape, and numbers of captions, unless all samples are alike."""
    index, lines = manifest.index, []
    if len(manifest.shapes) > 1:
        shapes = ", ".join(f"{h} x {w}: {n}" for (h, w), n in manifest.samples_of_shapes().items())
        lines += [f"Latent shapes h x w: {shapes} samples; a shard has one.", ""]
    most = int(index.captions.max(initial=0))
    if most > 1:
        lines += [f"Up to {most} captions per sample, {int(index.captions.sum(dtype=np.int64))} in total.", ""]
    return lines


def contact_sheet(source: Source) -> bytes | None:
    """A JPEG of previews of samples spread over the source; None if it has none.

    Equal sources give equal bytes. Raises ShardError if a shard is damaged.
    """
    manifest = source.manifest
    step = max(1, manifest.count / (COLUMNS * ROWS))
    positions = sorted({int(i * step) for i in range(COLUMNS * ROWS) if int(i * step) < manifest.count})
    pictures, open_shard = [], (-1, None)
    for position in positions:
        shard, row = manifest.locate(position)
        if open_shard[0] != shard:
            open_shard = shard, source.open(shard)
        if (preview := open_shard[1].preview(row)) is not None:
            picture = Image.open(io.BytesIO(preview)).convert("RGB")
            pictures.append(picture.resize((SIDE, SIDE)))
    if not pictures:
        return None
    columns = min(COLUMNS, len(pictures))
    sheet = Image.new("RGB", (columns * SIDE, -(-len(pictures) // columns) * SIDE), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * SIDE, i // columns * SIDE))
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=85)
    return data.getvalue()
