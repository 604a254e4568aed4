"""What all kernels ask of the device, and how long a call takes there."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable

import torch
from torch import Tensor

# Kernels raise two to a power, so scores are scaled by it.
LOG2E = 1.4426950408889634
HALF = (torch.bfloat16, torch.float16)
HEAD_SIZES = (64, 80, 96, 128, 256)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)


@functools.cache
def multiprocessors(index: int) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def copyable(tensor: Tensor) -> bool:
    """Whether Hopper's copy engine takes a half-precision tensor: last dimension contiguous, all else by 16 bytes."""
    return tensor.stride(-1) == 1 and all(s % 8 == 0 for s in tensor.stride()[:-1]) and tensor.data_ptr() % 16 == 0


def no_kernels(tensor: Tensor) -> str:
    """Why no kernel runs where a tensor is, or an empty string if kernels do."""
    if tensor.device.type != "cuda":
        return f"the tensors are on `{tensor.device.type}`, the kernels need a CUDA device"
    return "" if _has_triton() else "triton is not installed"


def no_head_size(tensor: Tensor) -> str:
    """Why no kernel takes the last dimension of a tensor, or an empty string if one does."""
    known = ", ".join(map(str, HEAD_SIZES))
    return "" if tensor.shape[-1] in HEAD_SIZES else f"head size {tensor.shape[-1]} is not one of {known}"


def elapsed_ms(run: Callable[[], object], cuda: bool) -> float:
    """Milliseconds of one call, by events of the GPU or by the clock."""
    if not cuda:
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
