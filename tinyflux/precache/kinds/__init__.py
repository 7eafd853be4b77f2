"""The kinds of sources. To add one, write a file here with its keys, their checks and its lister, and a line below."""

from importlib import import_module

from tinyflux.precache.kinds.base import Source

KINDS = {
    "imagefolder": "imagefolder:ImageFolder",
    "webdataset": "webdataset:WebDataset",
    "hf": "hf:HfDataset",
    "jsonl": "lists:JsonLines",
    "csv": "lists:Csv",
    "shapes": "shapes:Shapes",
    "latents": "latents:Latents",
    "cache": "legacy:LegacyFolder",
}


def kind_of(name: str) -> type[Source]:
    """The class of a kind; its fields are the keys of a table in sources.toml."""
    module, _, cls = KINDS[name].partition(":")
    return getattr(import_module(f"tinyflux.precache.kinds.{module}"), cls)
