"""8-bit float weights: as they are, or with a scale beside them in either of ComfyUI's two conventions.

The first, of 2024: `{layer}.weight` float8 with `{layer}.scale_weight`, and a tensor `scaled_fp8` at the top. The
second, of 2025: `{layer}.weight_scale` with `{layer}.comfy_quant`, a JSON text as bytes, or the same texts in the
header as `_quantization_metadata`. The weight is `float8 * scale` in float32, and there is a scale for the tensor
or one for each row. Scales of activations play no part: activations are not quantised here.
Reference: ComfyUI `comfy/ops.py` (`scaled_fp8_ops`), `comfy/quant_ops.py`, `comfy/utils.py` (`convert_old_quants`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from clip_jax.convert.state import StateDict, Tensor, below
from clip_jax.errors import CheckpointError

_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
_SCALES = (".scale_weight", ".weight_scale")
_BESIDE = re.compile(r"(.*\.)?(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale|comfy_quant)")

# Marks of quantisations that are not read -> what they are.
_REFUSED = (
    (r".*\.(SCB|weight_format)", "bitsandbytes int8"),
    (r".*\.(absmax|quant_map|quant_state\..*)", "bitsandbytes 4 bit"),
    (r".*\.(qweight|qzeros|g_idx)", "GPTQ or AWQ"),
    (r".*\.weight_scale_2", "NVFP4"),
    (r".*\.zero_point", "SDNQ, or another with zero points"),
)


def is_scale(name: str) -> bool:
    """Whether this is the name of a tensor that says how others are quantised."""
    return _BESIDE.fullmatch(name) is not None


def dequantised(state: StateDict, prefix: str, metadata: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The tensors below a prefix without scales: float32 where there was one, bfloat16 (exact) for other 8-bit floats.

    What is elsewhere in the file, such as a diffusion model, may be quantised in any way.

    Args:
        state: Names as in the file.
        prefix: Of the names of a text encoder; they are returned without it.
        metadata: Of the file, where the second convention may keep what is quantised and how.
        where: The source, for messages.

    Raises:
        CheckpointError: Another quantisation, or scales that do not fit their weights.
    """
    state = below(state, prefix)
    for pattern, kind in _REFUSED:
        name = next((name for name in state if re.fullmatch(pattern, name)), None)
        if name:
            raise CheckpointError(
                f"{where} is quantised as {kind} ({name}), which is not read. Take the float16, bfloat16, scaled "
                f"fp8 or GGUF file of the same model."
            )
    _check_formats(state, prefix, metadata, where)
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if is_scale(name):
            continue
        layer = name.removesuffix(".weight")
        scale = next((state[layer + suffix] for suffix in _SCALES if layer + suffix in state), None)
        if scale is not None:
            result[name] = _scaled(tensor, scale, where)
        elif tensor.dtype.name in _FLOAT8:
            result[name] = _widened(tensor)
        else:
            result[name] = tensor
    return result


def _check_formats(state: StateDict, prefix: str, metadata: Mapping[str, Any], where: str) -> None:
    """Refuses layers of the second convention that say that they are something else than 8-bit floats."""
    said = {
        name.removesuffix(".comfy_quant"): bytes(tensor.read().view(np.uint8))
        for name, tensor in state.items()
        if name.endswith(".comfy_quant") and tensor.dtype.itemsize == 1
    }
    try:
        layers = {name: json.loads(text) for name, text in said.items()}
        if "_quantization_metadata" in metadata:
            whole = json.loads(metadata["_quantization_metadata"])["layers"]
            layers |= {name: layer for name, layer in whole.items() if name.startswith(prefix)}
        formats = {name: layer["format"] for name, layer in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: what it says about its quantisation cannot be read ({type(error).__name__}: {error}). Get the "
            f"file again."
        ) from error
    for name, found in formats.items():
        if found not in _FLOAT8:
            raise CheckpointError(
                f"{where}: {name} is quantised as {found!r}, which is not read; expected one of {', '.join(_FLOAT8)}. "
                f"Take the float16, bfloat16, scaled fp8 or GGUF file of the same model."
            )


def _scaled(tensor: Tensor, scale: Tensor, where: str) -> Tensor:
    rows = tensor.shape[:1]
    shapes = ((), (1,), (1, 1), rows, (*rows, 1))
    fits = scale.shape in shapes and scale.dtype.name in ("float32", "bfloat16", "float16")
    if tensor.dtype.name not in _FLOAT8 or len(tensor.shape) != 2 or not fits:
        raise CheckpointError(
            f"{where}: {tensor.key} is {tensor.stored or tensor.dtype} of shape {tensor.shape} with a scale "
            f"{scale.stored or scale.dtype} of shape {scale.shape}; expected a matrix of 8-bit floats and one scale, "
            f"or one a row. It cannot be read."
        )

    def read() -> np.ndarray:
        factor = scale.read().astype(np.float32)
        return _table(tensor.dtype, np.dtype(np.float32))[tensor.read().view(np.uint8)] * (
            factor.reshape(-1, 1) if factor.size > 1 else factor.reshape(())
        )

    return dataclasses.replace(tensor, dtype=np.dtype(np.float32), read=read, stored=f"{tensor.dtype.name} with scale")


def _widened(tensor: Tensor) -> Tensor:
    dtype = np.dtype(ml_dtypes.bfloat16)  # has more bits of both kinds than either 8-bit float
    return dataclasses.replace(
        tensor,
        dtype=dtype,
        read=lambda: _table(tensor.dtype, dtype)[tensor.read().view(np.uint8)],
        stored=tensor.dtype.name,
    )


def _table(dtype: np.dtype, to: np.dtype) -> np.ndarray:
    """All 256 values of an 8-bit float: several times as fast as a cast."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(to)
