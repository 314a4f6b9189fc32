"""`TextEncoder`: prompts in, embeddings out. Tokenises on the host, then runs the one compiled program."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from clip_jax.config import ClipTextConfig
from clip_jax.embed import Params, text_embeddings
from clip_jax.errors import ClipJaxError
from clip_jax.families import Family
from clip_jax.params.cast import float_dtype
from clip_jax.params.checkpoint import CheckpointMetadata, write_checkpoint
from clip_jax.params.shapes import flatten, layer_groups
from clip_jax.structs import TextEmbeddings, Tokens
from clip_jax.tokenizers import ClipTokenizer

Overflow = Literal["error", "truncate"]

# Batch sizes that are compiled for; above the last, its multiples.
_BUCKETS = (1, 2, 4, 8, 16, 32)


class TextEncoder:
    """The text side of a diffusion pipeline. Made by `clip_jax.load`.

    Example:
        >>> encoder = clip_jax.load("random:sd15")
        >>> out = encoder("a cat sitting on a windowsill", negative_prompt="blurry, low quality")
        >>> out.prompt_embeds.shape
        (2, 77, 768)

    Attributes:
        family: What the embeddings are made for, around the checkpoint's architectures.
        params: Plain nested dict with one entry per tower.
        tokenizers: Tower name -> tokenizer.
        dtype: Of the computation and of the embeddings.
        provenance: Where the weights come from. JSON.
    """

    def __init__(
        self,
        family: Family,
        params: Params,
        tokenizers: Mapping[str, ClipTokenizer],
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.family = family
        self.params = params
        self.tokenizers = dict(tokenizers)
        self.dtype = float_dtype(dtype)
        self.provenance = provenance or {}

    @property
    def config(self) -> dict[str, ClipTextConfig]:
        """Tower name -> architecture."""
        return {tower.name: tower.config for tower in self.family.towers}

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        guidance: bool | None = None,
        clip_skip: int | None = None,
        clip_skip_negative: int | None = None,
        overflow: Overflow = "error",
    ) -> TextEmbeddings:
        """Encodes a prompt, or a list of B, with its negatives.

        Args:
            prompt: One prompt or a list. "" is a prompt like any other.
            negative_prompt: One for all prompts, or a list with one each; None is "". Ignored without
                guidance, as in diffusers.
            guidance: Whether the unconditional rows come first; None means the family's default.
            clip_skip: Layers to leave out at the end, for the prompts (diffusers' meaning: 1 is penultimate).
            clip_skip_negative: The same for the negatives, which diffusers never skips.
            overflow: What to do with a prompt that does not fit: "error", or "truncate", which warns with the
                text it cuts off.

        Returns:
            `prompt_embeds` [2B, L, D], unconditional rows first, or [B, L, D] without guidance.

        Raises:
            PromptTooLongError: A prompt does not fit; tells what does not.
            ClipJaxError: Not a str, lists of different lengths, or float16 overflowed.
        """
        tokens = self.tokenize(prompt, negative_prompt, guidance=guidance, overflow=overflow)
        return self.encode(tokens, clip_skip=clip_skip, clip_skip_negative=clip_skip_negative)

    def tokenize(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        guidance: bool | None = None,
        overflow: Overflow = "error",
    ) -> Tokens:
        """Turns prompts into token ids, on the host: int32 [B, L] per tower. Arguments as in `__call__`."""
        prompts, names = _as_batch(prompt, "prompt")
        if not prompts:
            raise ClipJaxError("prompt is an empty list; expected at least one prompt.")
        if not (self.family.guidance if guidance is None else guidance):
            return Tokens(cond=self._encode_ids(prompts, names, overflow))
        negatives, negative_names = _as_batch(
            "" if negative_prompt is None else negative_prompt, "negative_prompt"
        )
        for_all = negative_prompt is None or isinstance(negative_prompt, str)
        if not for_all and len(negatives) != len(prompts):
            raise ClipJaxError(
                f"negative_prompt has {len(negatives)} entries for {len(prompts)} prompts; expected one "
                f"each, or a single str for all."
            )
        ids = self._encode_ids([*negatives, *prompts], [*negative_names, *names], overflow)
        copies = len(prompts) if for_all else 1
        return Tokens(
            uncond={tower: rows[: len(negatives)].repeat(copies, axis=0) for tower, rows in ids.items()},
            cond={tower: rows[len(negatives) :] for tower, rows in ids.items()},
        )

    def encode(
        self, tokens: Tokens, *, clip_skip: int | None = None, clip_skip_negative: int | None = None
    ) -> TextEmbeddings:
        """Runs the compiled program over token ids.

        The batch is padded to one of a few sizes, so that another number of prompts seldom means another
        compilation; rows of the padding are cut off again.

        Raises:
            ClipJaxError: float16 overflowed.
        """
        batch = len(next(iter(tokens.cond.values())))
        bucket = _bucket(batch)
        out = text_embeddings(
            self.params,
            tokens if bucket == batch else jax.tree.map(lambda ids: _pad_rows(ids, bucket), tokens),
            family=self.family,
            dtype=self.dtype,
            compute_dtype=self.dtype,
            clip_skip=clip_skip,
            clip_skip_negative=clip_skip_negative,
        )
        if bucket != batch:
            out = _cut_rows(out, batch)
        if self.dtype == jnp.float16 and not jnp.isfinite(out.prompt_embeds).all():
            raise ClipJaxError(
                "The embeddings overflow float16: this text encoder computes values beyond 65504. "
                "Load it with dtype='bfloat16' or 'float32'."
            )
        return out

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes params, architectures and tokenizers to a folder that `clip_jax.load` reads.

        Raises:
            CheckpointError: The folder exists.
        """
        write_checkpoint(
            Path(path),
            (
                {tower: {p: leaves[p] for p in group}}
                for tower, leaves in ((name, flatten(tree)) for name, tree in self.params.items())
                for group in layer_groups(leaves)
            ),
            metadata=CheckpointMetadata(
                family=self.family.name, configs=self.config, provenance=self.provenance
            ),
            tokenizers=self.tokenizers,
            overwrite=overwrite,
        )

    def _encode_ids(self, prompts: list[str], names: list[str], overflow: Overflow) -> dict[str, np.ndarray]:
        ids = {}
        for tower in self.family.towers:
            tokenizer = self.tokenizers[tower.name]
            length = min(tokenizer.model_max_length, tower.config.max_position_embeddings)
            ids[tower.name] = tokenizer.encode(prompts, max_length=length, overflow=overflow, names=names)
        return ids


def _as_batch(prompt: str | Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """A list of prompts, and what to call each in an error."""
    if isinstance(prompt, str):
        return [prompt], [name]
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise ClipJaxError(f"{name} must be a str or a list of str, found {type(prompt).__name__}.")
    return list(prompt), [f"{name}[{i}]" for i in range(len(prompt))]


def _bucket(batch: int) -> int:
    return next((size for size in _BUCKETS if size >= batch), -(-batch // _BUCKETS[-1]) * _BUCKETS[-1])


def _pad_rows(ids: np.ndarray | jax.Array, rows: int) -> np.ndarray:
    return np.pad(ids, [(0, rows - len(ids)), (0, 0)], mode="edge")


@functools.partial(jax.jit, static_argnames="batch")
def _cut_rows(embeddings: TextEmbeddings, batch: int) -> TextEmbeddings:
    groups = 2 if embeddings.guidance else 1

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(groups, -1, *x.shape[1:])[:, :batch].reshape(-1, *x.shape[1:])

    return jax.tree.map(cut, embeddings)
