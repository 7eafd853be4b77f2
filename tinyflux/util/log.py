"""Messages to the user."""

import sys


def say(*words: object, sep: str = " ") -> None:
    """Print on rank 0 alone, at once."""
    distributed = sys.modules.get("torch.distributed")  # a process that never imported it has no ranks
    if distributed is None or not distributed.is_initialized() or distributed.get_rank() == 0:
        print(*words, sep=sep, flush=True)
