"""The T5 v1.1 encoder in Flax Linen.

Reference: transformers `modeling_t5.py` (`T5EncoderModel`). The parameter tree is exactly that of the removed
`FlaxT5EncoderModel` (encoder/block/"0"/layer/"0"/SelfAttention/q/kernel), for the reasons given in
`clip_text`; hence one small module per level of that tree.

In float16, as in transformers, `wo` is applied in float32, for T5 v1.1 overflows there; the residual stream
is float32 from the first `wo` on, and the sum before it is clamped.

Differences from the reference: scores, softmax and activation are computed in float32 whatever the dtype; in
float16 so is the product of gate and value, and what attention adds is clamped in every block.

Letters: B batch, L tokens, D width, N heads, H head size, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from clip_jax.models import functional
from clip_jax.models.axes import with_axes
from clip_jax.models.functional import Attention
from clip_jax.models.quantized import Dense, Embed
from clip_jax.models.repeated import repeated
from clip_jax.t5_config import T5EncoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class T5Output:
    """Every output of the encoder; under `jax.jit`, those not used cost nothing.

    Attributes:
        hidden_states: One more than there are layers, each [B, L, D]: the embeddings, then the output of
            every block but the last, all before the final norm; then `last_hidden_state`, as in transformers.
        last_hidden_state: [B, L, D], the output of the last block after the final norm.
        attentions: One for every layer, [B, N, L, L]: how much each row (query) attends to each other (key).
    """

    hidden_states: tuple[jax.Array, ...]
    last_hidden_state: jax.Array
    attentions: tuple[jax.Array, ...]


class _Module(nn.Module):
    """What every module is made with: the architecture, dtypes, attention (`T5Encoder` tells which)."""

    config: T5EncoderConfig
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32
    legacy_dtypes: bool = False
    attention: Attention = "xla"

    def dense(self, features: int, name: str, dtype: jax.typing.DTypeLike | None = None, gain: float = 1.0) -> Dense:
        return Dense(
            features,
            use_bias=False,
            dtype=self.dtype if dtype is None else dtype,
            param_dtype=self.param_dtype,
            kernel_init=with_axes(name, nn.initializers.variance_scaling(gain, "fan_in", "normal")),
            name=name,
        )

    def child(self, module: type[_Module], name: str) -> _Module:
        return module(self.config, self.dtype, self.param_dtype, self.legacy_dtypes, self.attention, name=name)


class T5LayerNorm(_Module):
    """RMSNorm: [B, L, D] -> [B, L, D], in `dtype`, or float32 (`legacy_dtypes`)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("weight", nn.initializers.ones, (self.config.d_model,), self.param_dtype)
        dtype = jnp.float32 if self.legacy_dtypes else self.dtype
        return functional.rms_norm(x, weight.astype(dtype), self.config.layer_norm_epsilon)


class _Attended(NamedTuple):
    """What comes out of attention: rows [B, L, D], the position bias that the next block takes, and its weights."""

    x: jax.Array
    bias: jax.Array
    weights: jax.Array


class T5Attention(_Module):
    """Multi-head self-attention: [B, L, D] -> [B, L, D]."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> _Attended:
        config = self.config
        heads = (*x.shape[:-1], config.num_heads, config.d_kv)
        inner = config.num_heads * config.d_kv
        q, k, v = (
            self.dense(inner, name, gain=gain)(x).reshape(heads)
            for name, gain in (("q", 1 / config.d_kv), ("k", 1.0), ("v", 1.0))
        )
        if bias is None:  # the first block: it alone has a table of biases
            bias = self.position_bias(x.shape[1])
        x, weights = functional.biased_attention(q, k, v, bias, mask)
        if self.attention == "cudnn" and mask is None:
            x = functional.cudnn_biased_attention(q, k, v, bias)  # that above is not computed then, unless it is used
        return _Attended(self.dense(config.d_model, "o")(x.reshape(*x.shape[:2], inner)), bias, weights)

    def position_bias(self, length: int) -> jax.Array:
        """What each head adds to the score of each query and key: [1, N, L, L], float32."""
        config = self.config
        buckets = functional.relative_position_buckets(
            np.arange(length)[None, :] - np.arange(length)[:, None],
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
        )
        table = nn.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            embedding_init=with_axes("relative_attention_bias", nn.initializers.normal(config.d_model**-0.5)),
            name="relative_attention_bias",
        )
        return table(buckets).transpose(2, 0, 1)[None]


class T5DenseReluDense(_Module):
    """Gated feed-forward layer, named after the one of T5 v1.0: [B, L, D] -> [B, L, F] -> [B, L, D]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = jnp.float32 if jnp.dtype(self.dtype) == jnp.float16 else self.dtype
        gate = self.dense(self.config.d_ff, "wi_0")(x).astype(dtype)
        value = self.dense(self.config.d_ff, "wi_1")(x).astype(dtype)
        return self.dense(self.config.d_model, "wo", dtype)(functional.activation(gate, "gelu_new") * value)


class T5SelfAttentionLayer(_Module):
    """Pre-norm self-attention and its residual."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> _Attended:
        normed = self.child(T5LayerNorm, "layer_norm")(x)
        attended = self.child(T5Attention, "SelfAttention")(normed, mask, bias)
        return attended._replace(x=functional.clamp_float16(x + functional.clamp_float16(attended.x)))


class T5FeedForwardLayer(_Module):
    """Pre-norm feed-forward layer and its residual."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normed = self.child(T5LayerNorm, "layer_norm")(x)
        return x + self.child(T5DenseReluDense, "DenseReluDense")(normed)


class T5Layers(_Module):
    """The two layers of a block, named "0" and "1"."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> _Attended:
        attended = self.child(T5SelfAttentionLayer, "0")(x, mask, bias)
        return attended._replace(x=self.child(T5FeedForwardLayer, "1")(attended.x))


class T5Block(_Module):
    """Holds the layers of a block under the name `layer`."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> _Attended:
        return self.child(T5Layers, "layer")(x, mask, bias)


class T5Blocks(_Module):
    """The blocks, named "0", "1", ...; returns the input and the output of each, and the weights of its attention."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        hidden_states, attentions, bias = [x], [], None
        for i in range(self.config.num_layers):
            x, bias, weights = self.child(repeated(T5Block, self), str(i))(x, mask, bias)
            hidden_states.append(x)
            attentions.append(weights)
        return tuple(hidden_states), tuple(attentions)


class T5Stack(_Module):
    """Blocks and final norm."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> T5Output:
        hidden_states, attentions = self.child(T5Blocks, "block")(x, mask)
        last = self.child(T5LayerNorm, "final_layer_norm")(hidden_states[-1])
        return T5Output((*hidden_states[:-1], last), last, attentions)


class T5Encoder(_Module):
    """T5 v1.1 encoder.

    Example:
        >>> model = T5Encoder(T5EncoderConfig.xxl(), dtype=jnp.bfloat16)
        >>> out = model.apply({"params": params}, input_ids)  # [B, 512]
        >>> out.last_hidden_state.shape
        (1, 512, 4096)

    Attributes:
        config: The architecture.
        dtype: Of the computation and the outputs; with float16, the hidden states of the blocks are float32.
        param_dtype: Of the parameters that `init` makes; `apply` takes them in any dtype.
        legacy_dtypes: Whether norms, and with the last of them `last_hidden_state`, are float32 whatever `dtype`
            is, as in the Flax classes of transformers 4.
        attention: "cudnn" computes attention without an `attention_mask` by cuDNN
            (`functional.cudnn_biased_attention`).
    """

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> T5Output:
        """Runs the encoder.

        Args:
            input_ids: [B, L] int, of any length: positions are relative.
            attention_mask: [B, L], nonzero for tokens to attend to; None means all, pads included, as
                diffusers calls T5 in SD 3 and FLUX.
        """
        embed = Embed(
            self.config.vocab_size,
            self.config.d_model,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=with_axes("shared", nn.initializers.normal(1.0)),
            name="shared",
        )
        return self.child(T5Stack, "encoder")(embed(input_ids), attention_mask)
