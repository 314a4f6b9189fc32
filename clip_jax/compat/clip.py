"""`FlaxCLIPTextModel` and `FlaxCLIPTextModelWithProjection`, as transformers had them up to version 4.

Reference: transformers 4.57 `modeling_flax_clip.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.typing

from clip_jax.compat.base import FlaxPreTrainedModel
from clip_jax.compat.modules import FlaxCLIPTextModelWithProjectionModule, FlaxCLIPTextModule
from clip_jax.compat.outputs import ModelOutput


class FlaxCLIPTextPreTrainedModel(FlaxPreTrainedModel):
    """Base class of the two models of CLIP's text transformer."""

    def __call__(
        self,
        input_ids: jax.typing.ArrayLike,
        attention_mask: jax.typing.ArrayLike | None = None,
        position_ids: jax.typing.ArrayLike | None = None,
        params: Mapping[str, Any] | None = None,
        dropout_rng: jax.Array | None = None,  # noqa: ARG002
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """Runs the text transformer, in a compiled program of which the params are arguments.

        Differentiable; within a `jit` of your own it is traced into that.

        Args:
            input_ids: [B, L] int, L at most `config.max_position_embeddings`; of numpy or jax.
            attention_mask: [B, L], nonzero for tokens to attend to, on top of the causal mask; None means all.
            position_ids: [B, L] or [1, L]; 0 .. L-1 by default.
            params: To use instead of the model's own.
            dropout_rng: Accepted; there is no dropout.
            train: Changes nothing for a config without dropout, which is every published CLIP's.
            output_attentions: Whether to return attention weights; None means as the config says.
            output_hidden_states: The same for hidden states.
            return_dict: False returns a tuple; None means as the config says.

        Returns:
            By attribute, key and index: `last_hidden_state` [B, L, D] and `pooler_output` [B, D]; with projection,
            `text_embeds` [B, P] and `last_hidden_state`; and what else is asked for.

        Raises:
            ClipJaxError: Ids that are not [B, L], too many of them, `train=True` where the config has dropout, or no
                params.
        """
        return self._forward(
            params,
            (input_ids, attention_mask, position_ids),
            train=train,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


class FlaxCLIPTextModel(FlaxCLIPTextPreTrainedModel):
    """CLIP's text transformer, without projection.

    Example:
        >>> model = FlaxCLIPTextModel.from_pretrained(repo, subfolder="text_encoder", dtype=jnp.bfloat16)
        >>> model(input_ids).last_hidden_state.shape  # [B, 77] -> [B, 77, D]
        (1, 77, 768)
    """

    module_class = FlaxCLIPTextModule
    architecture = "CLIPTextModel"


class FlaxCLIPTextModelWithProjection(FlaxCLIPTextPreTrainedModel):
    """CLIP's text transformer with `text_projection`, which the weights have to hold.

    Example:
        >>> model = FlaxCLIPTextModelWithProjection.from_pretrained(sdxl, subfolder="text_encoder_2")
        >>> out = model(input_ids, output_hidden_states=True)
        >>> out["hidden_states"][-2].shape, out.text_embeds.shape
        ((1, 77, 1280), (1, 1280))
    """

    module_class = FlaxCLIPTextModelWithProjectionModule
    architecture = "CLIPTextModelWithProjection"
