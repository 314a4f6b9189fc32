"""One view over the weights of a component, whether they lie in one safetensors file or in several shards."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from clip_jax.convert.safetensors import ONLY_SAFETENSORS, SafetensorsFile, TensorInfo, parse_json_object
from clip_jax.errors import CheckpointError

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "model.bf16.safetensors",
    "model.safetensors.index.bf16.json",
)
"""File names of the weights of a component folder, best first, as diffusers and transformers write them."""

_FOREIGN = re.compile(r".*\.(bin|msgpack|h5|gguf|ckpt|pt|pth|onnx)")
_SHARD = re.compile(r"[\w.-]+\.safetensors")  # a plain file name: an index must not lead out of its folder
_MAX_LISTED = 20  # faults in one message
_CHUNK_BYTES = 1 << 20


class TensorSource:
    """The tensors of one checkpoint, by name.

    Attributes:
        tensors: Name -> shape, dtype and file of every tensor.
        files: The safetensors files that hold them.
    """

    def __init__(self, parts: Sequence[SafetensorsFile]):
        """Joins files that have no tensor name in common."""
        self._parts = {name: part for part in parts for name in part.tensors}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: part.tensors[name] for name, part in self._parts.items()}
        )
        self.files = tuple(part.path for part in parts)

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as a read-only view of its file: no byte is read until it is used.

        Args:
            name: Its key in `tensors`.

        Raises:
            CheckpointError: If there is no such tensor.
        """
        if name not in self._parts:
            where = ", ".join(map(str, self.files))
            raise CheckpointError(
                f"{where}: expected a tensor {name!r}, found {len(self._parts)} others. Check that it is the"
                " checkpoint that you mean."
            )
        return self._parts[name].read(name)

    def sha256(self, progress: Callable[[int], object] | None = None) -> dict[str, str]:
        """Hashes the files, in constant memory.

        Args:
            progress: Called with the number of bytes hashed since its last call.

        Returns:
            File name -> hexadecimal digest.
        """
        return {path.name: _sha256(path, progress) for path in self.files}


def pick_weights(names: Collection[str]) -> str | None:
    """The file in a component folder that its weights are read from: the file itself, or an index of shards.

    Args:
        names: The plain names of the files in the folder.

    Returns:
        The first of `WEIGHTS` that is there, or None.
    """
    return next((name for name in WEIGHTS if name in names), None)


def no_weights(where: str, names: Iterable[str]) -> CheckpointError:
    """The error for a folder without any of `WEIGHTS`, with what it holds instead.

    Args:
        where: The folder, or what else to call it.
        names: The plain names of the files in it.
    """
    names = sorted(names)
    foreign = [name for name in names if _FOREIGN.fullmatch(name)]
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        hint = f"found {_listed(others)}. Rename the one to load."
    elif foreign:
        hint = f"found {_listed(foreign)}. {ONLY_SAFETENSORS}"
    else:
        hint = "found no weights at all. Check the path, or download the checkpoint again."
    return CheckpointError(f"{where}: expected {WEIGHTS[0]} or another of the usual names, {hint}")


def open_safetensors(path: Path) -> TensorSource:
    """Opens one safetensors file.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it cannot be opened, is no safetensors file, or is damaged or cut short.
    """
    return TensorSource([SafetensorsFile(path)])


def open_folder(folder: Path) -> TensorSource:
    """Opens the weights in a component folder of a diffusers or transformers checkpoint.

    Only files of the usual names (`WEIGHTS`) and the shards of an index are looked at, because such folders
    often hold the same weights several times over.

    Args:
        folder: The folder, such as `text_encoder/` of a pipeline.

    Raises:
        CheckpointError: If there is no such folder, it holds no safetensors weights, or these are damaged,
            cut short, or not what their index says.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(
            f"{folder}: expected a folder with {WEIGHTS[0]}, found {error.strerror}. Check the path."
        ) from error
    weights = pick_weights(names)
    if weights is None:
        raise no_weights(str(folder), names)
    if weights.endswith(".safetensors"):
        return open_safetensors(folder / weights)
    return _open_shards(folder / weights, names)


def read_index(path: Path) -> dict[str, str]:
    """Reads an index of shards.

    Args:
        path: A `model.safetensors.index.json`.

    Returns:
        Tensor name -> plain file name of the shard that holds it; never empty.

    Raises:
        CheckpointError: If it cannot be read, is damaged, or names files outside of its folder.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}. Get the file again.") from error
    weight_map = parse_json_object(path, text).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: expected a weight_map from tensor names to shards, found"
            f" {'an empty one' if weight_map == {} else type(weight_map).__name__}. Get the file again."
        )
    shards = weight_map.values()
    wrong = {repr(shard) for shard in shards if not (isinstance(shard, str) and _SHARD.fullmatch(shard))}
    if wrong:
        raise CheckpointError(
            f"{path}: expected plain names of safetensors files, found {_listed(sorted(wrong))}."
            " Get the checkpoint from a place that you trust."
        )
    return weight_map


def _open_shards(index: Path, names: Collection[str]) -> TensorSource:
    """Opens the shards of an index, in a folder with files of these names."""
    weight_map = read_index(index)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise CheckpointError(
            f"{index}: expected {len(shards)} shards beside it, found that {len(missing)} are missing:"
            f" {', '.join(missing)}. Download or copy these as well."
        )
    parts = [SafetensorsFile(index.parent / shard) for shard in shards]
    faults = [fault for part in parts for fault in _index_faults(part, weight_map)]
    if faults:
        raise CheckpointError(
            f"{index}: expected the tensors that it lists, found {_listed(faults, '; ')}. Get the index and"
            " all shards again, from one place."
        )
    return TensorSource(parts)


def _index_faults(part: SafetensorsFile, weight_map: Mapping[str, str]) -> list[str]:
    """Where an index and a shard disagree: nowhere if each tensor is in the shard that it names."""
    shard = part.path.name
    lacking = [name for name, place in weight_map.items() if place == shard and name not in part.tensors]
    misplaced = [name for name in part.tensors if weight_map.get(name, shard) != shard]
    unlisted = [name for name in part.tensors if name not in weight_map]
    return [
        *(f"{shard} lacks {name!r}" for name in lacking),
        *(f"{shard} holds {name!r} of {weight_map[name]}" for name in misplaced),
        *(f"{shard} holds {name!r}, which is not listed" for name in unlisted),
    ]


def _listed(items: Sequence[str], separator: str = ", ") -> str:
    """Items for a message, of which there may be very many."""
    more = len(items) - _MAX_LISTED
    return separator.join(items[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _sha256(path: Path, progress: Callable[[int], object] | None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()
