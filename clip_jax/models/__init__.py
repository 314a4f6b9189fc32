"""Flax Linen modules: token ids -> hidden states. No files, no checkpoint keys, no families."""

from clip_jax.models.clip_text import ClipTextModel as ClipTextModel
from clip_jax.models.clip_text import ClipTextOutput as ClipTextOutput
