"""`FlaxT5EncoderModel`, as transformers had it up to version 4.

Reference: transformers 4.57 `modeling_flax_t5.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.typing

from clip_jax.compat.base import FlaxPreTrainedModel
from clip_jax.compat.modules import FlaxT5EncoderModule
from clip_jax.compat.outputs import ModelOutput


class FlaxT5EncoderModel(FlaxPreTrainedModel):
    """The encoder of T5 v1.1 (gated GELU); T5 v1.0 is refused.

    Example:
        >>> model = FlaxT5EncoderModel.from_pretrained(repo, subfolder="text_encoder_2", dtype=jnp.bfloat16)
        >>> model(input_ids)["last_hidden_state"].astype(model.dtype).shape  # [B, 512] -> [B, 512, D]
        (1, 512, 4096)
    """

    module_class = FlaxT5EncoderModule
    architecture = "T5EncoderModel"
    base_model_prefix = "transformer"

    def __call__(
        self,
        input_ids: jax.typing.ArrayLike,
        attention_mask: jax.typing.ArrayLike | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        train: bool = False,
        params: Mapping[str, Any] | None = None,
        dropout_rng: jax.Array | None = None,  # noqa: ARG002
    ) -> ModelOutput | tuple[Any, ...]:
        """Runs the encoder, in a compiled program of which the params are arguments.

        Differentiable; within a `jit` of your own it is traced into that.

        Args:
            input_ids: [B, L] int, of any length; of numpy or jax.
            attention_mask: [B, L], nonzero for tokens to attend to; None means all, pads included.
            output_attentions: Whether to return attention weights; None means as the config says.
            output_hidden_states: The same for hidden states.
            return_dict: False returns a tuple; None means as the config says.
            train: Must be False unless `config.dropout_rate` is 0: dropout is not computed.
            params: To use instead of the model's own.
            dropout_rng: Accepted; there is no dropout.

        Returns:
            By attribute, key and index: `last_hidden_state` [B, L, D], float32 whatever `dtype` is, and what else is
            asked for.

        Raises:
            ClipJaxError: Ids that are not [B, L], `train=True` where the config has dropout, or no params.
        """
        return self._forward(
            params,
            (input_ids, attention_mask),
            train=train,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
