"""Reads safetensors files by memory map: lazy, zero-copy, and in every dtype that text encoders come in.

The safetensors package has no numpy reader for the 8 bit floats, hence this one. The format is that of the
README of the safetensors project: eight bytes of header length (little-endian), a JSON header, then the
tensors back to back.
"""

from __future__ import annotations

import json
import math
import mmap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from clip_jax.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""Longest header that is read, in bytes: the limit of the safetensors project."""

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "F64": np.dtype("<f8"),
        "F32": np.dtype("<f4"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "I64": np.dtype("<i8"),
        "I32": np.dtype("<i4"),
        "I16": np.dtype("<i2"),
        "I8": np.dtype("i1"),
        "U64": np.dtype("<u8"),
        "U32": np.dtype("<u4"),
        "U16": np.dtype("<u2"),
        "U8": np.dtype("u1"),
        "BOOL": np.dtype("?"),
    }
)
"""Names of dtypes in a header, and what they are in numpy."""

_MAX_DIMS = 64  # of a numpy array
_MAX_NUMBER = 2**63 - 1  # numpy counts bytes in int64, and skips dimensions of 0 when it checks that they fit

_OTHER_FORMATS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    ((b"version https://git-lfs",), "a Git LFS pointer to the real file", "Run `git lfs pull` beside it."),
    ((b"PK\x03\x04",), "a zip archive, most likely a PyTorch checkpoint", ""),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a pickle, most likely a PyTorch checkpoint", ""),
    ((b"\x89HDF",), "HDF5, most likely of TensorFlow", ""),
    (tuple(bytes([first]) for first in (*range(0x81, 0x90), 0xDE, 0xDF)), "msgpack, most likely of Flax", ""),
    ((b"GGUF",), "a GGUF file", ""),
    ((b"<",), "an HTML or XML page, most likely a failed download", "Download it again."),
    ((b"{",), "a JSON file", "If it is an index of shards, open the folder that holds it."),
)
ONLY_SAFETENSORS = (
    "Only safetensors can be read so far: load it with the library that wrote it, and save it with"
    " `save_pretrained(folder, safe_serialization=True)`."
)
"""What to do about weights in another format."""


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a file says of one tensor.

    Attributes:
        name: Its key in the checkpoint.
        shape: Its dimensions; () for a scalar.
        dtype: Its numpy or ml_dtypes dtype.
        file: The file that holds it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    _begin: int = field(repr=False)  # bytes, counted from the end of the header
    _end: int = field(repr=False)


class SafetensorsFile:
    """One safetensors file. All of its header is checked at once, so that `read` meets no surprise.

    The file must not change while this object, or an array from it, is in use: both look at the file itself.

    Attributes:
        path: The file.
        metadata: The free-form strings of the header (`__metadata__`).
        tensors: Name -> what the header says of that tensor, in the order of their bytes in the file.
    """

    def __init__(self, path: Path):
        """Opens a file and checks its header.

        Args:
            path: The file.

        Raises:
            CheckpointError: If it cannot be opened, is no safetensors file, or is damaged or cut short.
        """
        self.path = path
        header, self._data = _split(path, _map_file(path))
        self.metadata = _pop_metadata(path, header)
        infos = [_tensor_info(path, name, entry) for name, entry in header.items()]
        infos.sort(key=lambda info: (info._begin, info._end))
        _check_layout(path, infos, len(self._data))
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType({info.name: info for info in infos})

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as a read-only view of the file: no byte is read until it is used.

        Args:
            name: Its key in `tensors`.

        Raises:
            CheckpointError: If the file has no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path}: expected a tensor {name!r}, found {len(self.tensors)} others. Check that it is"
                " the checkpoint that you mean."
            )
        info = self.tensors[name]
        return self._data[info._begin : info._end].view(info.dtype).reshape(info.shape)


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
        raise _damaged(path, f"expected JSON, found {error}") from error
    if not isinstance(parsed, dict):
        raise _damaged(path, f"expected a JSON object, found a {type(parsed).__name__}")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless it has a key twice."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {_short(twice)} twice")
    return unique


def _map_file(path: Path) -> np.ndarray:
    """The bytes of a file, without reading them."""
    try:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no file"
            raise CheckpointError(f"{path}: expected a safetensors file, found {found}. Check the path.")
        with path.open("rb") as file:
            if path.stat().st_size == 0:  # which cannot be mapped
                raise CheckpointError(
                    f"{path}: expected a safetensors file, found an empty one. Download or copy it again."
                )
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}. Check path and permissions.") from error


def _split(path: Path, content: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """The header and the bytes of the tensors."""
    start = content[:32].tobytes()
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES or start[8:9] != b"{":
        raise CheckpointError(f"{path}: expected a safetensors file, found {_what_else(start, length)}")
    if len(content) < 8 + length:
        raise _cut_short(path, f"a header of {length} bytes", 8 + length - len(content))
    return parse_json_object(path, content[8 : 8 + length].tobytes()), content[8 + length :]


def _what_else(start: bytes, length: int) -> str:
    """What a file that begins so can be, since it is not safetensors, and what to do about it."""
    for magics, kind, advice in _OTHER_FORMATS:
        if start.startswith(magics):
            return f"what looks like {kind}. {advice or ONLY_SAFETENSORS}"
    if len(start) < 9:
        return f"only {len(start)} bytes. Download or copy it again."
    if length > MAX_HEADER_BYTES:
        return f"a header length of {length} bytes, above the limit of {MAX_HEADER_BYTES}. Get the file again."
    return f"a header that begins with {start[8:9]!r}, not with b'{{'. Get the file again."


def _pop_metadata(path: Path, header: dict[str, Any]) -> Mapping[str, str]:
    """Takes the free-form strings out of a header."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, f"expected __metadata__ to map strings to strings, found {_short(metadata)}")
    return MappingProxyType(metadata)


def _tensor_info(path: Path, name: str, entry: object) -> TensorInfo:
    """Checks one entry of a header by itself."""
    match entry:
        case {"dtype": str(dtype_name), "shape": list(shape), "data_offsets": [begin, end]}:
            pass
        case _:
            raise _damaged(
                path,
                f"expected dtype, shape and data_offsets [begin, end] of tensor {_short(name)}, found {_short(entry)}",
            )
    numbers = (*shape, begin, end)
    if not all(type(number) is int and 0 <= number <= _MAX_NUMBER for number in numbers) or begin > end:
        raise _damaged(
            path,
            f"expected whole numbers from 0 to 2**63 - 1, and begin <= end, for tensor {_short(name)},"
            f" found shape {_short(shape)} and data_offsets {_short([begin, end])}",
        )
    if dtype_name not in DTYPES:
        raise CheckpointError(
            f"{path}: expected one of the dtypes {', '.join(DTYPES)} for tensor {_short(name)}, found"
            f" {_short(dtype_name)}. Save the checkpoint in one of these."
        )
    dtype = DTYPES[dtype_name]
    nonzero = (size or 1 for size in shape)
    if len(shape) > _MAX_DIMS or math.prod(nonzero) * dtype.itemsize > _MAX_NUMBER:
        raise _damaged(path, f"the shape {_short(shape)} of tensor {_short(name)} is too large for any array")
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise _damaged(
            path,
            f"expected {nbytes} bytes for tensor {_short(name)}, {dtype_name} of shape {_short(shape)},"
            f" found {end - begin}",
        )
    return TensorInfo(name, tuple(shape), dtype, path, begin, end)


def _check_layout(path: Path, infos: list[TensorInfo], available: int) -> None:
    """Checks that tensors, sorted by their first byte, fill the file without hole, overlap or rest."""
    expected = 0
    for info in infos:
        if info._begin != expected:
            fault = "overlaps the tensor before it" if info._begin < expected else "leaves a hole before it"
            raise _damaged(
                path,
                f"expected {_short(info.name)} at byte {expected}, found it at {info._begin}: it {fault}",
            )
        expected = info._end
    if expected > available:
        raise _cut_short(path, f"{expected} bytes of tensors", expected - available)
    if expected < available:
        raise _damaged(
            path,
            f"expected {expected} bytes of tensors, found {available - expected} more after the last one",
        )


def _damaged(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{path}: is damaged: {fault}. Get the file again.")


def _cut_short(path: Path, expected: str, missing: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: is cut short: expected {expected}, found that {missing} bytes are missing. Download or copy it again."
    )


def _short(value: object) -> str:
    """A value from a damaged file as text, at a length that fits a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits; a deep nest
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 100 else text[:100] + "..."
