"""What is encoded: sizes of ids, names of outputs, and the models of `compat`. Needs nothing but Python."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

PRESETS = ("sd15", "sd21", "sdxl")
#: Those that are encoded where asked for: T5-XXL takes minutes and 20 GB on a CPU.
LARGE_PRESETS = ("flux",)
PRECISIONS = ("float32", "bfloat16", "int8")
LENGTH, T5_LENGTH = 77, 512
_START, _END = 49406, 49407


def outputs_of(family: str) -> tuple[str, ...]:
    """Names of what comes out of a family's text encoders, in order."""
    return ("prompt_embeds", "pooled_prompt_embeds") if family in ("sdxl", "flux") else ("prompt_embeds",)


def rows_of(preset: str, batch: int) -> int:
    """Rows of ids of a batch: guidance pairs have two, FLUX's prompts no negative, and models of `compat` are rows."""
    return 2 * batch if preset in PRESETS else batch


@dataclasses.dataclass(frozen=True)
class CompatModel:
    """A model that the drop-in classes are measured on.

    Attributes:
        flax_class: Its class, in transformers 4 and in `clip_jax.compat`.
        torch_class: Its class in transformers with torch.
        config: As in `config.json`.
        length: Of its ids, of which there is one row.
        output: What is taken of what it returns.
    """

    flax_class: str
    torch_class: str
    config: dict[str, Any]
    length: int
    output: str


COMPAT = {
    "clip_l": CompatModel(
        flax_class="FlaxCLIPTextModel",
        torch_class="CLIPTextModel",
        config={
            "model_type": "clip_text_model",
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": LENGTH,
            "hidden_act": "quick_gelu",
            "projection_dim": 768,
            "bos_token_id": _START,
            "eos_token_id": _END,
        },
        length=LENGTH,
        output="pooler_output",
    ),
    "t5_large": CompatModel(
        flax_class="FlaxT5EncoderModel",
        torch_class="T5EncoderModel",
        config={
            "model_type": "t5",
            "vocab_size": 32128,
            "d_model": 1024,
            "d_kv": 64,
            "d_ff": 2816,
            "num_layers": 24,
            "num_heads": 16,
            "feed_forward_proj": "gated-gelu",
        },
        length=256,
        output="last_hidden_state",
    ),
}


def clip_ids(rows: int, length: int = LENGTH) -> list[list[int]]:
    """Token ids of random texts that fill CLIP's rows; always the same."""
    rng = random.Random(0)
    return [[_START, *(rng.randrange(_START) for _ in range(length - 2)), _END] for _ in range(rows)]


def t5_ids(rows: int, length: int = T5_LENGTH) -> list[list[int]]:
    """Token ids of random texts that fill T5's rows; always the same."""
    rng = random.Random(0)
    return [[*(rng.randrange(3, 32000) for _ in range(length - 1)), 1] for _ in range(rows)]


def compat_ids(preset: str) -> list[list[int]]:
    """Token ids [1, L] of a random text; always the same."""
    model = COMPAT[preset]
    if model.flax_class == "FlaxCLIPTextModel":
        return clip_ids(1, model.length)
    return t5_ids(1, model.length)
