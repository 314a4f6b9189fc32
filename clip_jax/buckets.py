"""A few sizes of batches and rows for all: programs are compiled for these, not for every size that comes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import jax
import numpy as np

from clip_jax.config import ClipTextConfig
from clip_jax.errors import ClipJaxError
from clip_jax.families import Family
from clip_jax.models.functional import end_of_text
from clip_jax.structs import TextEmbeddings, Tokens

BATCHES = (1, 2, 4, 8, 16, 32)
"""Numbers of prompts; above the last, its multiples."""

LENGTHS = (8, 16, 32, 48, 77)
"""Lengths of ids of which only those up to the end of the text count."""


def bucket_of(size: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket, or multiple of the last, that has room for `size`."""
    return next((bucket for bucket in buckets if bucket >= size), -(-size // buckets[-1]) * buckets[-1])


def checked_sizes(batch_sizes: Iterable[int]) -> tuple[int, ...]:
    """Numbers of prompts.

    Raises:
        ClipJaxError: They are none.
    """
    sizes = tuple(batch_sizes) if isinstance(batch_sizes, Iterable) else (None,)
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ClipJaxError(f"batch_sizes must be positive ints in a list, found {batch_sizes!r}.")
    return sizes


def batch_of(tokens: Tokens) -> int:
    """B of ids [B, L]."""
    return len(next(iter(tokens.cond.values())))


def padded(tokens: Tokens) -> Tokens:
    """Ids with the last prompt repeated up to as many rows as a program is compiled for; on the host."""
    missing = bucket_of(batch_of(tokens), BATCHES) - batch_of(tokens)
    if not missing:
        return tokens
    return jax.tree.map(lambda ids: np.pad(ids, [(0, missing), (0, 0)], mode="edge"), tokens)


@functools.partial(jax.jit, static_argnames="batch")
def cut_rows(embeddings: TextEmbeddings, batch: int) -> TextEmbeddings:
    """The first `batch` rows of either half: those that were there before they were `padded`."""
    groups = 2 if embeddings.guidance else 1

    def cut(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        return x.reshape(groups, -1, *x.shape[1:])[:, :batch].reshape(-1, *x.shape[1:])

    return dataclasses.replace(
        embeddings,
        prompt_embeds=cut(embeddings.prompt_embeds),
        pooled_prompt_embeds=cut(embeddings.pooled_prompt_embeds),
    )


def of_every_length(tokens: Tokens, family: Family) -> list[Tokens]:
    """Ids of each length that `without_tails` cuts some to; these themselves where it cuts none."""
    cut = _cut(family)
    if not cut:
        return [tokens]

    def ending_at(length: int, side: dict[str, np.ndarray | jax.Array]) -> dict[str, np.ndarray | jax.Array]:
        ends: dict[str, np.ndarray] = {}
        for name, config in cut.items():
            ends[name] = np.full((len(side[name]), length), int(config.eos_token_id == 0), np.int32)  # any other id
            ends[name][:, -1] = config.eos_token_id
        return {**side, **ends}

    longest = min(config.max_position_embeddings for config in cut.values())
    return [
        dataclasses.replace(
            tokens,
            cond=ending_at(length, tokens.cond),
            uncond=None if tokens.uncond is None else ending_at(length, tokens.uncond),
        )
        for length in sorted({min(bucket_of(size, LENGTHS), longest) for size in range(1, longest + 1)})
    ]


def without_tails(tokens: Tokens, family: Family) -> Tokens:
    """Ids cut after the end of the text, for towers of which only the pooled row is used.

    Attention is causal, so that the row stays the same.
    """
    sides = [side for side in (tokens.uncond, tokens.cond) if side is not None]
    for name, config in _cut(family).items():
        ends = [end_of_text(side[name], config.eos_token_id) for side in sides]
        length = bucket_of(max(int(end.max()) for end in ends) + 1, LENGTHS)
        sides = [{**side, name: side[name][:, :length]} for side in sides]
    *uncond, cond = sides
    return dataclasses.replace(tokens, cond=cond, uncond=uncond[0] if uncond else None)


def _cut(family: Family) -> dict[str, ClipTextConfig]:
    """The towers of which only the pooled row is used."""
    configs = {tower.name: tower.config for tower in family.towers if tower.pooled_only}
    return {name: config for name, config in configs.items() if isinstance(config, ClipTextConfig)}
