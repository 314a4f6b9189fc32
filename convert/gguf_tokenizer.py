"""T5's tokenizer from the metadata of a GGUF file, where llama.cpp keeps it.

Reference: llama.cpp `convert_hf_to_gguf.py` (`T5EncoderModel.set_vocab`), `llama-vocab.cpp` (`LLAMA_VOCAB_TYPE_UGM`).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.convert.readers.tensor_file import damaged, short
from clip_jax.errors import CheckpointError
from clip_jax.tokenizers.t5 import MAX_LENGTH, SPECIAL, T5Tokenizer, build_pipeline

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # types of tokens in llama.cpp


def gguf_tokenizer(metadata: Mapping[str, Any], path: Path) -> T5Tokenizer:
    """Builds the tokenizer of `tokenizer.ggml.*`.

    The unused tokens at its end, which only fill up the rows of the embedding, are left out.

    Args:
        metadata: Of the file.
        path: The file, for messages.

    Raises:
        CheckpointError: Another kind of tokenizer, or damaged.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model != "t5":
        raise CheckpointError(
            f"{path}: expected the tokenizer of a T5, found {short(model)}. Pass the folder of a T5 tokenizer."
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    scores, kinds = (_numbers(metadata.get(f"tokenizer.ggml.{name}")) for name in ("scores", "token_type"))
    texts = tokens if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens) else []
    if not len(texts) == len(scores) == len(kinds) or tokens != texts or not np.isfinite(scores).all():
        raise damaged(path, "expected a text, a score and a type of every token")
    while kinds.size and kinds[-1] == _UNUSED:
        kinds = kinds[:-1]
    vocabulary = [[token, float(score)] for token, score in zip(texts[: kinds.size], scores, strict=False)]
    added = [
        {"id": i, "content": texts[i], "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i in np.flatnonzero(np.isin(kinds, (_UNKNOWN, _CONTROL, _USER_DEFINED))).tolist()
    ]
    charsmap = _numbers(metadata.get("tokenizer.ggml.precompiled_charsmap")).astype(np.uint8)
    normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap.tobytes()).decode()}
    whole = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer if charsmap.size else None,
        "model": {
            "type": "Unigram",
            "unk_id": metadata.get("tokenizer.ggml.unknown_token_id", 2),
            "vocab": vocabulary,
            "byte_fallback": False,
        },
    }
    return T5Tokenizer(build_pipeline(whole, SPECIAL, path), SPECIAL, MAX_LENGTH)


def _numbers(found: Any) -> np.ndarray:
    """An array of numbers of the metadata; empty if it is none."""
    is_numbers = isinstance(found, np.ndarray) and found.ndim == 1 and found.dtype.kind in "iufb"
    return found if is_numbers else np.empty(0, np.float32)
