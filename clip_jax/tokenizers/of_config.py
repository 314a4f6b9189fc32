"""Which tokenizer goes with an architecture, and whether one does."""

from __future__ import annotations

from pathlib import Path

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.errors import CheckpointError
from clip_jax.tokenizers.clip import ClipTokenizer
from clip_jax.tokenizers.rows import RowTokenizer
from clip_jax.tokenizers.t5 import T5Tokenizer


def read_tokenizer(config: TowerConfig, folder: Path) -> RowTokenizer:
    """Reads the tokenizer folder of a text encoder.

    Raises:
        CheckpointError: Files are missing, unreadable, or of another kind of tokenizer.
    """
    kind = ClipTokenizer if isinstance(config, ClipTextConfig) else T5Tokenizer
    return kind.from_folder(folder)


def check_vocabulary(tokenizer: RowTokenizer, config: TowerConfig, tower: str) -> None:
    """Refuses ids beyond the embedding: jax would clamp them to its last row without a word.

    Raises:
        CheckpointError: The tokenizer has more tokens than the embedding has rows.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer of {tower} has {tokenizer.vocab_size} tokens, its embedding {config.vocab_size} rows. "
            f"Expected no more tokens than rows; use the tokenizer that belongs to these weights."
        )
