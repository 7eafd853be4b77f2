"""URLs without secrets, for logs: no user names, passwords or signed queries."""

import re
from typing import Any

# greedy up to the last @ before a slash, because a password may contain @; in hf://datasets/USER/REPO@REVISION a slash
# comes first
_URL = re.compile(r"\b([a-z][a-z0-9+.-]*://)(?:[^/\s\"'<>]*@)?([^\s?\"'<>]*)(?:\?[^\s\"'<>]*)?", re.IGNORECASE)


def redacted(text: str) -> str:
    """The text with user names, passwords and queries removed from its URLs."""
    return _URL.sub(r"\1\2", text)


def public(value: Any) -> Any:
    """A config of dictionaries and lists with redacted texts."""
    if isinstance(value, dict):
        return {key: public(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(public(x) for x in value)
    return redacted(value) if isinstance(value, str) else value
