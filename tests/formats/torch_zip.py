"""Writes the zip files of `torch.save` without torch: the pickle, instruction by instruction, and the storages.

Reference: torch `serialization.py` (`_save`), Python `pickletools`.
"""

from __future__ import annotations

import itertools
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}


class Global(NamedTuple):
    """A reference to a class."""

    module: str
    name: str


def write_torch_zip(path: Path, value: Any) -> Path:
    """Writes what `torch.save(value, path)` does.

    Args:
        path: The file.
        value: Dicts, lists, texts, numbers, `Global`s, and arrays, which become tensors.
    """
    storages: dict[str, bytes] = {}
    data = b"".join([pickle.PROTO, b"\x02", *_pickled(value, storages), pickle.STOP])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", "3\n")
    return path


def _pickled(value: Any, storages: dict[str, bytes]) -> Iterator[bytes]:
    match value:
        case Global(module, name):
            yield b"".join([pickle.GLOBAL, f"{module}\n{name}\n".encode()])
        case None:
            yield pickle.NONE
        case bool():
            yield pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            yield pickle.BININT + struct.pack("<i", value)
        case str():
            yield pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()
        case dict():
            yield pickle.EMPTY_DICT + pickle.MARK
            for entry in itertools.chain.from_iterable(value.items()):
                yield from _pickled(entry, storages)
            yield pickle.SETITEMS
        case list():
            yield pickle.EMPTY_LIST + pickle.MARK
            for entry in value:
                yield from _pickled(entry, storages)
            yield pickle.APPENDS
        case tuple():
            yield pickle.MARK
            for entry in value:
                yield from _pickled(entry, storages)
            yield pickle.TUPLE
        case np.ndarray() | np.generic():
            yield from _tensor(np.asarray(value), storages)
        case _:
            raise TypeError(f"no way to write a {type(value).__name__}")


def _tensor(array: np.ndarray, storages: dict[str, bytes]) -> Iterator[bytes]:
    """`torch._utils._rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())`."""
    key = str(len(storages))
    storages[key] = np.ascontiguousarray(array).tobytes()
    strides = tuple(int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim))
    storage = ("storage", Global("torch", _STORAGES[array.dtype.name]), key, "cpu", array.size)
    yield from _pickled(Global("torch._utils", "_rebuild_tensor_v2"), storages)
    yield pickle.MARK
    yield from _pickled(storage, storages)
    yield pickle.BINPERSID
    for argument in (0, array.shape, strides, False, Global("collections", "OrderedDict")):
        yield from _pickled(argument, storages)
    yield pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.TUPLE + pickle.REDUCE
