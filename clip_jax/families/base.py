"""What a family is: frozen data that says which towers run and how their outputs become conditioning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax

from clip_jax.config import ClipTextConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """One text encoder of a family.

    Attributes:
        name: Its key in the params: "clip_l", "clip_h", ...
        config: Its architecture; a checkpoint's own config takes its place when one is loaded.
        folder: Where a diffusers folder keeps its weights.
        tokenizer_folder: Where a diffusers folder keeps its tokenizer.
        pad_token: Of its tokenizer, for checkpoints that come without one.
        layer: The hidden state it yields, counted from the end: -1 is the last, -2 the penultimate.
        final_norm: Whether the final LayerNorm is applied to that hidden state.
    """

    name: str
    config: ClipTextConfig
    folder: str = "text_encoder"
    tokenizer_folder: str = "tokenizer"
    pad_token: str = "<|endoftext|>"
    layer: int = -1
    final_norm: bool = True


def only_tower(embeds: Mapping[str, jax.Array]) -> jax.Array:
    """Joins nothing: the embeddings [..., L, D] of the one tower there is."""
    (prompt_embeds,) = embeds.values()
    return prompt_embeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What the pipelines of a diffusion model family want. Hashable: a static argument of `text_embeddings`.

    Attributes:
        name: As in `clip_jax.load(..., family=name)`.
        title: For people.
        pipelines: The `_class_name`s of `model_index.json` that belong to it.
        towers: Its text encoders.
        guidance: Whether the unconditional rows are part of the batch by default.
        join: Tower name -> [..., L, D] to the `prompt_embeds` [..., L, D] of the family; pure.
    """

    name: str
    title: str
    pipelines: frozenset[str]
    towers: tuple[Tower, ...]
    guidance: bool = True
    join: Callable[[Mapping[str, jax.Array]], jax.Array] = only_tower

    def tower(self, name: str) -> Tower:
        """The tower called `name`.

        Raises:
            KeyError: There is none.
        """
        return {tower.name: tower for tower in self.towers}[name]

    def with_configs(self, configs: Mapping[str, ClipTextConfig]) -> Family:
        """The same family around the architectures of a given checkpoint (tower name -> config)."""
        towers = tuple(dataclasses.replace(tower, config=configs[tower.name]) for tower in self.towers)
        return dataclasses.replace(self, towers=towers)
