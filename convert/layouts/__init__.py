"""The layouts that checkpoints come in, each turned into the names of HF transformers; tables of keys, no maths."""

from clip_jax.convert.layouts.encoders import (
    Encoder,
    Projection,
    check_projection,
    find_encoders,
    one_encoder,
    what_else,
)

__all__ = ["Encoder", "Projection", "check_projection", "find_encoders", "one_encoder", "what_else"]
