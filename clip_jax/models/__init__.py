"""Flax Linen modules: token ids -> hidden states. No files, no checkpoint keys, no families."""

import jax.numpy as jnp
import jax.typing

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.models.clip_text import ClipTextModel as ClipTextModel
from clip_jax.models.clip_text import ClipTextOutput as ClipTextOutput
from clip_jax.models.functional import Attention as Attention
from clip_jax.models.functional import check_attention as check_attention
from clip_jax.models.repeated import intercepted as intercepted
from clip_jax.models.t5 import T5Encoder as T5Encoder
from clip_jax.models.t5 import T5Output as T5Output


def model_of(
    config: TowerConfig, dtype: jax.typing.DTypeLike = jnp.float32, attention: Attention = "xla"
) -> ClipTextModel | T5Encoder:
    """The module of an architecture, computing in `dtype`."""
    if isinstance(config, ClipTextConfig):
        return ClipTextModel(config, dtype, attention=attention)
    return T5Encoder(config, dtype, attention=attention)
