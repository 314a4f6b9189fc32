"""FLUX's text encoders for maxdiffusion, without torch: stands in for its module around torchax.

The two functions have the names, arguments and results of those in AI-Hypercomputer/maxdiffusion PR 483
(`models/flux/text_encoders/torchax_text_encoders.py`), so that only the import changes there.
"""

from typing import Any

from transformers import AutoTokenizer, CLIPTokenizer

from clip_jax.compat import CLIPTextEncoder, T5TextEncoder


def load_clip_encoder_and_tokenizer(config: Any) -> tuple[CLIPTextEncoder, CLIPTokenizer]:
    """CLIP-L: ids [B, 77] -> the pooled row [B, 768], in `config.weights_dtype`."""
    source = config.clip_model_name_or_path
    encoder = CLIPTextEncoder.from_pretrained(
        source, config.weights_dtype, subfolder=_subfolder(config, "clip_model_subfolder")
    )
    tokenizer = CLIPTokenizer.from_pretrained(
        source, subfolder=_subfolder(config, "clip_tokenizer_subfolder"), model_max_length=77
    )
    return encoder, tokenizer


def load_t5_encoder_and_tokenizer(config: Any) -> tuple[T5TextEncoder, Any]:
    """T5-XXL: ids [B, L] -> all rows [B, L, 4096], in `config.weights_dtype`."""
    source = config.t5xxl_model_name_or_path
    encoder = T5TextEncoder.from_pretrained(
        source, config.weights_dtype, subfolder=_subfolder(config, "t5xxl_model_subfolder")
    )
    tokenizer = AutoTokenizer.from_pretrained(
        source,
        subfolder=_subfolder(config, "t5xxl_tokenizer_subfolder"),
        model_max_length=config.max_sequence_length,
    )
    return encoder, tokenizer


def _subfolder(config: Any, key: str) -> str:
    """A subfolder that older configs do not name; maxdiffusion's config raises ValueError for a key it lacks."""
    try:
        return getattr(config, key) or ""
    except (AttributeError, KeyError, ValueError):
        return ""
