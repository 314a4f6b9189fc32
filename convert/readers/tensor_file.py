"""What every reader of a weight file has in common: tensors by name, read lazily from a memory map.

Files come from strangers. A reader checks everything that a file says about itself (sizes, offsets, counts,
depths) against the bytes that are there, before it believes any of it; whatever is wrong is a `CheckpointError`.
"""

from __future__ import annotations

import json
import math
import mmap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clip_jax.errors import CheckpointError


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor.

    Attributes:
        name: Its key in the file.
        shape: Its dimensions; () for a scalar.
        dtype: The numpy or ml_dtypes dtype that reading it yields.
        stored: How it is stored, where that is not its dtype: "Q4_0", "float8_e4m3fn with scale".
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    stored: str | None = None


class TensorFile(Protocol):
    """One weight file, opened and checked, not read.

    The file must not change while this object, or an array from it, is in use: both look at the file itself.
    """

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def format(self) -> str:
        """What it is, for people: "safetensors", "PyTorch zip", ..."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What it says about itself beside the tensors."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> what it says of that tensor, in the order of the file."""

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, as a read-only view of the file where its bytes lie there as they are.

        Raises:
            CheckpointError: The file has no such tensor.
        """


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, [size] uint8, without reading them.

    Raises:
        CheckpointError: No such file, an empty one, or one that cannot be read.
    """
    try:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no file"
            raise CheckpointError(f"{path}: expected a file of weights, found {found}. Check the path.")
        with path.open("rb") as file:
            if path.stat().st_size == 0:  # which cannot be mapped
                raise CheckpointError(
                    f"{path}: expected a file of weights, found an empty one. Download or copy it again."
                )
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}. Check path and permissions.") from error


def is_possible(shape: Sequence[int], bits: int) -> bool:
    """Whether numpy has arrays of this shape, with elements of so many bits; a file may say anything of an empty one.

    It counts bytes in int64, skips dimensions of 0 when it checks that they fit, and has at most 64 dimensions.
    """
    return len(shape) <= 64 and math.prod(size or 1 for size in shape) * bits <= 8 * (2**63 - 1)


def no_tensor(file: TensorFile, name: str) -> CheckpointError:
    """The error for a tensor that is not in a file."""
    return CheckpointError(
        f"{file.path}: expected a tensor {name!r}, found {len(file.tensors)} others. Check that it is the"
        " checkpoint that you mean."
    )


def damaged(path: Path, fault: str) -> CheckpointError:
    """The error for a file that contradicts itself or its format."""
    return CheckpointError(f"{path}: is damaged: {fault}. Get the file again.")


def cut_short(path: Path, expected: str, missing: int) -> CheckpointError:
    """The error for a file that ends too early."""
    return CheckpointError(
        f"{path}: is cut short: expected {expected}, found that {missing} bytes are missing. Download or copy it again."
    )


def short(value: object) -> str:
    """A value from a damaged file as text, at a length that fits a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits; a deep nest
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 100 else text[:100] + "..."


def parse_json_object(path: Path, text: bytes) -> dict[str, Any]:
    """Parses a JSON object that comes from outside, strictly.

    Args:
        path: The file it comes from, for the messages.
        text: UTF-8.

    Raises:
        CheckpointError: If it is not UTF-8, not JSON, not an object, nested too deeply, or has a key twice.
    """
    try:
        parsed = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"expected JSON, found {error}") from error
    if not isinstance(parsed, dict):
        raise damaged(path, f"expected a JSON object, found a {type(parsed).__name__}")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless it has a key twice."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {short(twice)} twice")
    return unique
