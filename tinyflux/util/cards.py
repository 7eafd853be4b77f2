"""Metadata and sections of a card, the README.md of a Hub repo: existing content is kept, missing content is added."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import CardData


def completed(old: dict, defaults: dict, tags: list[str]) -> dict:
    """The metadata `old` with missing defaults and tags added."""
    data = defaults | {key: value for key, value in old.items() if value not in (None, [], "")}
    return data | {"tags": list(dict.fromkeys([*(old.get("tags") or []), *tags]))}


def begun(old: str, repo: str) -> str:
    """The card `old`, or an empty one for a repo without a card."""
    return old if old.strip() else f"---\ntags: []\n---\n\n# {repo.partition('/')[2]}\n"


def renewed(text: str, section: str) -> str:
    """A card's text with a section that replaces the one with the same first and last lines, or is appended."""
    begin, *_, end = section.splitlines()
    before, found, rest = text.partition(begin)
    after = rest.partition(end)[2] if found else ""
    return f"{before.strip()}\n\n{section}\n\n{after.strip()}".strip()


def written(data: "CardData", text: str) -> str:
    """A card from metadata and text."""
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"


def origins(config: dict) -> dict[str, list[str]]:
    """The Hub repos of a run's starting weights and sources, from its training_config.json: `base_model` and
    `datasets`, as in a card; keys without repos are left out."""
    start = re.match(r"[\w.-]+/[\w.-]+(?=:|$)", config.get("trainer", {}).get("init_from") or "")
    sources = [re.match(r"hf://datasets/([^/]+/[^/@]+)", url) for url in config.get("data", {}).get("sources") or ()]
    found = {
        "base_model": [start[0]] if start and not Path(start[0]).exists() else [],
        "datasets": list(dict.fromkeys(source[1] for source in sources if source)),
    }
    return {key: repos for key, repos in found.items() if repos}
