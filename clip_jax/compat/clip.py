"""`FlaxCLIPTextModel` and `FlaxCLIPTextModelWithProjection`, as transformers had them up to version 4.

Reference: transformers 4.57 `modeling_flax_clip.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.typing

from clip_jax.compat.base import FlaxPreTrainedModel, as_ids
from clip_jax.compat.features import BATCH_SIZE, pooled_rows
from clip_jax.compat.modules import FlaxCLIPTextModelWithProjectionModule, FlaxCLIPTextModule
from clip_jax.compat.outputs import ModelOutput
from clip_jax.config import ClipTextConfig
from clip_jax.errors import ClipJaxError
from clip_jax.models import intercepted
from clip_jax.structs import is_traced


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

    @jax.transfer_guard_host_to_device("allow")  # ids come from there
    def get_text_features(
        self,
        input_ids: jax.typing.ArrayLike,
        attention_mask: jax.typing.ArrayLike | None = None,
        position_ids: jax.typing.ArrayLike | None = None,
        params: Mapping[str, Any] | None = None,
        dropout_rng: jax.Array | None = None,  # noqa: ARG002
        train: bool = False,
        *,
        batch_size: int = BATCH_SIZE,
    ) -> jax.Array:
        """`text_embeds` alone, of any number of texts: for retrieval, CLIP scores, zero-shot classification.

        Only what the pooled row wants is run. Ids on the host are sorted by the lengths of their texts, cut after these
        to one of a few lengths, and run `batch_size` at a time, in a few compiled programs for all numbers of texts.
        Ids on a device, or within a `jit`, are run as they are.

        Reference: transformers 4.57 `modeling_flax_clip.py`, `FlaxCLIPPreTrainedModel.get_text_features`.

        Args:
            input_ids: [N, L] int, as in a call, and so are the arguments up to `train`.
            attention_mask: [N, L].
            position_ids: [N, L] or [1, L].
            params: To use instead of the model's own.
            dropout_rng: Accepted; there is no dropout.
            train: Changes nothing for a config without dropout.
            batch_size: The most texts at a time; an accelerator may want more than by default.

        Returns:
            [N, P], the row at the end-of-text token, projected, not normalised.

        Raises:
            ClipJaxError: As in a call; or no `batch_size`.
        """
        if type(batch_size) is not int or batch_size < 1:
            raise ClipJaxError(f"batch_size must be a positive int, found {batch_size!r}.")
        arrays = self._checked((input_ids, attention_mask, position_ids), train)
        variables = {"params": params or self.params}
        embed = _text_embeds.__wrapped__ if intercepted() else _text_embeds  # as for a call
        run = functools.partial(embed, self.module, variables)
        if isinstance(arrays[0], jax.Array) or is_traced((variables, arrays)):
            return run(*as_ids(arrays))
        assert isinstance(self._tower, ClipTextConfig)
        return pooled_rows(run, arrays, self._tower, batch_size)


@functools.partial(jax.jit, static_argnums=0)
def _text_embeds(module: FlaxCLIPTextModelWithProjectionModule, variables: Mapping[str, Any], *arrays: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):  # as for a call
        return module.apply(variables, *arrays)["text_embeds"]
