"""Reads the zip files of `torch.save` and `torch.jit.save`: tensors by memory map, without torch.

    ROOT/data.pkl         the state dict, or the module, as a pickle (`torch_pickle.py`)
    ROOT/data/KEY         the bytes of a storage, not compressed
    ROOT/byteorder        "little"
    ROOT/constants.pkl    of TorchScript archives, with the code that is not looked at

Reference: torch `serialization.py` (`_save`), `torch/csrc/jit/serialization/export_module.cpp`.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from clip_jax.convert.readers.tensor_file import TensorInfo, cut_short, damaged, map_file, no_tensor
from clip_jax.convert.readers.torch_pickle import MAX_PICKLE_BYTES, Strided, load_pickle, tensors_in
from clip_jax.errors import CheckpointError

_LOCAL_HEADER_BYTES = 30
_MAX_DIRECTORY_BYTES = 2**23  # of a hundred thousand entries; the largest checkpoints have a few thousand
_ENCRYPTED, _UTF8 = 0x1, 0x800  # flags


class TorchZipFile:
    """A zip file of `torch.save`, or a TorchScript archive. Nothing in it is run.

    Attributes:
        path: The file.
        format: "PyTorch zip" or "TorchScript archive".
        metadata: Empty.
        tensors: Dotted name -> what the pickle says of that tensor.
    """

    metadata: Mapping[str, str] = MappingProxyType({})

    def __init__(self, path: Path):
        """Opens a file, and reads its directory and its pickle.

        Raises:
            CheckpointError: It cannot be opened, is another kind of zip file, is damaged or cut short, or its pickle
                asks for anything but tensors.
        """
        self.path = path
        self._content = map_file(path)
        entries = _entries(path)
        pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if not pickles:
            raise CheckpointError(
                f"{path}: expected a zip file of torch.save, found one without data.pkl: "
                f"{', '.join(list(entries)[:5]) or 'an empty one'}. Check that it is the file that you mean."
            )
        self._root = min(pickles, key=len).removesuffix("data.pkl")
        self.format = "TorchScript archive" if f"{self._root}constants.pkl" in entries else "PyTorch zip"
        self._entries = entries
        byteorder = f"{self._root}byteorder"
        if byteorder in entries and self._bytes(byteorder)[:16].tobytes() != b"little":
            raise CheckpointError(
                f"{path}: was written on a big-endian machine, which is not read. Save it on another."
            )
        pickle = self._bytes(f"{self._root}data.pkl")
        if len(pickle) > MAX_PICKLE_BYTES:
            raise damaged(path, f"expected a pickle of at most {MAX_PICKLE_BYTES} bytes, found {len(pickle)}")
        self._strided = tensors_in(load_pickle(io.BytesIO(pickle.tobytes()), path).value, path)
        for tensor in self._strided.values():
            self._storage(tensor)
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
        return tensor.view(self._storage(tensor))

    def _storage(self, tensor: Strided) -> np.ndarray:
        """The bytes of the storage of a tensor, as many as the pickle says."""
        storage = tensor.storage
        entry = f"{self._root}data/{storage.key}"
        if entry not in self._entries:
            raise damaged(self.path, f"expected the entry {entry!r}, found none")
        data, wanted = self._bytes(entry), storage.nbytes
        if len(data) < wanted:
            raise damaged(self.path, f"expected {wanted} bytes in {entry!r}, found {len(data)}")
        return data[:wanted]

    def _bytes(self, name: str) -> np.ndarray:
        """An entry of the archive, where its own header says that its bytes begin; a view."""
        info = self._entries[name]
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError(
                f"{self.path}: {name!r} is compressed, which torch never does with tensors. Unpack the archive and "
                f"pack it without compression (zip -0), or load and save it with torch."
            )
        if info.flag_bits & _ENCRYPTED:
            raise CheckpointError(f"{self.path}: {name!r} is encrypted, which is not read. Save it without a password.")
        start = info.header_offset
        header = self._content[start : start + _LOCAL_HEADER_BYTES].tobytes()
        if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
            raise damaged(self.path, f"expected the header of {name!r} at byte {start}")
        start += _LOCAL_HEADER_BYTES
        name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        listed = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
        if self._content[start : start + name_bytes].tobytes() != listed:
            raise damaged(self.path, f"expected one name of the entry that the directory calls {name!r}, found two")
        start += name_bytes + extra_bytes
        if start + info.file_size > len(self._content):
            raise cut_short(
                self.path, f"{info.file_size} bytes of {name!r}", start + info.file_size - len(self._content)
            )
        return self._content[start : start + info.file_size]


class _Bounded(io.FileIO):
    """A file of which `zipfile` cannot read a directory without bound: it does so at once, whatever its length."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY_BYTES:
            raise ValueError(f"expected a directory of at most {_MAX_DIRECTORY_BYTES} bytes, found {size}")
        return super().read(size) or b""


def _entries(path: Path) -> dict[str, zipfile.ZipInfo]:
    """Name -> entry of a zip file."""
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError) as error:
        raise damaged(path, f"its zip directory cannot be read ({error})") from error
    entries = {info.filename: info for info in listed}
    if len(entries) < len(listed):
        raise damaged(path, "expected every entry once, found some twice")
    return entries
