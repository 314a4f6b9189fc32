"""CLIP's text transformer and T5's encoder once more, in float64 NumPy: what a converted checkpoint is held against.

Nothing here is shared with `clip_jax.models`. Weights are read by the names of the source, one matrix at a time:
those of transformers, or OpenCLIP's own, so that an error in our tables of names cannot hide.
Reference: transformers `modeling_clip.py` (`CLIPTextTransformer`), `modeling_t5.py` (`T5Stack`); open_clip
`transformer.py` (`TextTransformer`, `ResidualAttentionBlock`).

Letters: B batch, L tokens, D width, N heads, H head size, P pooled width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clip_jax.config import ClipTextConfig, T5EncoderConfig

#: The name of a tensor -> the tensor, in the layout of torch ([out, in]).
Read = Callable[[str], np.ndarray]


class ClipOutputs(NamedTuple):
    """What the text transformer yields.

    Attributes:
        hidden_states: One more than there are blocks, [B, L, D] each; the last is before the final norm.
        last_hidden_state: [B, L, D], after the final norm.
        pooled: [B, D], its row at the first end-of-text token.
        text_embeds: [B, P]; None without `text_projection`.
    """

    hidden_states: list[np.ndarray]
    last_hidden_state: np.ndarray
    pooled: np.ndarray
    text_embeds: np.ndarray | None


def clip_forward(read: Read, config: ClipTextConfig, ids: np.ndarray) -> ClipOutputs:
    """CLIP's text transformer by transformers' names, `text_model.*` and `text_projection.weight`.

    Args:
        read: The weights.
        config: The architecture.
        ids: [B, L].
    """

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ _f64(read, f"{name}.weight").T + _f64(read, f"{name}.bias")

    def block(i: int, x: np.ndarray) -> np.ndarray:
        layer = f"text_model.encoder.layers.{i}"
        y = _layer_norm(read, f"{layer}.layer_norm1", x, config)
        q, k, v = (linear(f"{layer}.self_attn.{part}_proj", y) for part in "qkv")
        x = x + linear(f"{layer}.self_attn.out_proj", _clip_attention(q, k, v, config))
        y = _layer_norm(read, f"{layer}.layer_norm2", x, config)
        return x + linear(f"{layer}.mlp.fc2", _activation(linear(f"{layer}.mlp.fc1", y), config.hidden_act))

    tokens = read("text_model.embeddings.token_embedding.weight")[ids].astype(np.float64)
    hidden = [tokens + _f64(read, "text_model.embeddings.position_embedding.weight")[: ids.shape[1]]]
    for i in range(config.num_hidden_layers):
        hidden.append(block(i, hidden[-1]))
    last = _layer_norm(read, "text_model.final_layer_norm", hidden[-1], config)
    pooled = _pooled(last, ids, config)
    embeds = None if config.projection_dim is None else pooled @ _f64(read, "text_projection.weight").T
    return ClipOutputs(hidden, last, pooled, embeds)


def open_clip_forward(read: Read, config: ClipTextConfig, ids: np.ndarray) -> ClipOutputs:
    """The same by OpenCLIP's names, `transformer.resblocks.*` and a bare `text_projection` [D, P]."""

    def block(i: int, x: np.ndarray) -> np.ndarray:
        layer = f"transformer.resblocks.{i}"
        y = _layer_norm(read, f"{layer}.ln_1", x, config)
        qkv = y @ _f64(read, f"{layer}.attn.in_proj_weight").T + _f64(read, f"{layer}.attn.in_proj_bias")
        y = _clip_attention(*np.split(qkv, 3, axis=-1), config)
        x = x + y @ _f64(read, f"{layer}.attn.out_proj.weight").T + _f64(read, f"{layer}.attn.out_proj.bias")
        y = _layer_norm(read, f"{layer}.ln_2", x, config)
        y = _activation(
            y @ _f64(read, f"{layer}.mlp.c_fc.weight").T + _f64(read, f"{layer}.mlp.c_fc.bias"), config.hidden_act
        )
        return x + y @ _f64(read, f"{layer}.mlp.c_proj.weight").T + _f64(read, f"{layer}.mlp.c_proj.bias")

    tokens = read("token_embedding.weight")[ids].astype(np.float64)
    hidden = [tokens + _f64(read, "positional_embedding")[: ids.shape[1]]]
    for i in range(config.num_hidden_layers):
        hidden.append(block(i, hidden[-1]))
    last = _layer_norm(read, "ln_final", hidden[-1], config)
    pooled = _pooled(last, ids, config)
    embeds = None if config.projection_dim is None else pooled @ _f64(read, "text_projection")
    return ClipOutputs(hidden, last, pooled, embeds)


def t5_forward(read: Read, config: T5EncoderConfig, ids: np.ndarray) -> np.ndarray:
    """T5's encoder over ids [B, L], all of them attended to, by transformers' names.

    Returns:
        [B, L, D], after the final norm.
    """
    batch, length = ids.shape

    def heads(x: np.ndarray) -> np.ndarray:  # [B, L, N H] -> [B, N, L, H]
        return x.reshape(batch, length, config.num_heads, config.d_kv).swapaxes(1, 2)

    table = _f64(read, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    bias = table[_t5_buckets(length, config)].transpose(2, 0, 1)  # [N, L, L]
    x = read("shared.weight")[ids].astype(np.float64)
    for i in range(config.num_layers):
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        y = _rms_norm(read, f"{attention}.layer_norm", x, config)
        q, k, v = (heads(y @ _f64(read, f"{attention}.SelfAttention.{part}.weight").T) for part in "qkv")
        weights = _softmax(q @ k.swapaxes(-1, -2) + bias)  # not scaled by the size of a head
        y = (weights @ v).swapaxes(1, 2).reshape(batch, length, -1)
        x = x + y @ _f64(read, f"{attention}.SelfAttention.o.weight").T
        y = _rms_norm(read, f"{mlp}.layer_norm", x, config)
        gate = _activation(y @ _f64(read, f"{mlp}.DenseReluDense.wi_0.weight").T, "gelu_new")
        y = gate * (y @ _f64(read, f"{mlp}.DenseReluDense.wi_1.weight").T)
        x = x + y @ _f64(read, f"{mlp}.DenseReluDense.wo.weight").T
    return _rms_norm(read, "encoder.final_layer_norm", x, config)


def _f64(read: Read, name: str) -> np.ndarray:
    return read(name).astype(np.float64)


def _clip_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, config: ClipTextConfig) -> np.ndarray:
    """Causal attention over [B, L, D], every head by itself."""
    batch, length, width = q.shape

    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(batch, length, config.num_attention_heads, -1).swapaxes(1, 2)

    scores = heads(q) @ heads(k).swapaxes(-1, -2) / math.sqrt(width // config.num_attention_heads)
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    return (_softmax(scores) @ heads(v)).swapaxes(1, 2).reshape(batch, length, width)


def _softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _layer_norm(read: Read, name: str, x: np.ndarray, config: ClipTextConfig) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + config.layer_norm_eps)
    return normal * _f64(read, f"{name}.weight") + _f64(read, f"{name}.bias")


def _rms_norm(read: Read, name: str, x: np.ndarray, config: T5EncoderConfig) -> np.ndarray:
    normal = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.layer_norm_epsilon)
    return normal * _f64(read, f"{name}.weight")


def _activation(x: np.ndarray, name: str) -> np.ndarray:
    if name == "quick_gelu":
        return x / (1 + np.exp(-1.702 * x))
    if name == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _pooled(last: np.ndarray, ids: np.ndarray, config: ClipTextConfig) -> np.ndarray:
    ends = (ids == config.eos_token_id).argmax(axis=-1)
    return last[np.arange(len(ids)), ends]


def _t5_buckets(length: int, config: T5EncoderConfig) -> np.ndarray:
    """The bucket [L, L] of every distance, from a query (row) to a key (column), in both directions."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), 1)
    # float32, as in the reference: the rounding decides at the edges of buckets.
    scale = np.log(np.float32(far) / np.float32(exact)) / np.float32(
        math.log(config.relative_attention_max_distance / exact)
    )
    logarithmic = np.minimum(exact + (scale * np.float32(half - exact)).astype(np.int64), half - 1)
    return np.where(distance > 0, half, 0) + np.where(np.abs(distance) < exact, np.abs(distance), logarithmic)
