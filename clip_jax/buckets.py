"""A few sizes of batches and rows for all: programs are compiled for these, not for every size that comes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from clip_jax.config import ClipTextConfig
from clip_jax.families import Family
from clip_jax.structs import TextEmbeddings, Tokens

BATCHES = (1, 2, 4, 8, 16, 32)
"""Numbers of prompts; above the last, its multiples."""

LENGTHS = (8, 16, 32, 48, 77)
"""Lengths of ids of which only those up to the end of the text count."""


def bucket_of(size: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket, or multiple of the last, that has room for `size`."""
    return next((bucket for bucket in buckets if bucket >= size), -(-size // buckets[-1]) * buckets[-1])


def pad_rows(tokens: Tokens, rows: int) -> Tokens:
    """Ids [B, L] with the last prompt repeated up to `rows`; on the host."""
    return jax.tree.map(lambda ids: np.pad(ids, [(0, rows - len(ids)), (0, 0)], mode="edge"), tokens)


@functools.partial(jax.jit, static_argnames="batch")
def cut_rows(embeddings: TextEmbeddings, batch: int) -> TextEmbeddings:
    """The first `batch` rows of either half: those that were there before `pad_rows`."""
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


def without_tails(tokens: Tokens, family: Family) -> Tokens:
    """Ids cut after the end of the text, for towers of which only the pooled row is used.

    Attention is causal, so that the row stays the same.
    """
    sides = [side for side in (tokens.uncond, tokens.cond) if side is not None]
    for tower in family.towers:
        if not isinstance(tower.config, ClipTextConfig) or not all(tower.name in side for side in sides):
            continue  # that a tower's ids are missing is for `text_embeddings` to say
        if tower.pooled_only:
            ends = [np.argmax(side[tower.name] == tower.config.eos_token_id, axis=-1) for side in sides]
            length = bucket_of(max(int(end.max()) for end in ends) + 1, LENGTHS)
            sides = [{**side, tower.name: side[tower.name][:, :length]} for side in sides]
    *uncond, cond = sides
    return dataclasses.replace(tokens, cond=cond, uncond=uncond[0] if uncond else None)
