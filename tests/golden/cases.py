"""What the golden files of the CLIP towers hold: shared by their one writer and by the test."""

import dataclasses

from tests.checkpoints import TINY, TINY_H

PROMPTS = ["a cat sitting on a windowsill!", "", "Ünïcode 猫咪 🐈 don't stop, 100%", "blurry, low quality"]

#: Name -> architecture, pad token, seed of `tests.checkpoints.hf_state`.
CASES = {
    "clip_l": (TINY, "<|endoftext|>", 11),
    "clip_h": (dataclasses.replace(TINY_H, num_hidden_layers=23), "!", 12),
    "clip_g": (dataclasses.replace(TINY_H, num_hidden_layers=4, projection_dim=24), "!", 13),
}

#: Rows and columns of [B, 77, D] that are kept.
SLICE = (slice(None), slice(0, 77, 6), slice(0, None, 3))

#: How every family is called; those that do not take an argument are called without it.
FAMILY_CALL = {
    "prompt": ["a cat sitting on a windowsill!", "two dogs, 35mm"],
    "negative_prompt": ["blurry!", ""],
    "prompt_2": ["a cat", "in the style of a woodcut"],
    "prompt_3": ["a third prompt", "for T5"],
    "guidance": True,
    "max_sequence_length": 64,
}

#: Rows and columns of each field that are kept.
FAMILY_SLICE = {
    "prompt_embeds": (slice(None), slice(0, None, 12), slice(0, None, 5)),
    "pooled_prompt_embeds": (slice(None), slice(None)),
}

#: Which of the calls of `tests/oracle/cases.py` is kept, and which rows and columns of its outputs [B, L, D] or [B, D].
COMPAT_CALL = "mask"
COMPAT_SLICE = (slice(None), slice(0, None, 3), slice(0, None, 5))
