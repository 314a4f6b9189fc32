"""Tokenizers: prompts in, padded token ids out. Host side only; nothing here imports jax."""

from clip_jax.tokenizers.clip import ClipTokenizer as ClipTokenizer
from clip_jax.tokenizers.clip import TokenReport as TokenReport
