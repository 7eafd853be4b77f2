"""The metadata of a card, a README.md of the Hub: what a card says stays, what it lacks is filled in."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import CardData


def completed(old: dict, defaults: dict, tags: list[str]) -> dict:
    """The metadata `old`, with those defaults that it lacks and with these tags too."""
    data = defaults | {key: value for key, value in old.items() if value not in (None, [], "")}
    return data | {"tags": list(dict.fromkeys([*(old.get("tags") or []), *tags]))}


def begun(old: str, repo: str) -> str:
    """The card `old`, or of a repo that has none an empty one."""
    return old if old.strip() else f"---\ntags: []\n---\n\n# {repo.partition('/')[2]}\n"


def renewed(text: str, section: str) -> str:
    """A card's text with a section in place of the one whose first and last lines are the same, or at its end."""
    begin, *_, end = section.splitlines()
    before, found, rest = text.partition(begin)
    after = rest.partition(end)[2] if found else ""
    return f"{before.strip()}\n\n{section}\n\n{after.strip()}".strip()


def written(data: "CardData", text: str) -> str:
    """A card of metadata and text."""
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"


def origins(config: dict) -> dict[str, list[str]]:
    """The Hub repos that a run, by its training_config.json, started from and took its sources from: `base_model` and
    `datasets`, as a card has them; without those that there are none of."""
    start = re.match(r"[\w.-]+/[\w.-]+(?=:|$)", config.get("trainer", {}).get("init_from") or "")
    sources = [re.match(r"hf://datasets/([^/]+/[^/@]+)", url) for url in config.get("data", {}).get("sources") or ()]
    found = {
        "base_model": [start[0]] if start and not Path(start[0]).exists() else [],
        "datasets": list(dict.fromkeys(source[1] for source in sources if source)),
    }
    return {key: repos for key, repos in found.items() if repos}
