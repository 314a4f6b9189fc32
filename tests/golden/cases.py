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
