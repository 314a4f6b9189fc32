"""What the classes return: by attribute, by key and by index, as `ModelOutput` of transformers 4 was read.

Reference: transformers 4.57 `modeling_flax_outputs.py`, `modeling_flax_clip.py` (`FlaxCLIPTextModelOutput`).

Letters: B batch, L tokens, D width, N heads, P pooled width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax


class ModelOutput(Mapping[str, Any]):
    """A dataclass that is also a mapping, and a tuple when indexed with numbers; fields that are None are left out."""

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return self._present()[key]
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are there, in order: what `return_dict=False` returns."""
        return tuple(self._present().values())

    def _present(self) -> dict[str, Any]:
        fields = (field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FlaxBaseModelOutput(ModelOutput):
    """Of `FlaxT5EncoderModel`.

    Attributes:
        last_hidden_state: [B, L, D], after the final norm.
        hidden_states: One more than there are layers, each [B, L, D], the last of them `last_hidden_state`.
        attentions: One for every layer, [B, N, L, L].
    """

    last_hidden_state: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FlaxBaseModelOutputWithPooling(ModelOutput):
    """Of `FlaxCLIPTextModel`.

    Attributes:
        last_hidden_state: [B, L, D], after the final LayerNorm.
        pooler_output: [B, D], its row at the end-of-text token.
        hidden_states: One more than there are layers, each [B, L, D], all before the final LayerNorm.
        attentions: One for every layer, [B, N, L, L].
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FlaxCLIPTextModelOutput(ModelOutput):
    """Of `FlaxCLIPTextModelWithProjection`.

    Attributes:
        text_embeds: [B, P], the row at the end-of-text token, projected, not normalised.
        last_hidden_state: [B, L, D], after the final LayerNorm.
        hidden_states: One more than there are layers, each [B, L, D], all before the final LayerNorm.
        attentions: One for every layer, [B, N, L, L].
    """

    text_embeds: jax.Array
    last_hidden_state: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
