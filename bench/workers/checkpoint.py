"""Writes the random weights that all contenders of a case share: `python -m bench.workers.checkpoint PRESET FOLDER`.

For a family `converted/`, as `clip_jax.load` reads it, and `diffusers/`, as its peers do. For a model of `compat` a
folder of transformers with `model.safetensors` for those who have torch, and `flax_model.msgpack` for the old classes.
"""

from __future__ import annotations

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

import clip_jax
from bench.host import cores
from bench.presets import COMPAT, LARGE_PRESETS
from clip_jax import FAMILIES, Family, TextEncoder, compat
from clip_jax.convert import export
from clip_jax.params.random import random_tensor
from clip_jax.params.shapes import param_shapes, unflatten


def main(preset: str, folder: Path) -> None:
    if preset in COMPAT:
        model = getattr(compat, COMPAT[preset].flax_class)(COMPAT[preset].config)
        model.save_pretrained(folder)
        params = jax.tree.map(np.asarray, model.params)
        (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(params))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the weights are random
        encoder = _drawn_at_once(FAMILIES[preset]) if preset in LARGE_PRESETS else clip_jax.load(f"random:{preset}")
    encoder.save(folder / "converted")
    export(folder / "converted", folder / "diffusers")


def _drawn_at_once(family: Family) -> TextEncoder:
    """What `load("random:...", dtype="bfloat16")` makes, by all cores."""
    paths = [(tower.name, path, shape) for tower in family.towers for path, shape in param_shapes(tower.config).items()]
    with ThreadPoolExecutor(cores()) as pool:
        drawn = pool.map(lambda one: random_tensor(f"{one[0]}/{one[1]}", one[2]).astype(jnp.bfloat16), paths)
        flat: dict[str, dict[str, np.ndarray]] = {tower.name: {} for tower in family.towers}
        for (tower, path, _), array in zip(paths, drawn, strict=True):
            flat[tower][path] = array
    params = {tower: unflatten(leaves) for tower, leaves in flat.items()}
    return TextEncoder(family, params, clip_jax.load_tokenizers(f"random:{family.name}"), dtype="bfloat16")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
