"""Reads Flax's msgpack files by memory map: nested maps of arrays, as `flax.serialization` writes them.

An array is an extension of type 1 around [shape, dtype, bytes]; one of more than a gigabyte is a map of chunks. The
msgpack package would copy all of it into memory, and make what a damaged file says; here only its structure is
walked.
Reference: https://github.com/msgpack/msgpack/blob/master/spec.md; flax `serialization.py` (`_ndarray_to_bytes`,
`_chunk`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

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

_MAX_DEPTH, _MAX_DIMS = 64, 64
_ARRAY, _SCALAR = 1, 3  # flax's extension types that hold [shape, dtype, bytes]
_CHUNKED = "__msgpack_chunked_array__"

_DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        **{name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8")},
        **{name: np.dtype(name) for name in ("uint64", "uint32", "uint16", "uint8", "bool")},
        "bfloat16": np.dtype(ml_dtypes.bfloat16),
        "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
        "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    }
)

# First byte -> kind, bytes of the length that follows, and what they count.
_LENGTHS = {
    **{0xD9 + i: ("str", 1 << i) for i in range(3)},
    **{0xC4 + i: ("bin", 1 << i) for i in range(3)},
    **{0xDC + i: ("array", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
    **{0xC7 + i: ("ext", 1 << i) for i in range(3)},
}
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, **{0xCC + i: 1 << i for i in range(4)}}
_FIXED |= {0xD0 + i: 1 << i for i in range(4)}


class _Piece(NamedTuple):
    """An array of the file, or a chunk of one: where its bytes are."""

    shape: tuple[int, ...]
    dtype: np.dtype
    begin: int
    end: int


class MsgpackFile:
    """One file of `flax.serialization.to_bytes`.

    Attributes:
        path: The file.
        format: "Flax msgpack".
        metadata: Empty.
        tensors: Path, joined by "/" -> shape and dtype. A "params" at the top is left out of the paths.
    """

    format = "Flax msgpack"
    metadata: Mapping[str, str] = MappingProxyType({})

    def __init__(self, path: Path):
        """Opens a file and walks through its structure.

        Raises:
            CheckpointError: It cannot be opened, is no msgpack of nested maps of arrays, or damaged or cut short.
        """
        self.path = path
        self._content = map_file(path)
        walker = _Walker(path, self._content)
        pieces = walker.pieces()
        # Of a TrainState, or of the variables of a module, only the params.
        if any(name.startswith("params/") for name in pieces):
            pieces = {n.removeprefix("params/"): piece for n, piece in pieces.items() if n.startswith("params/")}
        self._pieces = pieces
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: TensorInfo(name, shape, parts[0].dtype) for name, (shape, parts) in pieces.items()}
        )

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, as a read-only view of the file unless it was written in chunks.

        Raises:
            CheckpointError: The file has no such tensor.
        """
        if name not in self._pieces:
            raise no_tensor(self, name)
        shape, parts = self._pieces[name]
        views = [self._content[part.begin : part.end].view(part.dtype) for part in parts]
        return (views[0] if len(views) == 1 else np.concatenate(views)).reshape(shape)


class _Walker:
    """Walks through a file from its first byte to its last, and never past what is there."""

    def __init__(self, path: Path, content: np.ndarray):
        self._path, self._content, self._at = path, content, 0

    def pieces(self) -> dict[str, tuple[tuple[int, ...], list[_Piece]]]:
        """Path -> shape and pieces of every array.

        Raises:
            CheckpointError: The file is not what Flax writes.
        """
        found: dict[str, tuple[tuple[int, ...], list[_Piece]]] = {}
        chunked: dict[str, dict[str, dict[int, _Piece | int]]] = {}
        for names, piece in self._walk(()):
            if any(name == _CHUNKED for name in names):
                continue  # the mark itself, which is `True`
            if len(names) > 2 and names[-2] in ("shape", "chunks") and names[-1].isdecimal():
                parent = chunked.setdefault("/".join(names[:-2]), {"shape": {}, "chunks": {}})
                parent[names[-2]][int(names[-1])] = piece
            elif isinstance(piece, _Piece):
                name = "/".join(names)
                if name in found:
                    raise damaged(self._path, f"expected the path {short(name)} once, found it twice")
                found[name] = (piece.shape, [piece])
        if self._at != len(self._content):
            raise damaged(
                self._path, f"expected the end at byte {self._at}, found {len(self._content) - self._at} more"
            )
        for name, parts in chunked.items():
            found[name] = self._joined(name, parts)
        return found

    def _joined(self, name: str, parts: dict[str, dict[int, _Piece | int]]) -> tuple[tuple[int, ...], list[_Piece]]:
        shape = tuple(size for _, size in sorted(parts["shape"].items()) if isinstance(size, int))
        chunks = [chunk for _, chunk in sorted(parts["chunks"].items()) if isinstance(chunk, _Piece)]
        values = sum(math.prod(chunk.shape) for chunk in chunks)
        same = len({chunk.dtype for chunk in chunks}) == 1
        bits = 8 * chunks[0].dtype.itemsize if same else 0
        if not same or min(shape, default=0) < 0 or math.prod(shape) != values or not is_possible(shape, bits):
            raise damaged(self._path, f"expected chunks of {short(name)} that make up shape {short(shape)}")
        return shape, chunks

    def _walk(self, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], _Piece | int]]:
        """Every array and every whole number, with the names on the way to it."""
        if len(names) > _MAX_DEPTH:
            raise damaged(self._path, f"expected maps at most {_MAX_DEPTH} deep")
        kind, length = self._head()
        if kind == "map":
            for _ in range(length):
                yield from self._walk((*names, self._key()))
        elif kind == "ext":
            code, end = self._number(1), self._at + length
            if code in (_ARRAY, _SCALAR):
                yield names, self._array(end)
                if self._at != end:
                    raise damaged(self._path, f"expected {short('/'.join(names))} to end at byte {end}")
            self._skip(end - self._at)
        elif kind == "int":
            yield names, length
        elif kind in ("str", "bin"):
            self._skip(length)
        elif kind == "array":
            raise damaged(self._path, f"expected a map or an array of Flax at {short('/'.join(names))}, found a list")

    def _key(self) -> str:
        kind, length = self._head()
        if kind == "int":
            return str(length)
        if kind != "str":
            raise damaged(self._path, f"expected a name for a key, found {kind}")
        data = self._take(length).tobytes()
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise damaged(self._path, f"expected UTF-8, found {short(data)}") from error

    def _array(self, end: int) -> _Piece:
        """The payload of an array: [shape, dtype, bytes]."""
        if self._head() != ("array", 3):
            raise damaged(self._path, "expected shape, dtype and bytes of an array")
        kind, dims = self._head()
        if kind != "array" or dims > _MAX_DIMS:
            raise damaged(self._path, f"expected a shape of at most {_MAX_DIMS} dimensions")
        sizes = [self._head() for _ in range(dims)]
        kind, length = self._head()
        name = self._take(length).tobytes().decode(errors="replace") if kind == "str" else kind
        kind, length = self._head()
        if any(what != "int" or size < 0 for what, size in sizes) or name not in _DTYPES or kind != "bin":
            raise damaged(self._path, f"expected the shape, dtype and bytes of an array, found dtype {short(name)}")
        shape, dtype = tuple(size for _, size in sizes), _DTYPES[name]
        begin = self._at
        if math.prod(shape) * dtype.itemsize != length or not is_possible(shape, 8 * dtype.itemsize):
            raise damaged(self._path, f"expected {length} bytes of {name} to have another shape than {short(shape)}")
        self._skip(length)
        if self._at > end:
            raise damaged(self._path, f"expected an array to end at byte {end}, found it to end at {self._at}")
        return _Piece(shape, dtype, begin, self._at)

    def _head(self) -> tuple[str, int]:
        """The kind of the next object, and its length; for a whole number, itself."""
        first = self._number(1)
        if first < 0x80:
            return "int", first
        if first >= 0xE0:
            return "int", first - 0x100
        if first < 0x90:
            return "map", first & 0x0F
        if first < 0xA0:
            return "array", first & 0x0F
        if first < 0xC0:
            return "str", first & 0x1F
        if first in _LENGTHS:
            kind, size = _LENGTHS[first]
            return kind, self._number(size)
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        if first not in _FIXED:
            raise damaged(self._path, f"byte {self._at - 1} begins nothing: {first:#x}")
        value = self._number(_FIXED[first])
        if 0xCC <= first <= 0xCF:
            return "int", value
        if 0xD0 <= first <= 0xD3:
            bits = 8 * _FIXED[first]
            return "int", value - (value >> (bits - 1) << bits)
        return "other", 0

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size).tobytes(), "big")

    def _take(self, count: int) -> np.ndarray:
        start = self._at
        self._skip(count)
        return self._content[start : self._at]

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._content):
            missing = self._at - len(self._content)
            raise cut_short(self._path, f"{count} bytes at byte {self._at - count}", missing)
