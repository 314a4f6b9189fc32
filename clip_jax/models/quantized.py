"""Layers whose parameters may be quantised: a `qwix.QArray` in the place of a kernel or an embedding.

What is computed follows from the leaf: an int8 kernel is multiplied in int8 with activations that are quantised on the
way, one scale for each token, and one zero point too behind the activation function; a float8 kernel likewise on GPUs
that can; any other only saves memory, and is dequantised before the product. Arrays go the way of Flax' own layers,
whose names and parameters these have. Without quantised params qwix is not imported.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of the params is a `qwix.QArray`, told without importing qwix."""
    return hasattr(leaf, "qvalue")


def _dequantized(leaf: Any) -> jax.Array:
    """The array that a `qwix.QArray` stands for, float32."""
    import qwix

    array: jax.Array = qwix.dequantize(leaf.astype(jnp.float32))
    return array


def _promoted(x: jax.Array, kernel: Any, bias: jax.Array | None, **options: Any) -> tuple[Any, ...]:
    """As in Flax, but a quantised kernel keeps its dtypes."""
    if not is_quantized(kernel):
        return tuple(promote_dtype(x, kernel, bias, **options))
    x, bias = promote_dtype(x, bias, **options)
    return x, kernel, bias


def _product(x: jax.Array, kernel: Any, dimensions: jax.lax.DotDimensionNumbers, **options: Any) -> jax.Array:
    """The product over the last axis of x [..., D] and the first of `kernel`, in the dtype of x."""
    if not is_quantized(kernel):
        return jax.lax.dot_general(x, kernel, dimensions, **options)
    quantized = functools.partial(_quantized_product, dimensions=dimensions)
    dequantized = functools.partial(_dequantized_product, dimensions=dimensions, options=options)
    if kernel.qvalue.dtype == jnp.int8:
        return quantized(x, kernel)
    if kernel.qvalue.dtype == jnp.float8_e4m3fn:
        product: jax.Array = jax.lax.platform_dependent(x, kernel, cuda=quantized, default=dequantized)
        return product
    return dequantized(x, kernel)


def _straight_through(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`product(x, kernel, dimensions)` with the derivative by x of that with the dequantised kernel.

    Rounding has a derivative of zero, so that without this nothing but the scales would pass on what comes back
    (the straight-through estimator of Bengio et al., arXiv:1308.3432).
    """
    rounded: Any = jax.custom_jvp(product, nondiff_argnums=(2,))

    @rounded.defjvp
    def _(dimensions: jax.lax.DotDimensionNumbers, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        x_dot = tangents[0]
        kernel = _dequantized(primals[1]).astype(x_dot.dtype)
        return rounded(*primals, dimensions), jax.lax.dot_general(x_dot, kernel, dimensions)

    wrapped: Callable[..., jax.Array] = rounded
    return wrapped


@_straight_through
def _quantized_product(x: jax.Array, kernel: Any, dimensions: jax.lax.DotDimensionNumbers) -> jax.Array:
    """In the dtype of the kernel, to which the tokens are quantised."""
    import qwix

    # In float32, whatever the dtype: rounding comes down to the kernel's, and sums are scaled before they are cast.
    tokens = qwix.quantize(x.astype(jnp.float32), kernel.qvalue.dtype, channelwise_axes=range(x.ndim - 1))
    product: jax.Array = qwix.dot_general(tokens, kernel, dimensions)
    return product.astype(x.dtype)


def _dequantized_product(
    x: jax.Array, kernel: Any, *, dimensions: jax.lax.DotDimensionNumbers, options: Mapping[str, Any]
) -> jax.Array:
    """In the dtype of x, to which the kernel is dequantised."""
    # Not before x is there: XLA would dequantise every layer at the start, and hold them all.
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    return jax.lax.dot_general(x, _dequantized(kernel).astype(x.dtype), dimensions, **options)


def _product_of_activation(
    x: jax.Array, kernel: Any, dimensions: jax.lax.DotDimensionNumbers, **options: Any
) -> jax.Array:
    """`_product` for x [..., L, D] whose values are hardly ever below zero, where int8 has half of its own."""
    if is_quantized(kernel) and kernel.qvalue.dtype == jnp.int8:
        return _one_sided_product(x, kernel, dimensions)
    return _product(x, kernel, dimensions, **options)


@_straight_through
def _one_sided_product(x: jax.Array, kernel: Any, dimensions: jax.lax.DotDimensionNumbers) -> jax.Array:
    """As `_quantized_product`, and each token has a zero point beside its scale.

    What that adds to the product is itself times the sums of the kernel's columns; they come from a row of ones below
    the tokens.
    """
    import qwix

    tokens = qwix.quantize(
        x.astype(jnp.float32), jnp.int8, channelwise_axes=range(x.ndim - 1), calibration_method="minmax"
    )
    rows = dataclasses.replace(
        tokens, qvalue=_above_ones(tokens.qvalue), scale=_above_ones(tokens.scale), zero_point=None
    )
    product: jax.Array = qwix.dot_general(rows, kernel, dimensions)
    shift = tokens.zero_point * tokens.scale
    return (product[..., :-1, :] - shift * product[..., -1:, :]).astype(x.dtype)


def _above_ones(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, jnp.ones_like(x[..., :1, :])], axis=-2)


class Dense(nn.Dense):
    """`nn.Dense`: [..., D] -> [..., features], with a kernel that may be quantised."""

    promote_dtype: Callable[..., Any] = _promoted
    dot_general: Callable[..., Any] | None = _product


class DenseOfActivation(Dense):
    """The same for what an activation like gelu returns: [..., L, D] -> [..., L, features]."""

    dot_general: Callable[..., Any] | None = _product_of_activation


class Embed(nn.Embed):
    """`nn.Embed`: int [...] -> [..., features]; of a quantised table only the rows taken are dequantised."""

    def __call__(self, ids: jax.Array) -> jax.Array:
        # Not by way of `super()`, for then an interceptor (a LoRA) would see two calls.
        rows = jax.tree.map(lambda part: jnp.take(part, ids, axis=0), self.embedding)
        rows = _dequantized(rows) if is_quantized(rows) else rows
        return rows if self.dtype is None else rows.astype(self.dtype)
