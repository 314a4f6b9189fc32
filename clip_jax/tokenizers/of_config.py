"""Which tokenizer goes with an architecture, and whether one does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.errors import CheckpointError, ClipJaxError
from clip_jax.tokenizers.clip import ClipTokenizer
from clip_jax.tokenizers.files import expanded
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
    """Refuses ids beyond the embedding, which has no row for them.

    Raises:
        CheckpointError: The tokenizer has more tokens than the embedding has rows.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer of {tower} has {tokenizer.vocab_size} tokens, its embedding {config.vocab_size} rows. "
            f"Expected no more tokens than rows; use the tokenizer that belongs to these weights."
        )


def choose_tokenizers(
    configs: Mapping[str, TowerConfig],
    own: Callable[[str], RowTokenizer],
    given: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None,
) -> dict[str, RowTokenizer]:
    """Tower name -> its own tokenizer, or the one of the folder that was given for it.

    Args:
        configs: Tower name -> architecture.
        own: The tokenizer that a source has for a tower.
        given: A folder, where there is one tower, or tower name -> folder.

    Raises:
        ClipJaxError: It cannot be told which tower a folder was given for.
        CheckpointError: A tokenizer that cannot be read, or with more tokens than the embedding has rows.
    """
    if given is None:
        folders: Mapping[str, str | os.PathLike[str]] = {}
    elif isinstance(given, Mapping):
        folders = given
    elif len(configs) == 1:
        folders = dict.fromkeys(configs, given)
    else:
        raise ClipJaxError(f"There are the towers {', '.join(configs)}; pass tokenizer={{tower: folder}}.")
    unknown = folders.keys() - configs.keys()
    if unknown:
        raise ClipJaxError(f"tokenizer names {', '.join(sorted(unknown))}; the towers are {', '.join(configs)}.")
    tokenizers = {}
    for name, config in configs.items():
        folder = folders.get(name)
        tokenizers[name] = own(name) if folder is None else read_tokenizer(config, expanded(folder))
        check_vocabulary(tokenizers[name], config, name)
    return tokenizers
