"""Peak memory of a piece of work."""

import ctypes
from pathlib import Path

import torch


class Memory:
    """Peak bytes that a `with` block needs above what was in use before it: allocated on CUDA, resident on Linux."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # else freed memory still counts as resident
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
            self.before = self.status("VmRSS")
        return self

    def __exit__(self, *exc):
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else self.status("VmHWM")
        self.bytes = peak - self.before

    @staticmethod
    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
