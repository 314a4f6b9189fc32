"""Tokenizers: prompts in, padded token ids out. Host side only; nothing here imports jax."""

from clip_jax.tokenizers.clip import ClipTokenizer as ClipTokenizer
from clip_jax.tokenizers.of_config import check_vocabulary as check_vocabulary
from clip_jax.tokenizers.of_config import choose_tokenizers as choose_tokenizers
from clip_jax.tokenizers.of_config import read_tokenizer as read_tokenizer
from clip_jax.tokenizers.rows import Overflow as Overflow
from clip_jax.tokenizers.rows import RowTokenizer as RowTokenizer
from clip_jax.tokenizers.rows import TokenReport as TokenReport
from clip_jax.tokenizers.t5 import T5Tokenizer as T5Tokenizer
