"""The text encoders of a family as a Flax NNX module, for pipelines that are written in NNX."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from clip_jax.embed import embed
from clip_jax.encoder import TextEncoder as LinenTextEncoder
from clip_jax.structs import TextEmbeddings, Tokens


class TextEncoder(nnx.Module):
    """Holds the params of a `clip_jax.TextEncoder`, the same arrays, each as an `nnx.Param`.

    A pytree: it goes through `jax.jit`, `nnx.split` and `nnx.grad` as it is. Prompts are tokenised on the host, by
    the encoder that it is made from.

    Example:
        >>> encoder = clip_jax.load("random:sd15")
        >>> module = clip_jax.nnx.TextEncoder(encoder)
        >>> encode = jax.jit(lambda module, tokens: module(tokens).prompt_embeds)
        >>> encode(module, encoder.tokenize("a cat")).shape
        (2, 77, 768)
        >>> graphdef, state = nnx.split(module)

    Attributes:
        family: What the embeddings are made for; static.
        dtype: Of the computation and of the embeddings; static.
        attention: "xla" or "cudnn", as `clip_jax.text_embeddings` takes it; static.
        params: Nested dict with one entry per tower, of `nnx.Param`s.
    """

    def __init__(self, encoder: LinenTextEncoder) -> None:
        self.family = encoder.family
        self.dtype = encoder.dtype
        self.attention = encoder.attention
        self.params: dict[str, Any] = nnx.data(jax.tree.map(nnx.Param, encoder.params))

    def plain_params(self) -> dict[str, Any]:
        """The arrays in a plain nested dict, as `text_embeddings` and `TextEncoder.params` have them."""
        return jax.tree.map(lambda param: param[...], self.params, is_leaf=lambda node: isinstance(node, nnx.Param))

    def __call__(
        self, tokens: Tokens, *, clip_skip: int | None = None, clip_skip_negative: int | None = None
    ) -> TextEmbeddings:
        """Encodes token ids; arguments, result and errors as in `clip_jax.text_embeddings`."""
        skips = (clip_skip_negative, clip_skip)
        return embed(self.plain_params(), tokens, self.family, self.dtype, skips, self.attention)
