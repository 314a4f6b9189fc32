"""Reads GGUF files by memory map; quantised tensors through the `gguf` package, which knows their blocks.

Only the header is read here, strictly: the package's own reader believes counts and lengths of a damaged file.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
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
    short,
)
from clip_jax.errors import CheckpointError

_VERSIONS = (2, 3)
_MAX_DIMS, _MAX_DEPTH = 4, 4
_DEFAULT_ALIGNMENT = 32
_BLOCK_VALUES = 2**22  # values that are dequantised at a time: the package makes several float32 copies

_NUMBERS: Mapping[int, np.dtype] = MappingProxyType(
    {
        0: np.dtype("u1"),
        1: np.dtype("i1"),
        2: np.dtype("<u2"),
        3: np.dtype("<i2"),
        4: np.dtype("<u4"),
        5: np.dtype("<i4"),
        6: np.dtype("<f4"),
        7: np.dtype("?"),
        10: np.dtype("<u8"),
        11: np.dtype("<i8"),
        12: np.dtype("<f8"),
    }
)
_STRING, _ARRAY = 8, 9

#: Types of tensors that are not quantised, and what they are in numpy.
_PLAIN: Mapping[int, np.dtype] = MappingProxyType(
    {
        0: np.dtype("<f4"),
        1: np.dtype("<f2"),
        24: np.dtype("i1"),
        25: np.dtype("<i2"),
        26: np.dtype("<i4"),
        27: np.dtype("<i8"),
        28: np.dtype("<f8"),
        30: np.dtype(ml_dtypes.bfloat16),
    }
)


@dataclasses.dataclass(frozen=True)
class _Place(TensorInfo):
    """A tensor, where its bytes are in the file, and what they are."""

    begin: int = 0
    nbytes: int = 0
    kind: int = 0


class GgufFile:
    """One GGUF file, version 2 or 3, little-endian.

    Attributes:
        path: The file.
        format: "GGUF".
        metadata: Its key-value pairs; arrays of numbers are numpy arrays, those of strings are lists.
        tensors: Name -> shape as in torch ([out, in], the reverse of ggml's), dtype as read, quantisation.
    """

    format = "GGUF"

    def __init__(self, path: Path):
        """Opens a file and checks its header.

        Raises:
            CheckpointError: It cannot be opened, is damaged or cut short, of another version, or quantised in a way
                that is not known, or the `gguf` package is needed and missing.
        """
        self.path = path
        self._content = map_file(path)
        header = _Header(path, self._content)
        self.metadata: Mapping[str, Any] = MappingProxyType(header.metadata)
        self._places = {place.name: place for place in header.places}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._places)

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor: a read-only view of the file, or float32 where it is quantised.

        Raises:
            CheckpointError: The file has no such tensor.
        """
        if name not in self._places:
            raise no_tensor(self, name)
        place = self._places[name]
        data = self._content[place.begin : place.begin + place.nbytes]
        if place.kind in _PLAIN:
            return data.view(place.dtype).reshape(place.shape)
        return _dequantise(data, place)


def _dequantise(data: np.ndarray, place: _Place) -> np.ndarray:
    """The values of blocks, a few million at a time."""
    import gguf
    from gguf import quants

    kind = gguf.GGMLQuantizationType(place.kind)
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = data.reshape(-1, nbytes)
    result = np.empty((len(blocks), values), np.float32)
    step = max(1, _BLOCK_VALUES // values)
    with np.errstate(all="ignore"):  # of scales in a damaged file
        for start in range(0, len(blocks), step):
            result[start : start + step] = quants.dequantize(blocks[start : start + step], kind)
    return result.reshape(place.shape)


def _package(path: Path) -> ModuleType:
    """The `gguf` package.

    Raises:
        CheckpointError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f'{path} has quantised tensors, which the package gguf reads: pip install "clip-jax-text[gguf]".'
        ) from error
    return gguf


@functools.cache
def _can_dequantise(gguf: ModuleType, kind: int) -> bool:
    """Whether the package can, tried on a block of zeros: it has no list of what it can."""
    from gguf import quants

    try:
        quantisation = gguf.GGMLQuantizationType(kind)
        quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[quantisation][1]), np.uint8), quantisation)
    except (ValueError, KeyError, NotImplementedError):
        return False
    return True


class _Header:
    """Reads a header from its beginning to its end, and never past what is there."""

    def __init__(self, path: Path, content: np.ndarray):
        self.path, self._content, self._at = path, content, 4
        version = self._number(4)
        if version not in _VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            raise CheckpointError(
                f"{path}: expected GGUF of version {' or '.join(map(str, _VERSIONS))}, found "
                f"{'one of a big-endian machine' if big else f'version {version}'}. Convert it with llama.cpp."
            )
        tensors, pairs = self._number(8), self._number(8)
        # The least that a pair and a tensor take: a length, a type and a byte; two lengths, a type and an offset.
        self._check_count(pairs, 13, "key-value pairs")
        self._check_count(tensors, 24, "tensors")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            if key in self.metadata:
                raise damaged(path, f"expected the key {short(key)} once, found it twice")
            self.metadata[key] = self._value(self._number(4), _MAX_DEPTH)
        entries = [self._tensor() for _ in range(tensors)]
        self.places = self._place(entries)

    def _bytes(self, count: int, what: str) -> np.ndarray:
        end = self._at + count
        if end > len(self._content):
            raise cut_short(self.path, f"{count} bytes of {what}", end - len(self._content))
        taken, self._at = self._content[self._at : end], end
        return taken

    def _number(self, size: int) -> int:
        return int.from_bytes(self._bytes(size, "the header").tobytes(), "little")

    def _string(self) -> str:
        data = self._bytes(self._number(8), "a string").tobytes()
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"expected UTF-8, found {short(data)}") from error

    def _check_count(self, count: int, least: int, what: str) -> None:
        """Refuses more things than fit into what is left, each of which takes `least` bytes."""
        if count * least > len(self._content) - self._at:
            raise damaged(self.path, f"{count} {what} do not fit into the {len(self._content) - self._at} bytes left")

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _NUMBERS:
            return self._bytes(_NUMBERS[kind].itemsize, "a value").view(_NUMBERS[kind])[0].item()
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth == 0:
            raise damaged(self.path, f"expected a value of a known type, found type {kind} at depth {depth}")
        kind, count = self._number(4), self._number(8)
        if kind in _NUMBERS:
            return self._bytes(count * _NUMBERS[kind].itemsize, "an array").view(_NUMBERS[kind])
        self._check_count(count, 8, "entries of an array")
        return [self._value(kind, depth - 1) for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape in torch's order, type and offset."""
        name, dims = self._string(), self._number(4)
        if dims > _MAX_DIMS:
            raise damaged(self.path, f"expected at most {_MAX_DIMS} dimensions of {short(name)}, found {dims}")
        shape = tuple(reversed([self._number(8) for _ in range(dims)]))
        return name, shape, self._number(4), self._number(8)

    def _place(self, entries: list[tuple[str, tuple[int, ...], int, int]]) -> list[_Place]:
        """Where the tensors are: aligned, after the header, within the file, and apart from each other."""
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 2**16 or alignment & (alignment - 1):
            raise damaged(self.path, f"expected an alignment that is a power of two, found {short(alignment)}")
        data = -(-self._at // alignment) * alignment
        places = []
        for name, shape, kind, offset in entries:
            dtype, values, nbytes, stored = self._type(kind, name)
            size = math.prod(shape)
            if size % values or (shape and shape[-1] % values):
                raise damaged(self.path, f"expected rows of {values} values in {short(name)}, found shape {shape}")
            begin = data + offset
            nbytes = size // values * nbytes
            if offset % alignment:
                raise damaged(self.path, f"expected {short(name)} at a multiple of {alignment}, found it at {offset}")
            if begin + nbytes > len(self._content):
                raise cut_short(self.path, f"{nbytes} bytes of {short(name)}", begin + nbytes - len(self._content))
            shape = self._original_shape(name, shape)
            if not is_possible(shape, 8 * dtype.itemsize):
                raise damaged(self.path, f"the shape {short(shape)} of {short(name)} is too large for any array")
            places.append(_Place(name, shape, dtype, stored, begin=begin, nbytes=nbytes, kind=kind))
        places.sort(key=lambda place: (place.begin, place.nbytes))
        for before, after in itertools.pairwise(places):
            if before.begin + before.nbytes > after.begin:
                raise damaged(self.path, f"{short(after.name)} overlaps {short(before.name)}")
        if len({place.name for place in places}) < len(places):
            raise damaged(self.path, "expected every tensor once, found some twice")
        return places

    def _type(self, kind: int, name: str) -> tuple[np.dtype, int, int, str | None]:
        """Dtype as read, values and bytes of a block, and the name of the quantisation."""
        if kind in _PLAIN:
            return _PLAIN[kind], 1, _PLAIN[kind].itemsize, None
        gguf = _package(self.path)
        names = {quantisation.value: quantisation.name for quantisation in gguf.GGMLQuantizationType}
        if not _can_dequantise(gguf, kind):
            raise CheckpointError(
                f"{self.path}: {short(name)} is of type {names.get(kind, kind)}, which the package gguf does not "
                f"dequantise. Take a file with another quantisation, such as Q8_0."
            )
        values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        return np.dtype(np.float32), values, nbytes, names[kind]

    def _original_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a tensor had before a tool reshaped it to fit ggml, if it says so."""
        original = self.metadata.get(f"comfy.gguf.orig_shape.{name}")
        if not isinstance(original, np.ndarray) or original.dtype.kind not in "iu" or len(original) > _MAX_DIMS:
            return shape
        found = tuple(int(size) for size in original)
        return found if min(found, default=0) >= 0 and math.prod(found) == math.prod(shape) else shape
