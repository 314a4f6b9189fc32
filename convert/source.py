"""One view over the weights of a source, whether they lie in one file or in several shards, of any format."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path

from clip_jax.convert.readers import TensorFile, open_file
from clip_jax.convert.readers.tensor_file import parse_json_object
from clip_jax.convert.state import StateDict, Tensor
from clip_jax.errors import CheckpointError
from clip_jax.tokenizers.files import names_in

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "model.bf16.safetensors",
    "model.safetensors.index.bf16.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.fp16.bin",
    "pytorch_model.bin.index.fp16.json",
    "open_clip_pytorch_model.bin",
    "flax_model.msgpack",
    "flax_model.msgpack.index.json",
)
"""File names of the weights of a component folder, best first, as transformers, diffusers and open_clip write them."""

ENCODER_FOLDER = re.compile(r"text_encoder(_\d+)?")
"""Folders of a pipeline with a text encoder each; `text_encoders` beside them has files of other programs."""

_WEIGHTS_FILE = re.compile(r".*\.(safetensors|bin|msgpack|h5|gguf|ckpt|pt|pth|onnx)")
_SHARD = re.compile(r"[\w.-]+\.(safetensors|bin|msgpack)")  # a plain name: an index must not lead out of its folder
_MAX_LISTED = 20  # faults in one message
_CHUNK_BYTES = 1 << 20


class TensorSource:
    """The tensors of one checkpoint, by name.

    Attributes:
        state: Name -> tensor, unread.
        files: The files that hold them.
        format: What these files are, for people.
        metadata: What the first of them says about itself beside the tensors.
    """

    def __init__(self, parts: Sequence[TensorFile]):
        """Joins files that have no tensor name in common."""
        self.state: StateDict = {
            name: Tensor(name, info.shape, info.dtype, partial(part.read, name), info.stored)
            for part in parts
            for name, info in part.tensors.items()
        }
        self.files = tuple(part.path for part in parts)
        self.format = ", ".join(dict.fromkeys(part.format for part in parts))
        self.metadata = parts[0].metadata


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
    others = sorted(name for name in names if _WEIGHTS_FILE.fullmatch(name))
    if others:
        hint = f"found {_listed(others)}. Name the file itself as the source, if it is one of them."
    else:
        hint = "found no weights at all. Check the path, or download the checkpoint again."
    return CheckpointError(f"{where}: expected {WEIGHTS[0]} or another of the usual names, {hint}")


def open_source(path: Path) -> TensorSource:
    """Opens a file of weights, an index of shards, or the weights in a component folder.

    In a folder only files of the usual names (`WEIGHTS`) and the shards of an index are looked at, because such
    folders often hold the same weights several times over.

    Args:
        path: The file, or a folder such as `text_encoder/` of a pipeline.

    Raises:
        CheckpointError: Nothing to read there, or it is damaged, cut short, of a format that is not read, or two
            shards have a tensor of the same name.
    """
    if path.name.endswith(".json") and ".index." in path.name:
        return _open_shards(path, names_in(path.parent))
    if not path.is_dir():
        return TensorSource([open_file(path)])
    names = names_in(path)
    found = [name for name in WEIGHTS if name in names]
    if not found:
        raise no_weights(str(path), names)
    # An index may have come without its shards, beside a variant that is whole.
    weights = next((name for name in found if not _is_empty_index(path / name, names)), found[0])
    return open_source(path / weights)


def read_index(path: Path) -> dict[str, str]:
    """Reads an index of shards.

    Args:
        path: Such as `model.safetensors.index.json`.

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
            f"{path}: expected plain names of weight files, found {_listed(sorted(wrong))}."
            " Get the checkpoint from a place that you trust."
        )
    return weight_map


def _is_empty_index(path: Path, names: Collection[str]) -> bool:
    """Whether this is an index of shards none of which is there."""
    return ".index." in path.name and not set(read_index(path).values()) & set(names)


def _open_shards(index: Path, names: Collection[str]) -> TensorSource:
    """Opens the shards of an index, in a folder with files of these names.

    All that the shards hold counts, as in transformers: an index may list tensors that were not written because they
    are tied to others, or that later versions do without. What an encoder lacks, its own comparison tells.
    """
    shards = sorted(set(read_index(index).values()))
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise CheckpointError(
            f"{index}: expected {len(shards)} shards beside it, found that {len(missing)} are missing:"
            f" {', '.join(missing)}. Download or copy these as well."
        )
    parts = [open_file(index.parent / shard) for shard in shards]
    holders: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        for name in part.tensors:
            holders[name].append(part.path.name)
    twice = [f"{name!r} in {' and '.join(held)}" for name, held in holders.items() if len(held) > 1]
    if twice:
        raise CheckpointError(
            f"{index}: expected every tensor in one shard, found {_listed(twice)}. Get the index and all shards "
            f"again, from one place."
        )
    return TensorSource(parts)


def _listed(items: Sequence[str]) -> str:
    """Items for a message, of which there may be very many."""
    more = len(items) - _MAX_LISTED
    return ", ".join(items[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """The hash of a file, in constant memory.

    Args:
        path: The file.
        progress: Called with the number of bytes hashed since its last call.

    Returns:
        Hexadecimal digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()
