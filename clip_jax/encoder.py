"""`TextEncoder`: prompts in, embeddings out. Tokenises on the host, then runs the one compiled program."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.embed import Params, text_embeddings
from clip_jax.errors import ClipJaxError
from clip_jax.families import FAMILIES, Family, Tower
from clip_jax.models import intercepted
from clip_jax.params.cast import float_dtype
from clip_jax.params.checkpoint import CheckpointMetadata, write_checkpoint
from clip_jax.params.quantize import scheme_of, split
from clip_jax.params.shapes import flatten, layer_groups
from clip_jax.params.shard import sharded_rows
from clip_jax.prompts import Prompts
from clip_jax.structs import TextEmbeddings, Tokens
from clip_jax.tokenizers import Overflow, RowTokenizer

# Batch sizes, and lengths of ids that may be cut, that are compiled for; above the last, its multiples.
_BATCHES = (1, 2, 4, 8, 16, 32)
_LENGTHS = (8, 16, 32, 48, 77)

# The limit of diffusers' SD 3 and FLUX pipelines (`check_inputs`).
_MAX_SEQUENCE_LENGTH = 512


class TextEncoder:
    """The text side of a diffusion pipeline. Made by `clip_jax.load`.

    Example:
        >>> encoder = clip_jax.load("random:sd15")
        >>> out = encoder("a cat sitting on a windowsill", negative_prompt="blurry, low quality")
        >>> out.prompt_embeds.shape
        (2, 77, 768)

    Attributes:
        family: What the embeddings are made for, around the checkpoint's architectures.
        params: Plain nested dict with one entry per tower; quantised leaves are `qwix.QArray`s.
        tokenizers: Tower name -> tokenizer.
        dtype: Of the computation and of the embeddings.
        provenance: Where the weights come from. JSON.
        batch_sharding: Where rows of token ids go if their number divides by the devices; None leaves that to jit.
    """

    def __init__(
        self,
        family: Family,
        params: Params,
        tokenizers: Mapping[str, RowTokenizer],
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        provenance: dict[str, Any] | None = None,
        batch_sharding: jax.sharding.NamedSharding | None = None,
    ) -> None:
        self.family = family
        self.params = params
        self.tokenizers = dict(tokenizers)
        self.dtype = float_dtype(dtype)
        self.provenance = provenance or {}
        self.batch_sharding = batch_sharding

    @property
    def config(self) -> dict[str, TowerConfig]:
        """Tower name -> architecture."""
        return {tower.name: tower.config for tower in self.family.towers}

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        negative_prompt_3: str | Sequence[str] | None = None,
        guidance: bool | None = None,
        clip_skip: int | None = None,
        clip_skip_negative: int | None = None,
        max_sequence_length: int | None = None,
        overflow: Overflow = "error",
    ) -> TextEmbeddings:
        """Encodes a prompt, or a list of B, with its negatives.

        Args:
            prompt: One prompt or a list. "" is a prompt like any other.
            negative_prompt: One for all prompts, or a list with one each. None is "", or zeros where the family
                has it so (`Family.zero_negative`). Ignored without guidance, as in diffusers.
            prompt_2: For the second tower (SDXL, SD 3: bigG; FLUX: T5); None and "" stand for `prompt`.
            prompt_3: For the third tower (SD 3: T5); None and "" stand for `prompt`.
            negative_prompt_2: As `prompt_2`, for `negative_prompt`. Alone it does not keep SDXL from zeros: that
                goes by `negative_prompt`, as in diffusers.
            negative_prompt_3: As `prompt_3`, for `negative_prompt`.
            guidance: Whether the unconditional rows come first; None means the family's default.
            clip_skip: Layers to leave out at the end, for the prompts (diffusers' meaning: 1 is one layer
                before the one that the family takes).
            clip_skip_negative: The same for the negatives, which diffusers never skips.
            max_sequence_length: L of T5, at most 512; None means the family's default.
            overflow: What to do with a prompt that does not fit: "error", or "truncate", which warns with the
                text it cuts off.

        Returns:
            `prompt_embeds` [2B, L, D], unconditional rows first, or [B, L, D] without guidance; and what else
            the family has.

        Raises:
            PromptTooLongError: A prompt does not fit; tells what does not.
            ClipJaxError: Not a str, lists of different lengths, arguments that the family does not take, or
                float16 overflowed.
        """
        tokens = self.tokenize(
            prompt,
            negative_prompt,
            prompt_2=prompt_2,
            prompt_3=prompt_3,
            negative_prompt_2=negative_prompt_2,
            negative_prompt_3=negative_prompt_3,
            guidance=guidance,
            max_sequence_length=max_sequence_length,
            overflow=overflow,
        )
        return self.encode(
            tokens,
            clip_skip=clip_skip,
            clip_skip_negative=clip_skip_negative,
        )

    def tokenize(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        negative_prompt_3: str | Sequence[str] | None = None,
        guidance: bool | None = None,
        max_sequence_length: int | None = None,
        overflow: Overflow = "error",
    ) -> Tokens:
        """Turns prompts into token ids, on the host: int32 [B, L] per tower. Arguments as in `__call__`."""
        self._check_arguments(
            max_sequence_length,
            prompt_2=prompt_2,
            prompt_3=prompt_3,
            negative_prompt_2=negative_prompt_2,
            negative_prompt_3=negative_prompt_3,
        )
        guidance = self.family.guidance if guidance is None else guidance
        if not isinstance(guidance, bool):
            raise ClipJaxError(f"guidance must be True, False or None, found {guidance!r}.")
        zero_uncond = guidance and self.family.zero_negative and negative_prompt is None
        prompts = _by_argument("", prompt, prompt_2, prompt_3)
        batch = len(prompts["prompt"].texts)
        if batch == 0:
            raise ClipJaxError("prompt is an empty list; expected at least one prompt.")
        if guidance and not zero_uncond:
            negative_prompt = "" if negative_prompt is None else negative_prompt
            prompts |= _by_argument("negative_", negative_prompt, negative_prompt_2, negative_prompt_3)
        cond, uncond = {}, {}
        for tower in self.family.towers:
            arguments = [name for name in (f"negative_{tower.prompt}", tower.prompt) if name in prompts]
            sides = [prompts[name].check(batch) for name in arguments]
            *negative, positive = self._encode_ids(tower, sides, batch, max_sequence_length, overflow)
            cond[tower.name] = positive
            if negative:
                (uncond[tower.name],) = negative
        return Tokens(
            cond=cond,
            uncond=uncond or None,
            zero_uncond=zero_uncond,
            # Where there is T5, the length is that of its ids, and another program would be the same.
            max_sequence_length=None if "t5" in cond else max_sequence_length,
        )

    def encode(
        self,
        tokens: Tokens,
        *,
        clip_skip: int | None = None,
        clip_skip_negative: int | None = None,
    ) -> TextEmbeddings:
        """Runs the compiled program over token ids.

        The batch is padded to one of a few sizes, so that another number of prompts seldom means another
        compilation; rows of the padding are cut off again. Ids of a tower of which only the pooled row is used
        are cut after the end of the text, at one of a few lengths: attention is causal, so that the row stays
        the same.

        Raises:
            ClipJaxError: float16 overflowed.
        """
        batch = max((len(rows) for rows in tokens.cond.values()), default=0)
        bucket = _bucket(batch, _BATCHES)
        tokens = self._without_tails(tokens)
        if bucket != batch:
            tokens = jax.tree.map(lambda ids: _pad_rows(ids, bucket), tokens)
        if self.batch_sharding is not None:
            tokens = jax.tree.map(lambda ids: sharded_rows(ids, self.batch_sharding), tokens)
        function = text_embeddings.__wrapped__ if intercepted() else text_embeddings
        out = function(
            self.params,
            tokens,
            family=self.family,
            dtype=self.dtype,
            compute_dtype=self.dtype,
            clip_skip=clip_skip,
            clip_skip_negative=clip_skip_negative,
        )
        if bucket != batch:
            out = _cut_rows(out, batch)
        if self.dtype == jnp.float16 and not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(out)):
            raise ClipJaxError(
                "The embeddings overflow float16: this text encoder computes values beyond 65504. "
                "Load it with dtype='bfloat16' or 'float32'."
            )
        return out

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes params, architectures and tokenizers to a folder that `clip_jax.load` reads, quantised if they are.

        Raises:
            CheckpointError: The folder exists.
            ClipJaxError: The params are quantised in part.
        """
        write_checkpoint(
            Path(path),
            (
                {tower: {p: leaves[p] for p in group}}
                for tower, leaves in ((name, split(flatten(tree))) for name, tree in self.params.items())
                for group in layer_groups(leaves)
            ),
            metadata=CheckpointMetadata(
                family=self.family.name,
                configs=self.config,
                provenance=self.provenance,
                zero_negative=self.family.zero_negative,
                scheme=scheme_of(self.params),
            ),
            tokenizers=self.tokenizers,
            overwrite=overwrite,
        )

    def _check_arguments(self, max_sequence_length: int | None, **prompts: str | Sequence[str] | None) -> None:
        # Of the whole family: a prompt for a tower that was left out is ignored, as in diffusers.
        taken = {tower.prompt for tower in FAMILIES.get(self.family.name, self.family).towers}
        for name, value in prompts.items():
            if value is not None and name.removeprefix("negative_") not in taken:
                raise ClipJaxError(f"{self.family.name} takes no {name}. Leave it out.")
        if max_sequence_length is None:
            return
        if self.family.max_sequence_length is None:
            raise ClipJaxError(f"{self.family.name} takes no max_sequence_length: it has no T5. Leave it out.")
        if type(max_sequence_length) is not int or not 1 <= max_sequence_length <= _MAX_SEQUENCE_LENGTH:
            raise ClipJaxError(
                f"max_sequence_length must be an int from 1 to {_MAX_SEQUENCE_LENGTH}, found {max_sequence_length!r}."
            )

    def _encode_ids(
        self,
        tower: Tower,
        sides: list[Prompts],
        batch: int,
        max_sequence_length: int | None,
        overflow: Overflow,
    ) -> list[np.ndarray]:
        """Ids [B, L] of each of `sides`, tokenised as one batch; a prompt for all is encoded once."""
        tokenizer = self.tokenizers[tower.name]
        length = self.family.row_length(tower, tokenizer.model_max_length, max_sequence_length)
        ids = tokenizer.encode(
            [text for side in sides for text in side.texts],
            max_length=length,
            overflow=overflow,
            names=[name for side in sides for name in side.names],
        )
        ends = np.cumsum([len(side.texts) for side in sides])[:-1]
        return [np.broadcast_to(rows, (batch, rows.shape[1])).copy() for rows in np.split(ids, ends)]

    def _without_tails(self, tokens: Tokens) -> Tokens:
        sides = [side for side in (tokens.uncond, tokens.cond) if side is not None]
        for tower in self.family.towers:
            if not isinstance(tower.config, ClipTextConfig) or not all(tower.name in side for side in sides):
                continue  # that a tower's ids are missing is for `text_embeddings` to say
            if tower.pooled_only:
                ends = [np.argmax(side[tower.name] == tower.config.eos_token_id, axis=-1) for side in sides]
                length = _bucket(max(int(end.max()) for end in ends) + 1, _LENGTHS)
                sides = [{**side, tower.name: side[tower.name][:, :length]} for side in sides]
        *uncond, cond = sides
        return dataclasses.replace(tokens, cond=cond, uncond=uncond[0] if uncond else None)


def _by_argument(prefix: str, first: str | Sequence[str], *others: str | Sequence[str] | None) -> dict[str, Prompts]:
    """Argument name -> prompts; others that are absent or empty are the first, as in diffusers."""
    prompts = {f"{prefix}prompt": Prompts.of(first, f"{prefix}prompt")}
    for i, other in enumerate(others, start=2):
        name = f"{prefix}prompt_{i}"
        if other is None or (isinstance(other, str) and not other):
            prompts[name] = prompts[f"{prefix}prompt"]
        else:
            prompts[name] = Prompts.of(other, name)
    return prompts


def _bucket(size: int, buckets: tuple[int, ...]) -> int:
    return next((bucket for bucket in buckets if bucket >= size), -(-size // buckets[-1]) * buckets[-1])


def _pad_rows(ids: np.ndarray | jax.Array, rows: int) -> np.ndarray:
    return np.pad(ids, [(0, rows - len(ids)), (0, 0)], mode="edge")


@functools.partial(jax.jit, static_argnames="batch")
def _cut_rows(embeddings: TextEmbeddings, batch: int) -> TextEmbeddings:
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
