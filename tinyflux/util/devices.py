"""The device: its peak rate, its memory, and settings for the whole process."""

import os
import resource
import time

import torch

# dense bfloat16 FLOP/s, from the vendors' data sheets
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def configure(device: torch.device, *, deterministic: bool = False) -> None:
    """Settings of the whole process: float32 matrix products use tensor cores (TF32) if there are any; deterministic:
    use only deterministic kernels."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


def peak_flops(device: torch.device) -> float | None:
    """Peak operations per second of a known GPU, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK.items() if key in name), None)


def measured_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """Measured operations per second of a square matrix product."""
    a = torch.randn(size, size, device=device).to(dtype)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        (a @ a)[0, 0].item()  # waits for the device
        done += 1
    return 2 * size**3 * done / (time.perf_counter() - started)


def peak_memory(device: torch.device) -> int:
    """Peak memory so far, in bytes: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
