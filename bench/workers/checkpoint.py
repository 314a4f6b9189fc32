"""Writes the random weights that all contenders of a case share: `python -m bench.workers.checkpoint PRESET FOLDER`.

For a family `converted/`, as `clip_jax.load` reads it, and `diffusers/`, as its peers do. For a model of `compat` a
folder of transformers with `model.safetensors` for those who have torch, and `flax_model.msgpack` for the old classes.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import flax.serialization
import jax
import numpy as np

import clip_jax
from bench.presets import COMPAT, LARGE_PRESETS
from clip_jax import compat
from clip_jax.convert import export


def main(preset: str, folder: Path) -> None:
    jax.config.update("jax_platforms", "cpu")  # an accelerator has nothing to do here
    if preset in COMPAT:
        model = getattr(compat, COMPAT[preset].flax_class)(COMPAT[preset].config)
        model.save_pretrained(folder)
        params = jax.tree.map(np.asarray, model.params)
        (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(params))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the weights are random
        encoder = clip_jax.load(f"random:{preset}", dtype="bfloat16" if preset in LARGE_PRESETS else "float32")
    encoder.save(folder / "converted")
    export(folder / "converted", folder / "diffusers")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
