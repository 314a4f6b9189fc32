"""Values in other types, and T5 in 8-bit floats with scales."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import ml_dtypes
import numpy as np

from tests.formats.model import State

FLOAT8 = ml_dtypes.float8_e4m3fn


def cast(state: State, dtype: Any) -> State:
    return {name: array.astype(dtype) for name, array in state.items()}


def widened(state: State) -> State:
    return cast(state, np.float32)


def is_linear(name: str) -> bool:
    """Whether a weight of T5 is that of a Linear, which is what is quantised."""
    return name.endswith(".weight") and (
        ".DenseReluDense." in name or (".SelfAttention." in name and "_bias" not in name)
    )


@dataclasses.dataclass(frozen=True)
class Scaled:
    """T5 with 8-bit float Linears and everything else in float16.

    Attributes:
        weights: 8-bit and 16-bit tensors.
        scales: Name of a layer -> float32 scale: one, or one for each row.
        values: What they stand for.
    """

    weights: State
    scales: State
    values: State


def scaled(state: State, *, by_row: bool = False) -> Scaled:
    weights, scales, values = {}, {}, {}
    for name, array in state.items():
        if not is_linear(name):
            weights[name] = array.astype(np.float16)
            values[name] = weights[name].astype(np.float32)
            continue
        largest = np.abs(array).max(axis=1, keepdims=True) if by_row else np.abs(array).max()
        scale = (largest / 448).astype(np.float32)
        weights[name] = (array / scale).astype(FLOAT8)
        scales[name.removesuffix(".weight")] = np.asarray(scale)
        values[name] = weights[name].astype(np.float32) * scale
    return Scaled(weights, scales, values)


def comfy_2024(state: Scaled) -> State:
    """ComfyUI's first convention, as in t5xxl_fp8_e4m3fn_scaled."""
    scales = {f"{layer}.scale_weight": scale for layer, scale in state.scales.items()}
    inputs = {f"{layer}.scale_input": np.float32(1).reshape(()) for layer in state.scales}
    return {**state.weights, **scales, **inputs, "scaled_fp8": np.zeros(0, FLOAT8)}


def comfy_2025(state: Scaled, *, in_header: bool = False) -> State:
    """ComfyUI's second convention; what each layer is stands in it as JSON, or in the header (`comfy_header`)."""
    said = np.frombuffer(json.dumps({"format": "float8_e4m3fn"}).encode(), np.uint8)
    scales = {f"{layer}.weight_scale": scale for layer, scale in state.scales.items()}
    formats = {} if in_header else {f"{layer}.comfy_quant": said for layer in state.scales}
    return {**state.weights, **scales, **formats}


def comfy_header(state: Scaled, prefix: str = "") -> dict[str, str]:
    layers = {prefix + layer: {"format": "float8_e4m3fn"} for layer in state.scales}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def is_quantisable(array: np.ndarray) -> bool:
    return array.ndim == 2 and array.shape[-1] % 32 == 0


def q8_0(array: np.ndarray) -> np.ndarray:
    """The values of ggml's Q8_0: blocks of 32 bytes with a float16 scale (ggml `quantize_row_q8_0_ref`)."""
    blocks = array.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), 1 / scale)
    scaled = blocks * inverse
    whole = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))  # halves away from 0
    return (whole * scale.astype(np.float16).astype(np.float32)).reshape(array.shape)
