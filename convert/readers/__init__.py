"""Readers of weight files, one a format; `open_file` tells the format by the file's first bytes, not by its name."""

from __future__ import annotations

from pathlib import Path

from clip_jax.convert.readers.safetensors import MAX_HEADER_BYTES, SafetensorsFile
from clip_jax.convert.readers.tensor_file import TensorFile, map_file
from clip_jax.errors import CheckpointError

__all__ = ["TensorFile", "open_file"]

READABLE = "safetensors, PyTorch pickles (.bin, .ckpt, .pt), TorchScript archives, GGUF and Flax msgpack"

# First bytes of what is no file of weights that can be read -> what it is, and what to do about it.
_REFUSED: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer to the real file", "Run `git lfs pull` beside it."),
    (b"\x89HDF", "HDF5, most likely TensorFlow's weights", "Take the safetensors or PyTorch file of the same model."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    (b"<", "an HTML or XML page, most likely a failed download", "Download it again."),
    (b"{", "a JSON file", "An index of shards is called *.safetensors.index.json or *.bin.index.json: rename it."),
)


def open_file(path: Path) -> TensorFile:
    """Opens a file of weights of any format, without reading its tensors.

    Args:
        path: The file; its name does not matter.

    Raises:
        CheckpointError: Of no format that can be read, or damaged, cut short, or, for a pickle, asking for more
            than tensors.
    """
    start = map_file(path)[:512].tobytes()
    if start.startswith(b"GGUF"):
        from clip_jax.convert.readers.gguf import GgufFile

        return GgufFile(path)
    if start.startswith(b"PK\x03\x04"):
        from clip_jax.convert.readers.torch_zip import TorchZipFile

        return TorchZipFile(path)
    if _is_safetensors(start):
        return SafetensorsFile(path)
    for magic, kind, advice in _REFUSED:
        if start.startswith(magic):
            raise CheckpointError(f"{path}: expected a file of weights, found {kind}. {advice}")
    if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        from clip_jax.convert.readers.torch_legacy import TorchLegacyFile

        return TorchLegacyFile(path)
    if start[0] in (*range(0x81, 0x90), 0xDE, 0xDF):
        from clip_jax.convert.readers.msgpack import MsgpackFile

        return MsgpackFile(path)
    raise CheckpointError(
        f"{path}: expected a file of weights ({READABLE}), found {len(start)} bytes or more that begin with"
        f" {start[:8]!r}. Check that it is the file that you mean, or get it again."
    )


def _is_safetensors(start: bytes) -> bool:
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES
