"""The maths of the text encoders as pure functions; the modules only name parameters.

Letters: B batch, L tokens, N heads, H head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def activation(x: jax.Array, name: str) -> jax.Array:
    """Applies the activation that transformers calls `name` (`clip_jax.config.ACTIVATIONS`).

    Computed in float32 and cast back: more exact in bfloat16, and faster on CPUs, which emulate it there.
    """
    x32 = x.astype(jnp.float32)
    match name:
        case "quick_gelu":
            y = x32 * jax.nn.sigmoid(1.702 * x32)
        case "gelu":  # torch's default is the exact form, jax's the tanh form: always state it
            y = jax.nn.gelu(x32, approximate=False)
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


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled dot-product attention over [B, L, N, H], softmax in float32.

    Masked scores are the lowest finite value rather than -inf, as in transformers' eager attention: a query
    with nothing to look at gets the mean of all values instead of NaN.
    """
    scores = jnp.einsum("bqnh,bknh->bnqk", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bnqk,bknh->bqnh", weights, value)


def first_position(input_ids: jax.Array, token_id: int) -> jax.Array:
    """Index of the first `token_id` in each row of [B, L]; 0 where it is absent, as in transformers."""
    return jnp.argmax(input_ids == token_id, axis=-1)
