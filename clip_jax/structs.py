"""What goes into and comes out of `text_embeddings`: pytrees of arrays.

Letters: B batch, L tokens, D width, P pooled width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json

import jax
import numpy as np
from jax import export


def is_traced(tree: object) -> bool:
    """Whether a tree of arrays is that of a function which is being traced."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token ids of a batch of prompts, for every tower of a family, on the host.

    Attributes:
        cond: Tower name -> int32 [B, L], the prompts.
        uncond: Tower name -> int32 [B, L], the negative prompts; None where there are none to encode.
        zero_uncond: Whether the unconditional rows are zeros, which need no encoding; `uncond` is None then.
        max_sequence_length: How many rows of zeros stand for T5's where the family is without it; None means the
            family's default.
    """

    cond: dict[str, np.ndarray | jax.Array]
    uncond: dict[str, np.ndarray | jax.Array] | None = None
    zero_uncond: bool = dataclasses.field(default=False, metadata={"static": True})
    max_sequence_length: int | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEmbeddings:
    """What the UNet or DiT is conditioned on.

    With guidance the first half of the rows belongs to the negative prompts, the second half to the
    prompts, in the order in which diffusers' pipelines concatenate them. A `vmap` or `scan` puts its axis before.

    Attributes:
        prompt_embeds: [2B, L, D] with guidance, [B, L, D] without.
        pooled_prompt_embeds: [2B, P] or [B, P]; None where the family has none.
        text_ids: [L, 3], positions of the text in FLUX's sequence, all zeros; None for the other families.
        guidance: Whether the unconditional rows are there.
    """

    prompt_embeds: jax.Array
    pooled_prompt_embeds: jax.Array | None = None
    text_ids: jax.Array | None = None
    guidance: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def uncond(self) -> TextEmbeddings | None:
        """The unconditional half, [B, L, D]; None without guidance."""
        return self._half(slice(None, self.prompt_embeds.shape[-3] // 2)) if self.guidance else None

    @property
    def cond(self) -> TextEmbeddings:
        """The conditional half, [B, L, D]."""
        return self._half(slice(self.prompt_embeds.shape[-3] // 2, None)) if self.guidance else self

    @jax.transfer_guard_host_to_device("allow")  # an index comes from there
    def _half(self, rows: slice) -> TextEmbeddings:
        pooled = self.pooled_prompt_embeds
        return TextEmbeddings(
            prompt_embeds=self.prompt_embeds[..., rows, :, :],
            pooled_prompt_embeds=None if pooled is None else pooled[..., rows, :],
            text_ids=self.text_ids,
            guidance=False,
        )


for _struct in (Tokens, TextEmbeddings):  # so that `jax.export` can write functions that take or return them
    with contextlib.suppress(ValueError):  # of that name there is one, for this module is imported anew
        export.register_pytree_node_serialization(
            _struct,
            serialized_name=f"clip_jax.{_struct.__name__}",
            serialize_auxdata=lambda static: json.dumps(static).encode(),
            deserialize_auxdata=lambda written: tuple(json.loads(bytes(written))),
        )
