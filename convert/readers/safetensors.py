"""Reads safetensors files by memory map: lazy, zero-copy, and in every dtype that text encoders come in.

The safetensors package has no numpy reader for the 8 bit floats, hence this one. The format is that of the
README of the safetensors project: eight bytes of header length (little-endian), a JSON header, then the
tensors back to back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from clip_jax.convert.readers.tensor_file import (
    TensorInfo,
    cut_short,
    damaged,
    is_possible,
    map_file,
    no_tensor,
    parse_json_object,
    short,
)
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
        "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
        "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "C64": np.dtype("<c8"),
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

# Dtypes that numpy cannot view -> bits of an element. A diffusion model in the same file may be stored so.
_PACKED_BITS: Mapping[str, int] = MappingProxyType({"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6})
_NOTHING = np.dtype("V")  # of what cannot be read

_MAX_NUMBER = 2**63 - 1


@dataclass(frozen=True)
class _Place(TensorInfo):
    """A tensor, and where its bytes are, counted from the end of the header."""

    begin: int = 0
    end: int = 0


class SafetensorsFile:
    """One safetensors file. All of its header is checked at once, so that `read` meets no surprise.

    The file must not change while this object, or an array from it, is in use: both look at the file itself.

    Attributes:
        path: The file.
        format: "safetensors".
        metadata: The free-form strings of the header (`__metadata__`).
        tensors: Name -> what the header says of that tensor, in the order of their bytes in the file.
    """

    format = "safetensors"

    def __init__(self, path: Path):
        """Opens a file and checks its header.

        Args:
            path: The file.

        Raises:
            CheckpointError: If it cannot be opened, is no safetensors file, or is damaged or cut short.
        """
        self.path = path
        header, self._data = _split(path, map_file(path))
        self.metadata = _pop_metadata(path, header)
        places = [_place(path, name, entry) for name, entry in header.items()]
        places.sort(key=lambda place: (place.begin, place.end))
        _check_layout(path, places, len(self._data))
        self._places = {place.name: place for place in places}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._places)

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as a read-only view of the file: no byte is read until it is used.

        Args:
            name: Its key in `tensors`.

        Raises:
            CheckpointError: If the file has no such tensor, or one of a dtype that is not read.
        """
        if name not in self.tensors:
            raise no_tensor(self, name)
        place = self._places[name]
        if place.dtype == _NOTHING:
            raise CheckpointError(
                f"{self.path}: {name!r} is of dtype {place.stored}, which is not read; expected one of "
                f"{', '.join(DTYPES)}. Take the float16, bfloat16 or scaled fp8 file of the same model."
            )
        return self._data[place.begin : place.end].view(place.dtype).reshape(place.shape)


def _split(path: Path, content: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """The header and the bytes of the tensors."""
    start = content[:9].tobytes()
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise damaged(path, f"expected a header of at most {MAX_HEADER_BYTES} bytes, found a length of {length}")
    if start[8:] != b"{":
        raise damaged(path, f"expected a header that begins with b'{{', found {start[8:]!r}")
    if len(content) < 8 + length:
        raise cut_short(path, f"a header of {length} bytes", 8 + length - len(content))
    return parse_json_object(path, content[8 : 8 + length].tobytes()), content[8 + length :]


def _pop_metadata(path: Path, header: dict[str, Any]) -> Mapping[str, str]:
    """Takes the free-form strings out of a header."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, f"expected __metadata__ to map strings to strings, found {short(metadata)}")
    return MappingProxyType(metadata)


def _place(path: Path, name: str, entry: object) -> _Place:
    """Checks one entry of a header by itself."""
    match entry:
        case {"dtype": str(dtype_name), "shape": list(shape), "data_offsets": [begin, end]}:
            pass
        case _:
            raise damaged(
                path,
                f"expected dtype, shape and data_offsets [begin, end] of tensor {short(name)}, found {short(entry)}",
            )
    numbers = (*shape, begin, end)
    if not all(type(number) is int and 0 <= number <= _MAX_NUMBER for number in numbers) or begin > end:
        raise damaged(
            path,
            f"expected whole numbers from 0 to 2**63 - 1, and begin <= end, for tensor {short(name)},"
            f" found shape {short(shape)} and data_offsets {short([begin, end])}",
        )
    if dtype_name not in DTYPES and dtype_name not in _PACKED_BITS:
        raise CheckpointError(
            f"{path}: expected one of the dtypes {', '.join(DTYPES)} for tensor {short(name)}, found"
            f" {short(dtype_name)}. Save the checkpoint in one of these."
        )
    bits = _PACKED_BITS.get(dtype_name) or 8 * DTYPES[dtype_name].itemsize
    if not is_possible(shape, bits):
        raise damaged(path, f"the shape {short(shape)} of tensor {short(name)} is too large for any array")
    nbytes, rest = divmod(math.prod(shape) * bits, 8)
    if rest or end - begin != nbytes:
        raise damaged(
            path,
            f"expected {f'{nbytes} bytes and {rest} bits' if rest else f'{nbytes} bytes'} for tensor {short(name)},"
            f" {dtype_name} of shape {short(shape)}, found {end - begin} bytes",
        )
    dtype, stored = (_NOTHING, dtype_name) if dtype_name in _PACKED_BITS else (DTYPES[dtype_name], None)
    return _Place(name, tuple(shape), dtype, stored, begin=begin, end=end)


def _check_layout(path: Path, places: list[_Place], available: int) -> None:
    """Checks that tensors, sorted by their first byte, fill the file without hole, overlap or rest."""
    expected = 0
    for place in places:
        if place.begin != expected:
            fault = "overlaps the tensor before it" if place.begin < expected else "leaves a hole before it"
            raise damaged(
                path,
                f"expected {short(place.name)} at byte {expected}, found it at {place.begin}: it {fault}",
            )
        expected = place.end
    if expected > available:
        raise cut_short(path, f"{expected} bytes of tensors", expected - available)
    if expected < available:
        raise damaged(
            path,
            f"expected {expected} bytes of tensors, found {available - expected} more after the last one",
        )
