"""Memory of the host: what a CPU device takes as it is (`jax.device_put` copies what is aligned to less), and freed."""

from __future__ import annotations

import ctypes
import math

import numpy as np

_ALIGNMENT = 64  # bytes


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array, not filled."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """A contiguous copy, which nobody else knows: of a view of a file, of a transposed one."""
    copy = aligned(array.shape, array.dtype)
    np.copyto(copy, array)
    return copy


def give_back() -> None:
    """Gives the memory that was freed back to the system, which glibc puts off: gigabytes after large constants."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
