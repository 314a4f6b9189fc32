"""How torch describes a tensor: a storage, that is memory with a type, and where in it the elements lie.

Reference: torch `_utils.py` (`_rebuild_tensor_v2`, `_rebuild_tensor_v3`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from clip_jax.convert.readers.tensor_file import is_possible, short

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "torch.float64": np.dtype("<f8"),
        "torch.float32": np.dtype("<f4"),
        "torch.float16": np.dtype("<f2"),
        "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
        "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
        "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
        "torch.float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
        "torch.float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
        "torch.float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
        "torch.complex64": np.dtype("<c8"),
        "torch.complex128": np.dtype("<c16"),
        "torch.int64": np.dtype("<i8"),
        "torch.int32": np.dtype("<i4"),
        "torch.int16": np.dtype("<i2"),
        "torch.int8": np.dtype("i1"),
        "torch.uint64": np.dtype("<u8"),
        "torch.uint32": np.dtype("<u4"),
        "torch.uint16": np.dtype("<u2"),
        "torch.uint8": np.dtype("u1"),
        "torch.bool": np.dtype("?"),
    }
)
"""torch's dtypes, and what they are in numpy."""

STORAGES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "torch.DoubleStorage": DTYPES["torch.float64"],
        "torch.FloatStorage": DTYPES["torch.float32"],
        "torch.HalfStorage": DTYPES["torch.float16"],
        "torch.BFloat16Storage": DTYPES["torch.bfloat16"],
        "torch.LongStorage": DTYPES["torch.int64"],
        "torch.IntStorage": DTYPES["torch.int32"],
        "torch.ShortStorage": DTYPES["torch.int16"],
        "torch.CharStorage": DTYPES["torch.int8"],
        "torch.ByteStorage": DTYPES["torch.uint8"],
        "torch.BoolStorage": DTYPES["torch.bool"],
        "torch.ComplexFloatStorage": DTYPES["torch.complex64"],
        "torch.ComplexDoubleStorage": DTYPES["torch.complex128"],
        "torch.storage.UntypedStorage": DTYPES["torch.uint8"],
    }
)
"""torch's classes of storages, and the dtype of their elements; uint8 where the tensors say it themselves."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """Memory that tensors share.

    Attributes:
        key: Its name in the file.
        dtype: Of its elements.
        numel: How many elements it has.
    """

    key: str
    dtype: np.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return self.numel * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Strided:
    """A tensor: where its elements are in a storage. Lengths and offsets are in elements.

    Attributes:
        storage: That holds them.
        dtype: Of an element.
        offset: Of the first one.
        shape: Its dimensions.
        strides: Of each.
    """

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, data: np.ndarray) -> np.ndarray:
        """The tensor as a view of the storage's bytes, [size] uint8."""
        size = self.dtype.itemsize
        strides = [stride * size for stride in self.strides]
        return np.ndarray(self.shape, self.dtype, data.data, self.offset * size, strides)


def strided(storage: Any, offset: Any, size: Any, stride: Any, dtype: np.dtype | None = None) -> Strided:
    """A tensor whose every element is in its storage.

    Args:
        storage: A `Storage`.
        offset: Of the first element, in elements.
        size: The dimensions.
        stride: The step along each, in elements.
        dtype: Of the elements, where it is not that of the storage.

    Raises:
        TypeError: These are no such things.
        ValueError: The elements are not all in the storage, overlap so much that they are more than its elements, or
            are too many for any array.
    """
    if not isinstance(storage, Storage):
        raise TypeError(f"expected a storage, found {kind(storage)}")
    for numbers in (size, stride):
        if not isinstance(numbers, tuple | list):
            raise TypeError(f"expected a tuple of numbers for a size or stride, found {kind(numbers)}")
    if len(size) != len(stride):
        raise ValueError(
            f"expected a stride for every dimension, found {len(size)} dimensions and {len(stride)} strides"
        )
    for number in (offset, *size, *stride):
        if type(number) is not int or number < 0:
            raise ValueError(f"expected whole numbers for offset, size and stride, found {kind(number)}")
    dtype = dtype or storage.dtype
    if not is_possible(size, 8 * dtype.itemsize):
        raise ValueError(f"the shape {short(size)} is too large for any array")
    available = storage.nbytes // dtype.itemsize
    count = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if count > available or (count and last >= available):
        raise ValueError(
            f"expected a tensor within the {available} elements of its storage, found shape {short(size)}, strides "
            f"{short(stride)}, offset {short(offset)}"
        )
    # Along a length of 1, and in a tensor without elements, no step is taken, and so it may be any number.
    steps = tuple(step if count and length > 1 else 0 for length, step in zip(size, stride, strict=True))
    return Strided(storage, dtype, offset if count else 0, tuple(size), steps)


def kind(value: Any) -> str:
    """What a value from a pickle is, for messages; never a look into a container, which may hold itself."""
    return short(value) if isinstance(value, int | str) else f"a {type(value).__name__}"
