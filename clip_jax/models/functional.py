"""The maths of the text encoders as pure functions; the modules only name parameters.

Letters: B batch, L tokens, N heads, H head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from clip_jax.config import LEGACY_EOS
from clip_jax.errors import ClipJaxError

Ids = TypeVar("Ids", jax.Array, np.ndarray)

#: What computes attention: XLA, or cuDNN where there is one.
Attention = Literal["xla", "cudnn"]


def activation(x: jax.Array, name: str) -> jax.Array:
    """Applies the activation that transformers calls `name` (`clip_jax.config.ACTIVATIONS`).

    Computed in float32 and cast back: more exact in bfloat16, and faster on CPUs, which emulate it there.
    """
    x32 = x.astype(jnp.float32)
    match name:
        case "quick_gelu":
            y = x32 * jax.nn.sigmoid(1.702 * x32)
        case "gelu":  # as torch computes it; that of jax, by erfc, is slower
            y = 0.5 * x32 * (1 + jax.lax.erf(x32 * math.sqrt(0.5)))
        case "gelu_new" | "gelu_pytorch_tanh":
            y = jax.nn.gelu(x32, approximate=True)
        case _:
            raise ValueError(f"unknown activation {name!r}")
    return y.astype(x.dtype)


def causal_mask(length: int, attention_mask: jax.Array | None) -> jax.Array:
    """Which key each query may look at: boolean, [1, 1, L, L], or [B, 1, L, L] with an `attention_mask`.

    Args:
        length: L.
        attention_mask: [B, L], nonzero for tokens that may be attended to. It narrows the causal mask and
            never replaces it (transformers `create_causal_mask`).
    """
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if attention_mask is None:
        return causal
    return causal & (attention_mask != 0)[:, None, None, :]


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention over [B, L, N, H], softmax in float32; and its weights, [B, N, L, L].

    Masked scores are the lowest finite value rather than -inf, as in transformers' eager attention: a query
    with nothing to look at gets the mean of all values instead of NaN.
    """
    scores = _scores(query, key) * query.shape[-1] ** -0.5
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return _weighted_sum(scores, value)


def biased_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array, attention_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """T5's attention over [B, L, N, H]: a bias is added to the scores, not scaled; softmax in float32.

    `bias` is [1, N, L, L] in float32. `attention_mask` is [B, L], nonzero for tokens that may be attended to;
    None means all. It masks as in `attention`, and what is returned is as there.
    """
    scores = _scores(query, key) + bias
    if attention_mask is not None:
        keys = (attention_mask != 0)[:, None, None, :]
        scores = jnp.where(keys, scores, jnp.finfo(jnp.float32).min)
    return _weighted_sum(scores, value)


def cudnn_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`attention` of all rows under the causal mask, [B, L, N, H], without the weights; on CUDA one kernel of cuDNN.

    The scores, [B, N, L, L], are not written to memory there. On other platforms it is `attention` itself.

    Raises:
        ClipJaxError: JAX finds no cuDNN, or cuDNN does not take the dtype (it takes bfloat16 and float16) or H.
    """

    def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attention(query, key, value, causal_mask(query.shape[1], None))[0]

    return _on_cuda(functools.partial(_cudnn, is_causal=True), plain, query, key, value)


def cudnn_biased_attention(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
    """`biased_attention` to all tokens, as `cudnn_attention`; cuDNN takes `bias` in the dtype of `query`."""

    def plain(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
        return biased_attention(query, key, value, bias, None)[0]

    def cudnn(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
        return _cudnn(query, key, value, bias=bias.astype(query.dtype), scale=1.0)

    return _on_cuda(cudnn, plain, query, key, value, bias)


def check_attention(attention: str, dtype: jax.typing.DTypeLike) -> None:
    """Refuses what is no `Attention`, and "cudnn" where `cudnn_attention` would be refused.

    Raises:
        ClipJaxError: It is refused.
    """
    if attention not in get_args(Attention):
        raise ClipJaxError(f"attention must be 'xla' or 'cudnn', found {attention!r}.")
    if attention == "cudnn":
        head = jax.ShapeDtypeStruct((1, 1, 1, 64), dtype)
        jax.eval_shape(_cudnn, head, head, head)


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
    try:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn", **options)
    except RuntimeError as error:  # NotImplementedError too: what JAX knows that cuDNN cannot do
        raise ClipJaxError(
            f"attention='cudnn' is for bfloat16 and float16, and for a JAX with CUDA and cuDNN (the extra cuda12 or "
            f"cuda13). Found: {error} Leave it out."
        ) from error


def _on_cuda(cuda: Callable[..., jax.Array], default: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    result: jax.Array = jax.lax.platform_dependent(*arrays, cuda=cuda, default=default)
    return result


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    # Heads go to the front by hand, here and below: XLA for CPUs is slower with where einsum leaves them.
    query, key = query.swapaxes(1, 2), key.swapaxes(1, 2)
    return jnp.einsum("bnqh,bnkh->bnqk", query, key, preferred_element_type=jnp.float32)


def _weighted_sum(scores: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bnqk,bnkh->bnqh", weights, value.swapaxes(1, 2)).swapaxes(1, 2), weights


def relative_position_buckets(relative: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """T5's bucket of each relative position, key less query (transformers `_relative_position_bucket`).

    Half of the buckets are for keys after the query. Of each half, half hold one distance each, and the rest
    ever wider ranges of them up to `max_distance`, whose bucket also takes whatever is farther.

    Args:
        relative: Int array of any shape, on the host: it follows from L alone.
        num_buckets: Of both directions, 4 or more.
        max_distance: More than `num_buckets // 4`.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    log_range = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    # The margin keeps whole numbers, such as that of distance 64, from rounding down on some machine.
    far = exact + np.floor(log_range * (half - exact) + 1e-6).astype(int)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return bucket + np.where(relative > 0, half, 0)


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """Divides by the root mean square over the last axis, in float32, then scales in the dtype of `weight`.

    The dtype of `weight` is that of the result, whatever that of `x` (transformers `T5LayerNorm`).
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return weight.reshape(*[1] * (x.ndim - 1), -1) * normed.astype(weight.dtype)


def clamp_float16(x: jax.Array) -> jax.Array:
    """Keeps float16 finite: if there is an infinity, clips all to 1000 less than the range (`T5Block`).

    Other dtypes are returned as they are.
    """
    if x.dtype != jnp.float16:
        return x
    largest = jnp.finfo(jnp.float16).max
    limit = jnp.where(jnp.isinf(x).any(), largest - 1000, largest)
    return jnp.clip(x, -limit, limit)


def take_row(x: jax.Array, row: jax.Array) -> jax.Array:
    """Row `row[b]` of the last axis but one: [B or 1, ..., L, X] and [B] -> [B, ..., 1, X]."""
    x = jnp.broadcast_to(x, (row.shape[0], *x.shape[1:]))
    return jnp.take_along_axis(x, row.reshape(-1, *[1] * (x.ndim - 1)), axis=-2)


def end_of_text(input_ids: Ids, eos_token_id: int) -> Ids:
    """Index [B] of the first `eos_token_id` in each row of [B, L]; 0 where it is absent, as in transformers.

    2 stands for the highest id of a row (`CLIPTextTransformer.forward`).
    """
    return (input_ids if eos_token_id == LEGACY_EOS else input_ids == eos_token_id).argmax(axis=-1)
