"""Which tokenizer an architecture goes with."""

from __future__ import annotations

from pathlib import Path

from clip_jax.config import ClipTextConfig, TowerConfig
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
