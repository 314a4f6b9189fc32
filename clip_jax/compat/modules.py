"""The Linen modules behind the classes: our own, called and answering as those of transformers 4.

Reference: transformers 4.57 `modeling_flax_clip.py` (`FlaxCLIPTextModule`, `FlaxCLIPTextModelWithProjectionModule`)
and `modeling_flax_t5.py` (`FlaxT5EncoderModule`). The parameter trees are theirs, as those of our modules are.

Dropout is not computed: `deterministic=False` is for the caller to refuse where a config asks for dropout.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from clip_jax.compat.outputs import (
    FlaxBaseModelOutput,
    FlaxBaseModelOutputWithPooling,
    FlaxCLIPTextModelOutput,
    ModelOutput,
)
from clip_jax.models import ClipTextModel, T5Encoder


class FlaxCLIPTextModule(ClipTextModel):
    """`ClipTextModel` without projection."""

    @nn.nowrap
    def select(self, out: Any, **asked: Any) -> ModelOutput:
        """The outputs that this class has."""
        return FlaxBaseModelOutputWithPooling(out.last_hidden_state, out.pooler_output, **asked)

    def __call__(  # type: ignore[override]
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        deterministic: bool = True,  # noqa: ARG002
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> ModelOutput | tuple[Any, ...]:
        """Runs the model on ids [B, L]; the masks and positions are those of `ClipTextModel`."""
        out = super().__call__(input_ids, attention_mask, position_ids)
        selected = self.select(
            out,
            hidden_states=out.hidden_states if output_hidden_states else None,
            attentions=out.attentions if output_attentions else None,
        )
        return selected if return_dict else selected.to_tuple()


class FlaxCLIPTextModelWithProjectionModule(FlaxCLIPTextModule):
    """`ClipTextModel` with projection."""

    @nn.nowrap
    def select(self, out: Any, **asked: Any) -> ModelOutput:
        """The outputs that this class has."""
        return FlaxCLIPTextModelOutput(out.text_embeds, out.last_hidden_state, **asked)


class FlaxT5EncoderModule(T5Encoder):
    """`T5Encoder`."""

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        deterministic: bool = True,  # noqa: ARG002
    ) -> ModelOutput | tuple[Any, ...]:
        """Runs the encoder on ids [B, L]; the mask is that of `T5Encoder`."""
        out = super().__call__(input_ids, attention_mask)
        selected = FlaxBaseModelOutput(
            out.last_hidden_state,
            out.hidden_states if output_hidden_states else None,
            out.attentions if output_attentions else None,
        )
        return selected if return_dict else selected.to_tuple()
