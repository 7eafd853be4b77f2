"""Read files of torch.save without executing code from them."""

import pickle
from pathlib import Path
from typing import Any

import torch


def load_plain(path: Path, *, mmap: bool = False) -> Any:
    """The tensors and plain values of a file, on the CPU. Raises ValueError if it is damaged or has anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it contains more than tensors and plain values, which could run code when read "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error})") from error
