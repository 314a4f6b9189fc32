"""Prompts of a family -> token ids of every tower, on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from clip_jax.errors import ClipJaxError
from clip_jax.families import FAMILIES, Family
from clip_jax.prompts import Prompts, by_argument
from clip_jax.structs import Tokens
from clip_jax.tokenizers import Overflow, RowTokenizer

# The limit of diffusers' SD 3 and FLUX pipelines (`check_inputs`).
_MAX_SEQUENCE_LENGTH = 512

_Given = str | Sequence[str]


def tokenize(
    family: Family,
    tokenizers: Mapping[str, RowTokenizer],
    prompts: tuple[_Given, _Given | None, _Given | None],
    negative_prompts: tuple[_Given | None, _Given | None, _Given | None],
    *,
    guidance: bool | None,
    max_sequence_length: int | None,
    overflow: Overflow,
) -> Tokens:
    """Ids, int32 [B, L] per tower.

    Args:
        family: Whose prompts they are.
        tokenizers: Tower name -> tokenizer.
        prompts: `prompt`, `prompt_2` and `prompt_3` of `TextEncoder.__call__`.
        negative_prompts: The negative ones, likewise.
        guidance: As there, and so are the others.
        max_sequence_length: L of T5.
        overflow: What to do with a prompt that does not fit.

    Raises:
        PromptTooLongError: A prompt does not fit.
        ClipJaxError: Not a str, lists of different lengths, or arguments that the family does not take.
    """
    check_max_sequence_length(family, max_sequence_length)
    prompt, *others = prompts
    negative_prompt, *negative_others = negative_prompts
    _check_takes(family, "", others)
    _check_takes(family, "negative_", negative_others)
    guidance = family.guidance if guidance is None else guidance
    if isinstance(guidance, np.bool_):  # as `guidance_scale > 1` may be
        guidance = bool(guidance)
    if not isinstance(guidance, bool):
        raise ClipJaxError(f"guidance must be True, False or None, found {guidance!r}.")
    zero_uncond = guidance and family.zero_negative and negative_prompt is None
    given = by_argument("", prompt, *others)
    batch = len(given["prompt"].texts)
    if batch == 0:
        raise ClipJaxError("prompt is an empty list; expected at least one prompt.")
    if guidance and not zero_uncond:
        given |= by_argument("negative_", "" if negative_prompt is None else negative_prompt, *negative_others)
    cond, uncond = {}, {}
    for tower in family.towers:
        arguments = [name for name in (f"negative_{tower.prompt}", tower.prompt) if name in given]
        sides = [given[name].check(batch) for name in arguments]
        tokenizer = tokenizers[tower.name]
        length = family.row_length(tower, tokenizer.model_max_length, max_sequence_length)
        *negative, positive = _ids(tokenizer, sides, batch, length, overflow)
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


def check_max_sequence_length(family: Family, length: int | None) -> None:
    """Refuses a length that the family does not take.

    Raises:
        ClipJaxError: It has no T5, or this is no length for one.
    """
    if length is None:
        return
    if family.max_sequence_length is None:
        raise ClipJaxError(f"{family.name} takes no max_sequence_length: it has no T5. Leave it out.")
    if type(length) is not int or not 1 <= length <= _MAX_SEQUENCE_LENGTH:
        raise ClipJaxError(f"max_sequence_length must be an int from 1 to {_MAX_SEQUENCE_LENGTH}, found {length!r}.")


def _check_takes(family: Family, prefix: str, others: Sequence[_Given | None]) -> None:
    # Of the whole family: a prompt for a tower that was left out is ignored, as in diffusers.
    taken = {tower.prompt for tower in FAMILIES.get(family.name, family).towers}
    for number, value in enumerate(others, start=2):
        if value is not None and f"prompt_{number}" not in taken:
            raise ClipJaxError(f"{family.name} takes no {prefix}prompt_{number}. Leave it out.")


def _ids(
    tokenizer: RowTokenizer, sides: Sequence[Prompts], batch: int, length: int, overflow: Overflow
) -> list[np.ndarray]:
    """Ids [B, L] of each of `sides`, tokenised as one batch; a prompt for all is encoded once."""
    ids = tokenizer.encode(
        [text for side in sides for text in side.texts],
        max_length=length,
        overflow=overflow,
        names=[name for side in sides for name in side.names],
    )
    ends = np.cumsum([len(side.texts) for side in sides])[:-1]
    return [np.broadcast_to(rows, (batch, rows.shape[1])).copy() for rows in np.split(ids, ends)]
