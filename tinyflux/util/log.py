"""Messages to the user."""

import sys


def say(*words: object, sep: str = " ") -> None:
    """Print on rank 0 only, and flush."""
    distributed = sys.modules.get("torch.distributed")  # without this import there are no ranks
    if distributed is None or not distributed.is_initialized() or distributed.get_rank() == 0:
        print(*words, sep=sep, flush=True)
