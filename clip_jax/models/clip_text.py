"""The CLIP text transformer in Flax Linen.

Reference: transformers `modeling_clip.py` (`CLIPTextModel`, `CLIPTextModelWithProjection`). The parameter
tree is exactly that of the removed `FlaxCLIPTextModel` (text_model/encoder/layers/"0"/mlp/fc1/kernel): a
documented contract, on which checkpoints, LoRA interceptors and sharding rules of JAX pipelines
rely. It is why there is one small module per level of that tree.

Differences from the reference: softmax, LayerNorm and activation are computed in float32 whatever the dtype.
The pooled row is that of the first end-of-text token; transformers takes the highest id of the row where the
config says `eos_token_id: 2`, which is another row once textual inversion has added ids to CLIP's vocabulary. It is
computed apart from the other rows of the last block, so that a pipeline which wants no more of it pays for no more.

Letters: B batch, L tokens, D width, N heads, H head size, F mlp width, V vocabulary, P pooled width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing

from clip_jax.config import ClipTextConfig
from clip_jax.errors import ClipJaxError
from clip_jax.models import functional
from clip_jax.models.axes import bias_init, with_axes
from clip_jax.models.functional import Attention
from clip_jax.models.quantized import Dense, DenseOfActivation, Embed
from clip_jax.models.repeated import repeated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClipTextOutput:
    """Every output of the text transformer; under `jax.jit`, those not used cost nothing.

    Attributes:
        hidden_states: One more than there are layers, each [B, L, D]: the embeddings, then the output of
            every block; all before the final LayerNorm.
        last_hidden_state: [B, L, D], `hidden_states[-1]` after the final LayerNorm.
        pooler_output: [B, D], the row of `last_hidden_state` at the first end-of-text token.
        text_embeds: [B, P], `pooler_output` projected, not normalised; None without `text_projection`.
        attentions: One for every layer, [B, N, L, L]: how much each row (query) attends to each other (key).
    """

    hidden_states: tuple[jax.Array, ...]
    last_hidden_state: jax.Array
    pooler_output: jax.Array
    text_embeds: jax.Array | None
    attentions: tuple[jax.Array, ...]


class _Module(nn.Module):
    """What every module is made with: the architecture, dtypes, attention (`ClipTextModel` tells which)."""

    config: ClipTextConfig
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32
    legacy_dtypes: bool = False
    attention: Attention = "xla"

    def dense(self, features: int, name: str, use_bias: bool = True, layer: type[Dense] = Dense) -> Dense:
        return layer(
            features,
            use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=with_axes(name, nn.initializers.normal(0.02)),
            bias_init=bias_init(name),
            name=name,
        )

    def layer_norm(self, name: str | None) -> nn.LayerNorm:
        # The fast variance E[x^2] - E[x]^2 cancels in float32 where |mean| >> std, as in CLIP's streams.
        return nn.LayerNorm(
            self.config.layer_norm_eps,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            use_fast_variance=False,
            name=name,
        )

    def embed(self, rows: int, name: str) -> Embed:
        return Embed(
            rows,
            self.config.hidden_size,
            dtype=None if self.legacy_dtypes else self.dtype,  # None is that of the parameter
            param_dtype=self.param_dtype,
            embedding_init=with_axes(name, nn.initializers.normal(0.02)),
            name=name,
        )

    def child(self, module: type[_Module], name: str) -> _Module:
        return module(*self.made_with(), name=name)

    def made_with(self) -> tuple[Any, ...]:
        return self.config, self.dtype, self.param_dtype, self.legacy_dtypes, self.attention


class ClipTextEmbeddings(_Module):
    """Token plus position embeddings: [B, L] -> [B, L, D]."""

    @nn.compact
    def __call__(self, input_ids: jax.Array, position_ids: jax.Array) -> jax.Array:
        tokens = self.embed(self.config.vocab_size, "token_embedding")(input_ids)
        positions = self.embed(self.config.max_position_embeddings, "position_embedding")(position_ids)
        return tokens + positions


class ClipAttention(_Module):
    """Multi-head attention of some rows [B, Q, D] to all rows [B, L, D]: -> [B, Q, D], weights [B, N, Q, L].

    Causal; the rows are all, or the one at `row` [B].
    """

    @nn.compact
    def __call__(
        self, rows: jax.Array, x: jax.Array, attention_mask: jax.Array | None, row: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        q, k, v = (
            self.dense(self.config.hidden_size, name)(y).reshape(*y.shape[:-1], self.config.num_attention_heads, -1)
            for name, y in (("q_proj", rows), ("k_proj", x), ("v_proj", x))
        )
        mask = functional.causal_mask(x.shape[1], attention_mask)
        attended, weights = functional.attention(q, k, v, mask if row is None else functional.take_row(mask, row))
        if self.attention == "cudnn" and attention_mask is None and row is None:
            attended = functional.cudnn_attention(q, k, v)  # those above are not computed then, unless they are used
        return self.dense(self.config.hidden_size, "out_proj")(attended.reshape(rows.shape)), weights


class ClipMlp(_Module):
    """Feed-forward layer: [B, L, D] -> [B, L, F] -> [B, L, D]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dense(self.config.intermediate_size, "fc1")(x)
        x = functional.activation(x, self.config.hidden_act)
        return self.dense(self.config.hidden_size, "fc2", layer=DenseOfActivation)(x)


class ClipEncoderLayer(_Module):
    """One pre-norm transformer block: [B, L, D] -> [B, L, D], or [B, 1, D] for one row; and attention's weights."""

    def setup(self) -> None:
        self.layer_norm1 = self.layer_norm(None)
        self.self_attn = ClipAttention(*self.made_with())
        self.layer_norm2 = self.layer_norm(None)
        self.mlp = ClipMlp(*self.made_with())

    def __call__(
        self, x: jax.Array, attention_mask: jax.Array | None, row: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        normed = self.layer_norm1(x)
        rows = normed
        if row is not None:  # [B]: keys and values of all rows, the rest of the block for this one
            x, rows = (functional.take_row(y, row) for y in (x, normed))
        attended, weights = self.self_attn(rows, normed, attention_mask, row)
        x = x + attended
        return x + self.mlp(self.layer_norm2(x)), weights


class _Blocks(NamedTuple):
    """The input and the output of each block, the weights of its attention, and one row of the last output."""

    hidden_states: tuple[jax.Array, ...]
    attentions: tuple[jax.Array, ...]
    row: jax.Array


class ClipLayers(_Module):
    """The blocks, named "0", "1", ..."""

    @nn.compact
    def __call__(self, x: jax.Array, attention_mask: jax.Array | None, row: jax.Array) -> _Blocks:
        hidden_states, attentions = [x], []
        for i in range(self.config.num_hidden_layers):
            layer = self.child(repeated(ClipEncoderLayer, self), str(i))
            x, weights = layer(x, attention_mask)
            hidden_states.append(x)
            attentions.append(weights)
        return _Blocks(tuple(hidden_states), tuple(attentions), layer(hidden_states[-2], attention_mask, row)[0])


class ClipEncoder(_Module):
    """Holds the blocks under the name `layers`."""

    @nn.compact
    def __call__(self, x: jax.Array, attention_mask: jax.Array | None, row: jax.Array) -> _Blocks:
        return self.child(ClipLayers, "layers")(x, attention_mask, row)


class ClipTextTransformer(_Module):
    """Embeddings, blocks and final LayerNorm, without projection."""

    def setup(self) -> None:
        self.embeddings = ClipTextEmbeddings(*self.made_with())
        self.encoder = ClipEncoder(*self.made_with())
        self.final_layer_norm = self.layer_norm(None)

    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array | None, position_ids: jax.Array | None
    ) -> _Blocks:
        if position_ids is None:
            position_ids = jnp.arange(input_ids.shape[-1])[None]
        end = functional.end_of_text(input_ids, self.config.eos_token_id)
        return self.encoder(self.embeddings(input_ids, position_ids), attention_mask, end)


class ClipTextModel(_Module):
    """CLIP text model, with `text_projection` where `config.projection_dim` is set.

    Example:
        >>> model = ClipTextModel(ClipTextConfig.sd15())
        >>> out = model.apply({"params": params}, input_ids)  # [B, 77]
        >>> out.last_hidden_state.shape
        (1, 77, 768)

    Attributes:
        config: The architecture.
        dtype: Of the computation and the outputs.
        param_dtype: Of the parameters that `init` makes; `apply` takes them in any dtype.
        legacy_dtypes: Whether the residual stream, and with it `hidden_states`, begins in the dtype of the
            embeddings' parameters instead of `dtype`, as in the Flax classes of transformers 4.
        attention: "cudnn" computes attention without an `attention_mask` by cuDNN (`functional.cudnn_attention`).
    """

    def setup(self) -> None:
        self.text_model = ClipTextTransformer(*self.made_with())
        if self.config.projection_dim is not None:
            self.text_projection = self.dense(self.config.projection_dim, "text_projection", use_bias=False)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
    ) -> ClipTextOutput:
        """Runs the text transformer.

        Args:
            input_ids: [B, L] int, L at most `config.max_position_embeddings`.
            attention_mask: [B, L], nonzero for tokens to attend to, on top of the causal mask; None means
                all, as diffusers calls these models.
            position_ids: [B, L] or [1, L] int; 0 .. L-1 by default.

        Raises:
            ClipJaxError: More tokens than positions.
        """
        length, positions = input_ids.shape[-1], self.config.max_position_embeddings
        if length > positions:  # an out-of-range gather would silently repeat the last position
            raise ClipJaxError(f"input_ids has {length} tokens per row, the model has {positions} positions.")
        blocks = self.text_model(input_ids, attention_mask, position_ids)
        last_hidden_state, pooled = self.final_norm(blocks.hidden_states[-1]), self.final_norm(blocks.row)[:, 0]
        projected = self.text_projection(pooled) if self.config.projection_dim is not None else None
        return ClipTextOutput(blocks.hidden_states, last_hidden_state, pooled, projected, blocks.attentions)

    def final_norm(self, x: jax.Array) -> jax.Array:
        """The final LayerNorm, for pipelines that apply it to another layer than the last ("clip skip")."""
        return self.text_model.final_layer_norm(x)
