"""Reads the files that `torch.save` wrote before torch 1.6, and still does on request: tensors by memory map.

Five pickles in a row (a magic number, a protocol version, facts of the machine, the object, the keys of its
storages), then every storage: its number of elements as int64, and its bytes.
Reference: torch `serialization.py` (`_legacy_save`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from clip_jax.convert.readers.tensor_file import TensorInfo, cut_short, damaged, map_file, no_tensor
from clip_jax.convert.readers.torch_pickle import MAX_PICKLE_BYTES, Storage, load_pickle, tensors_in
from clip_jax.errors import CheckpointError

_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # 0x1950a86a20f9469cfc6c as a pickle of protocol 2
_PROTOCOL = 1001
_COUNT_BYTES = 8


class TorchLegacyFile:
    """A file of `torch.save` before zip files. Nothing in it is run.

    Attributes:
        path: The file.
        format: "PyTorch legacy pickle".
        metadata: Empty.
        tensors: Dotted name -> what the pickle says of that tensor.
    """

    format = "PyTorch legacy pickle"
    metadata: Mapping[str, str] = MappingProxyType({})

    def __init__(self, path: Path):
        """Opens a file, and reads its pickles.

        Raises:
            CheckpointError: It cannot be opened, is another kind of pickle, is damaged or cut short, or asks for
                anything but tensors.
        """
        self.path = path
        content = map_file(path)
        pickles = io.BytesIO(content[:MAX_PICKLE_BYTES].tobytes())
        if pickles.read(len(_MAGIC))[2:] != _MAGIC[2:]:
            raise CheckpointError(
                f"{path}: expected a file of torch.save, found another pickle. It is not run; get the model as "
                f"safetensors."
            )
        protocol, machine = load_pickle(pickles, path).value, load_pickle(pickles, path).value
        if protocol != _PROTOCOL or not isinstance(machine, dict):
            raise damaged(path, f"expected protocol {_PROTOCOL} and the facts of a machine after the magic number")
        if machine.get("little_endian") is not True:
            raise CheckpointError(
                f"{path}: was written on a big-endian machine, which is not read. Save it on another."
            )
        loaded = load_pickle(pickles, path, legacy=True)
        self._strided = tensors_in(loaded.value, path)
        keys = load_pickle(pickles, path).value
        self._storages = _find_storages(content, pickles.tell(), keys, loaded.storages, path)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: TensorInfo(name, tensor.shape, tensor.dtype) for name, tensor in self._strided.items()}
        )

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as a read-only view of the file: no byte is read until it is used.

        Raises:
            CheckpointError: The file has no such tensor.
        """
        if name not in self._strided:
            raise no_tensor(self, name)
        tensor = self._strided[name]
        return tensor.view(self._storages[tensor.storage.key])


def _find_storages(
    content: np.ndarray, start: int, keys: Any, storages: Mapping[str, Storage], path: Path
) -> dict[str, np.ndarray]:
    """Key -> bytes of every storage, in the order of `keys`; views."""
    strings = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not strings or len(keys) != len(storages) or set(keys) != storages.keys():
        raise damaged(path, f"expected a list of the keys of its {len(storages)} storages")
    found: dict[str, np.ndarray] = {}
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(content[start : start + _COUNT_BYTES].tobytes(), "little")
        if count != storage.numel:
            raise damaged(path, f"expected {storage.numel} elements in storage {key!r}, found {count}")
        start += _COUNT_BYTES
        end = start + storage.nbytes
        if end > len(content):
            raise cut_short(path, f"{storage.nbytes} bytes of storage {key!r}", end - len(content))
        found[key] = content[start:end]
        start = end
    return found
