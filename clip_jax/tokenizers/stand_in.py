"""A T5 tokenizer for random weights: T5's vocabulary is in no package that this one could take it from."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models

from clip_jax.tokenizers.t5 import MAX_LENGTH, SPECIAL, T5Tokenizer, build_pipeline


def stand_in_t5_tokenizer() -> T5Tokenizer:
    """A token per Latin character, any other unknown, with the special tokens of T5 in their places.

    The ids are not those of T5. With random weights that changes nothing but how many tokens a prompt has.
    """
    characters = [chr(point) for point in range(0x100) if chr(point).isprintable() and not chr(point).isspace()]
    pieces = [(piece, 0.0) for piece in (*SPECIAL.values(), "\u2581", *characters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    pipeline = build_pipeline(json.loads(tokenizer.to_str()), SPECIAL, "the stand-in for T5's tokenizer")
    return T5Tokenizer(pipeline, SPECIAL, MAX_LENGTH)
