"""What a family is: frozen data that says which towers run and how their outputs become conditioning.

Letters: G guidance rows, B batch, L tokens, D width, P pooled width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import jax

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.errors import ClipJaxError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """One text encoder of a family.

    Attributes:
        name: Its key in the params: "clip_l", "clip_h", "clip_g" or "t5".
        config: Its architecture; a checkpoint's own config takes its place when one is loaded.
        folder: Where a diffusers folder keeps its weights.
        tokenizer_folder: Where a diffusers folder keeps its tokenizer.
        pad_token: Of its tokenizer, for checkpoints that come without one.
        prompt: Which argument it is fed; an absent one falls back to `prompt`.
        layer: The hidden state it yields, counted from the end: -1 is the last, -2 the penultimate.
        final_norm: Whether the final norm is applied to that hidden state.
        pooled_only: Whether its hidden states are not used, and so its ids may be cut at the end of the text.
        optional: Whether the family works without it.
        identity_projection: Whether a missing `text_projection` stands for the identity.
        without_last: Whether it does without the last block of the CLIP that it was made of.
    """

    name: str
    config: TowerConfig
    folder: str = "text_encoder"
    tokenizer_folder: str = "tokenizer"
    pad_token: str = "<|endoftext|>"
    prompt: Literal["prompt", "prompt_2", "prompt_3"] = "prompt"
    layer: int = -1
    final_norm: bool = True
    pooled_only: bool = False
    optional: bool = False
    identity_projection: bool = False
    without_last: bool = False


@dataclasses.dataclass(frozen=True)
class TowerOutput:
    """What a tower yields, for every guidance row.

    Attributes:
        embeds: [G, B, L, D], the hidden state that the tower's `layer` names.
        pooled: [G, B, D], the row at the end of the text after the final norm; None for T5.
        projected: [G, B, P], `pooled` through `text_projection`; None where there is none.
    """

    embeds: jax.Array
    pooled: jax.Array | None = None
    projected: jax.Array | None = None


#: `prompt_embeds` [G, B, L, D] and `pooled_prompt_embeds` [G, B, P] or None.
Joined = tuple[jax.Array, jax.Array | None]


def only_tower(outputs: Mapping[str, TowerOutput], max_sequence_length: int | None) -> Joined:  # noqa: ARG001
    """Joins nothing: the embeddings of the one tower there is, not pooled."""
    (output,) = outputs.values()
    return output.embeds, None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What the pipelines of a diffusion model family want. Hashable: a static argument of `text_embeddings`.

    Attributes:
        name: As in `clip_jax.load(..., family=name)`.
        title: For people.
        pipelines: The `_class_name`s of `model_index.json` that belong to it: those whose `encode_prompt` is the same.
        towers: Its text encoders.
        guidance: Whether the unconditional rows are part of the batch by default.
        zero_negative: Whether no negative prompt means zeros rather than the empty prompt.
        zero_negative_key: The key of `model_index.json` that decides that, where there is one.
        max_sequence_length: How many tokens T5 is given by default; None without T5.
        text_ids: Whether the pipeline wants `text_ids` too.
        join: Outputs of the towers and `max_sequence_length` to the conditioning; pure.
    """

    name: str
    title: str
    pipelines: frozenset[str] = dataclasses.field(repr=False)
    towers: tuple[Tower, ...]
    guidance: bool = True
    zero_negative: bool = False
    zero_negative_key: str | None = None
    max_sequence_length: int | None = None
    text_ids: bool = False
    join: Callable[[Mapping[str, TowerOutput], int | None], Joined] = only_tower

    def tower(self, name: str) -> Tower:
        """The tower called `name`.

        Raises:
            KeyError: There is none.
        """
        return {tower.name: tower for tower in self.towers}[name]

    def with_configs(self, configs: Mapping[str, TowerConfig]) -> Family:
        """The same family around the architectures of a given checkpoint (tower name -> config)."""
        towers = tuple(dataclasses.replace(tower, config=configs[tower.name]) for tower in self.towers)
        return dataclasses.replace(self, towers=towers)

    def row_length(self, tower: Tower, model_max_length: int, max_sequence_length: int | None = None) -> int:
        """How many tokens a tower is given: those of CLIP's positions or of its tokenizer, or T5's rows."""
        if isinstance(tower.config, ClipTextConfig):
            # Rows that are joined are as long as the shortest: one of the towers may be a LongCLIP, with 248 positions.
            alike = [
                other.config.max_position_embeddings
                for other in self.towers
                if isinstance(other.config, ClipTextConfig) and other.pooled_only == tower.pooled_only
            ]
            return min(model_max_length, *alike)
        return max_sequence_length or self.max_sequence_length or model_max_length

    def without(self, names: str | Iterable[str]) -> Family:
        """The same family without some of its towers.

        Raises:
            ClipJaxError: It has no such tower, or does not work without it.
        """
        names = {names} if isinstance(names, str) else set(names)
        unknown = names - {tower.name for tower in self.towers if tower.optional}
        if unknown:
            optional = [tower.name for tower in self.towers if tower.optional]
            raise ClipJaxError(
                f"{self.name} cannot do without {', '.join(sorted(unknown))}; "
                f"it can do without {', '.join(optional) or 'none of its towers'}."
            )
        return dataclasses.replace(self, towers=tuple(t for t in self.towers if t.name not in names))
