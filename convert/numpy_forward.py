"""CLIP's text transformer and T5's encoder once more, in float64 NumPy: what a converted checkpoint is held against.

Nothing here is shared with `clip_jax.models`, nor with our tables of names: weights are read by the names of the
source, those of transformers or OpenCLIP's own. One matrix at a time is in float64, so that T5 XXL needs no more
than 400 MB beside the file that it is read from.

Reference: transformers `modeling_clip.py` (`CLIPEncoderLayer`, `CLIPTextTransformer`) and `modeling_t5.py`
(`T5Block`, `T5Stack`), open_clip `transformer.py` (`ResidualAttentionBlock`, `TextTransformer`). The papers are
Radford et al. 2021 (arXiv 2103.00020, section 2.4), Raffel et al. 2020 (arXiv 1910.10683, section 2.1), and Shazeer
2020 (arXiv 2002.05202) for T5's gated feed-forward layer.

Letters: B batch, L tokens, D width, N heads, H head size, P pooled width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clip_jax.config import ClipTextConfig, T5EncoderConfig

#: The name of a tensor -> the tensor, of any dtype, in the layout of torch ([out, in]).
Read = Callable[[str], np.ndarray]


class ClipOutputs(NamedTuple):
    """What the text transformer yields, in float64.

    Attributes:
        hidden_states: One more than there are blocks, [B, L, D] each; all before the final norm.
        last_hidden_state: [B, L, D], the last of them after the final norm.
        pooled: [B, D], its row at the first end-of-text token.
        text_embeds: [B, P]; None without `text_projection`.
    """

    hidden_states: list[np.ndarray]
    last_hidden_state: np.ndarray
    pooled: np.ndarray
    text_embeds: np.ndarray | None


def clip_forward(read: Read, config: ClipTextConfig, ids: np.ndarray) -> ClipOutputs:
    """CLIP's text transformer by transformers' names, `text_model.*` and `text_projection.weight` [P, D].

    Args:
        read: The weights.
        config: The architecture.
        ids: [B, L] int.
    """

    def block(x: np.ndarray, i: int) -> np.ndarray:
        layer = f"text_model.encoder.layers.{i}"
        y = _layer_norm(read, f"{layer}.layer_norm1", x, config)
        q, k, v = (_linear(read, f"{layer}.self_attn.{part}_proj.", y) for part in "qkv")
        x = x + _linear(read, f"{layer}.self_attn.out_proj.", _causal_attention(q, k, v, config))
        y = _linear(read, f"{layer}.mlp.fc1.", _layer_norm(read, f"{layer}.layer_norm2", x, config))
        return x + _linear(read, f"{layer}.mlp.fc2.", _activation(y, config.hidden_act))

    tokens = _float64(read("text_model.embeddings.token_embedding.weight")[ids])
    positions = _float64(read("text_model.embeddings.position_embedding.weight")[: ids.shape[1]])
    hidden = _stack(tokens + positions, block, config.num_hidden_layers)
    last = _layer_norm(read, "text_model.final_layer_norm", hidden[-1], config)
    pooled = _first_row(last, ids, config.eos_token_id)
    embeds = None if config.projection_dim is None else pooled @ _float64(read("text_projection.weight")).T
    return ClipOutputs(hidden, last, pooled, embeds)


def open_clip_forward(read: Read, config: ClipTextConfig, ids: np.ndarray) -> ClipOutputs:
    """The same by OpenCLIP's names, `transformer.resblocks.*` and a bare `text_projection` [D, P].

    `in_proj` has the rows of q, then k, then v. open_clip pools at the highest id of a row, which is the first
    end-of-text token unless ids were added to the vocabulary.
    """

    def block(x: np.ndarray, i: int) -> np.ndarray:
        layer = f"transformer.resblocks.{i}"
        qkv = _linear(read, f"{layer}.attn.in_proj_", _layer_norm(read, f"{layer}.ln_1", x, config))
        q, k, v = np.split(qkv, 3, axis=-1)
        x = x + _linear(read, f"{layer}.attn.out_proj.", _causal_attention(q, k, v, config))
        y = _linear(read, f"{layer}.mlp.c_fc.", _layer_norm(read, f"{layer}.ln_2", x, config))
        return x + _linear(read, f"{layer}.mlp.c_proj.", _activation(y, config.hidden_act))

    tokens = _float64(read("token_embedding.weight")[ids])
    positions = _float64(read("positional_embedding")[: ids.shape[1]])
    hidden = _stack(tokens + positions, block, config.num_hidden_layers)
    last = _layer_norm(read, "ln_final", hidden[-1], config)
    pooled = _first_row(last, ids, config.eos_token_id)
    embeds = None if config.projection_dim is None else pooled @ _float64(read("text_projection"))
    return ClipOutputs(hidden, last, pooled, embeds)


def t5_forward(read: Read, config: T5EncoderConfig, ids: np.ndarray) -> np.ndarray:
    """T5's encoder by transformers' names, every token attending to every other.

    Args:
        read: The weights, of which the token embedding is `shared.weight`.
        config: The architecture.
        ids: [B, L] int.

    Returns:
        [B, L, D] float64, after the final norm.
    """

    def matrix(x: np.ndarray, name: str) -> np.ndarray:
        return x @ _float64(read(f"{name}.weight")).T

    def block(x: np.ndarray, i: int) -> np.ndarray:
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        y = _rms_norm(read, f"{attention}.layer_norm", x, config)
        q, k, v = (_heads(matrix(y, f"{attention}.SelfAttention.{part}"), config.num_heads) for part in "qkv")
        weights = _softmax(q @ k.swapaxes(-1, -2) + bias)  # T5 does not divide by the square root of H
        x = x + matrix(_without_heads(weights @ v), f"{attention}.SelfAttention.o")
        y = _rms_norm(read, f"{mlp}.layer_norm", x, config)
        gate = _activation(matrix(y, f"{mlp}.DenseReluDense.wi_0"), "gelu_new")
        return x + matrix(gate * matrix(y, f"{mlp}.DenseReluDense.wi_1"), f"{mlp}.DenseReluDense.wo")

    table = _float64(read("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"))
    bias = table[_buckets(ids.shape[1], config)].transpose(2, 0, 1)  # [N, L, L]; of all blocks
    hidden = _stack(_float64(read("shared.weight")[ids]), block, config.num_layers)
    return _rms_norm(read, "encoder.final_layer_norm", hidden[-1], config)


def _stack(x: np.ndarray, block: Callable[[np.ndarray, int], np.ndarray], blocks: int) -> list[np.ndarray]:
    """The input and the output of every block."""
    hidden = [x]
    for i in range(blocks):
        hidden.append(block(hidden[-1], i))
    return hidden


def _float64(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _linear(read: Read, name: str, x: np.ndarray) -> np.ndarray:
    return x @ _float64(read(f"{name}weight")).T + _float64(read(f"{name}bias"))


def _layer_norm(read: Read, name: str, x: np.ndarray, config: ClipTextConfig) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + config.layer_norm_eps)
    return normal * _float64(read(f"{name}.weight")) + _float64(read(f"{name}.bias"))


def _rms_norm(read: Read, name: str, x: np.ndarray, config: T5EncoderConfig) -> np.ndarray:
    normal = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.layer_norm_epsilon)
    return normal * _float64(read(f"{name}.weight"))


def _causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, config: ClipTextConfig) -> np.ndarray:
    """Attention of each token to itself and those before it: three of [B, L, D] -> [B, L, D]."""
    q, k, v = (_heads(x, config.num_attention_heads) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    before = np.tri(scores.shape[-1], dtype=bool)
    return _without_heads(_softmax(np.where(before, scores, -np.inf)) @ v)


def _heads(x: np.ndarray, heads: int) -> np.ndarray:
    """[B, L, N H] -> [B, N, L, H]."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _without_heads(x: np.ndarray) -> np.ndarray:
    """[B, N, L, H] -> [B, L, N H]."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1)


def _softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _activation(x: np.ndarray, name: str) -> np.ndarray:
    """The activation that transformers calls `name` (`activations.py`): each is x times a soft step from 0 to 1."""
    if name == "quick_gelu":
        step = np.tanh(0.851 * x)  # the logistic function of 1.702 x
    elif name == "gelu":
        step = np.vectorize(math.erf)(x / math.sqrt(2))
    else:
        step = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return x * (1 + step) / 2


def _first_row(x: np.ndarray, ids: np.ndarray, token: int) -> np.ndarray:
    """The row [B, D] of [B, L, D] at the first `token`; at 0 without one, as in transformers; 2 is the highest id."""
    return x[np.arange(len(ids)), (ids if token == 2 else ids == token).argmax(axis=-1)]


def _buckets(length: int, config: T5EncoderConfig) -> np.ndarray:
    """The bucket [L, L] of every distance from a query (row) to a key (column); `_relative_position_bucket`.

    In whole numbers: the reference takes logarithms in float32, whose rounding could go either way at the edges.
    """
    half = config.relative_attention_num_buckets // 2  # for keys after the query; the others are for those up to it
    exact = half // 2  # distances that have a bucket each; beyond, buckets grow geometrically up to `farthest`
    farthest = config.relative_attention_max_distance
    wide = half - exact

    def bucket(distance: int) -> int:
        if distance < exact:
            return distance
        return exact + sum(distance**wide >= exact ** (wide - i) * farthest**i for i in range(1, wide))

    buckets = np.array([bucket(distance) for distance in range(length)])
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    return buckets[np.abs(distance)] + np.where(distance > 0, half, 0)
