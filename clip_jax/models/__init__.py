"""Flax Linen modules: token ids -> hidden states. No files, no checkpoint keys, no families."""

import jax.numpy as jnp
import jax.typing

# Not public, but Flax has no other way to tell; tests fail if it goes.
from flax.linen.module import _global_interceptor_stack as _interceptors

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.models.clip_text import ClipTextModel as ClipTextModel
from clip_jax.models.clip_text import ClipTextOutput as ClipTextOutput
from clip_jax.models.t5 import T5Encoder as T5Encoder
from clip_jax.models.t5 import T5Output as T5Output


def model_of(config: TowerConfig, dtype: jax.typing.DTypeLike = jnp.float32) -> ClipTextModel | T5Encoder:
    """The module of an architecture, computing in `dtype`."""
    return ClipTextModel(config, dtype) if isinstance(config, ClipTextConfig) else T5Encoder(config, dtype)


def intercepted() -> bool:
    """Whether `nn.intercept_methods` is in force (a LoRA).

    jit takes no notice of it: a function that was compiled without is run as it was. So what is jitted here is run
    without jit then.
    """
    return len(_interceptors) > 0
