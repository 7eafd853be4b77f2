"""URLs without secrets, for logs: no user names, passwords or signed queries."""

import re
from typing import Any

# greedy up to the last @ before a slash: a password may hold one. hf://datasets/USER/REPO@REVISION has a slash before
_URL = re.compile(r"\b([a-z][a-z0-9+.-]*://)(?:[^/\s\"'<>]*@)?([^\s?\"'<>]*)(?:\?[^\s\"'<>]*)?", re.IGNORECASE)


def redacted(text: str) -> str:
    """The text, its URLs without user names, passwords and queries."""
    return _URL.sub(r"\1\2", text)


def public(value: Any) -> Any:
    """A config of dictionaries and lists, its texts redacted."""
    if isinstance(value, dict):
        return {key: public(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(public(x) for x in value)
    return redacted(value) if isinstance(value, str) else value
