"""Small whole files of every format, which are then damaged; without torch and without gguf where it goes."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import flax.serialization
import ml_dtypes
import numpy as np
from safetensors.numpy import save

from tests.convert import malicious
from tests.convert.test_gguf_tokenizer import KEYS
from tests.convert.test_readers_gguf import Q8_0, gguf_bytes, text
from tests.formats.torch_zip import write_torch_zip

_STATE = {
    "text_model.embeddings.token_embedding.weight": np.arange(24, dtype=np.float32).reshape(6, 4),
    "text_model.encoder.layers.0.mlp.fc1.weight": np.ones((3, 4), np.float16),
    "text_model.encoder.layers.0.mlp.fc1.bias": np.zeros(3, ml_dtypes.bfloat16),
    "logit_scale": np.array(1.5, np.float32),
}
_T5 = "encoder.block.0.layer.0.SelfAttention"
_SCALED = {
    "scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn),
    "shared.weight": np.ones((4, 2), np.float16),
    f"{_T5}.q.weight": np.ones((2, 2), ml_dtypes.float8_e4m3fn),
    f"{_T5}.q.scale_weight": np.array(0.5, np.float32),
    f"{_T5}.k.weight": np.ones((2, 2), ml_dtypes.float8_e4m3fn),
    f"{_T5}.k.weight_scale": np.ones(2, np.float32),
    f"{_T5}.k.comfy_quant": np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8),
}
_OPEN_CLIP = {
    "token_embedding.weight": np.ones((4, 2), np.float32),
    "positional_embedding": np.ones((3, 2), np.float32),
    "transformer.resblocks.0.attn.in_proj_weight": np.ones((6, 2), np.float32),
    "transformer.resblocks.0.attn.in_proj_bias": np.ones(6, np.float32),
    "text_projection": np.ones((2, 3), np.float32),
}


def seeds(folder: Path) -> Mapping[str, list[bytes]]:
    """Name of a reader -> files that it reads."""
    zips = [
        write_torch_zip(folder / "seed", _STATE).read_bytes(),
        write_torch_zip(folder / "seed", {"state_dict": _STATE, "epoch": 3, "names": ["a", (1, None)]}).read_bytes(),
    ]
    tensors = (malicious._tensor(0, (4,), (1,)), malicious._tensor(1, (2, 1), (2, 1)))
    legacy = [malicious.write_legacy(folder / "seed", data).read_bytes() for data in tensors]
    nested = {"text_model": {"kernel": _STATE["logit_scale"], "deep": {"er": {"bias": np.arange(9)}}}, "step": 3}
    return {
        "safetensors": [save(state, {"format": "pt"}) for state in (_STATE, _SCALED, _OPEN_CLIP, {})],
        "torch zip": zips,
        "TorchScript": [_with_constants(folder, zips[0])],
        "torch legacy": legacy,
        "GGUF": [_gguf()],
        "msgpack": [flax.serialization.msgpack_serialize(nested), _chunked()],
    }


def _with_constants(folder: Path, content: bytes) -> bytes:
    """A TorchScript archive: the same with constants, and with inert objects around the tensors."""
    path = folder / "seed"
    path.write_bytes(content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
        archive.writestr("archive/code/__torch__.py", "class Model: pass", zipfile.ZIP_DEFLATED)
    return path.read_bytes()


def _gguf() -> bytes:
    tokens = KEYS["tokens"]
    assert isinstance(tokens, list)
    pairs = [
        ("general.architecture", 8, text("t5encoder")),
        ("general.alignment", 4, struct.pack("<I", 32)),
        ("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, len(tokens)) + b"".join(map(text, tokens))),
        ("tokenizer.ggml.scores", 9, struct.pack("<IQ", 6, len(tokens)) + bytes(4 * len(tokens))),
        ("comfy.gguf.orig_shape.b", 9, struct.pack("<IQ2i", 5, 2, 2, 32)),
    ]
    tensors = [
        ("enc.blk.0.attn_q.weight", (32, 2), Q8_0, 0, bytes(range(68))),
        ("a", (4, 2), 0, 96, np.arange(8, dtype=np.float32).tobytes()),
        ("b", (64,), 30, 128, bytes(128)),
    ]
    return gguf_bytes(tensors, pairs)


def _chunked() -> bytes:
    """What flax makes of an array that is too large for one piece; its own limit is a gigabyte."""
    limit = flax.serialization.MAX_CHUNK_SIZE
    flax.serialization.MAX_CHUNK_SIZE = 64
    try:
        return flax.serialization.msgpack_serialize({"params": {"wide": np.arange(48, dtype=np.float32).reshape(6, 8)}})
    finally:
        flax.serialization.MAX_CHUNK_SIZE = limit
