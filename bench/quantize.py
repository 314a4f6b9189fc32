"""Sizes and errors of quantised params at full size, held against float32: `python -m bench.quantize`.

Every family is run with seeded random weights, on 24 prompts in float32, and once more for each scheme. Errors are
those of `prompt_embeds`, token by token. No checkpoint of a real model is needed, and none is spoken for: activations
of trained ones have outliers that random ones lack. Takes ten minutes and 8 GB of memory on two cores; the families
with T5 are left out unless they are named, and take 40 GB.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import clip_jax
from bench.host import stamp
from clip_jax.params.quantize import SCHEMES, split
from clip_jax.params.shapes import TensorSpec, flatten

_PROMPTS = [
    f"{who} {where}, {how}"
    for who in ("a red cat", "two astronauts", "an old castle in the fog", "portrait of a woman")
    for where in ("riding a horse", "by the sea at night")
    for how in ("oil on canvas", "4k photo, bokeh", "")
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quantize", description=__doc__)
    parser.add_argument("--families", nargs="+", default=["sd15", "sd21", "sdxl"], choices=list(clip_jax.FAMILIES))
    parser.add_argument("--out", type=Path, default=Path("bench/results/quantize.json"))
    arguments = parser.parse_args()
    result = {
        **stamp(),
        "machine": platform.machine(),
        "device": jax.devices()[0].platform,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "flax", "qwix")},
        "prompts": len(_PROMPTS),
        "quantized": {name: _family(name) for name in tqdm(arguments.families, disable=None, desc="Families")},
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def _family(name: str) -> dict[str, Any]:
    """Scheme -> bytes and errors; one copy of the params in memory at a time."""
    nbytes, expected = _encoded(name, None)
    found: dict[str, Any] = {"float32": {"bytes": nbytes}}
    for scheme in SCHEMES:
        nbytes, rows = _encoded(name, scheme)
        found[scheme] = {"bytes": nbytes, **_errors(rows, expected)}
    return found


def _encoded(name: str, scheme: str | None) -> tuple[int, np.ndarray]:
    """Bytes of the params, int4 packed, and the embeddings [24, L, D]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the weights are random
        encoder = clip_jax.load(f"random:{name}", quantize=scheme)
    leaves = [leaf for tree in encoder.params.values() for leaf in split(flatten(tree)).values()]
    nbytes = sum(TensorSpec(leaf.shape, np.dtype(leaf.dtype)).nbytes for leaf in leaves)
    return nbytes, np.asarray(encoder(_PROMPTS, guidance=False).prompt_embeds, np.float64)


def _errors(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Cosine of every token's row with that of float32, and the norm of the error by that of all rows."""
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
    cosine = (found * expected).sum(axis=-1) / norms
    return {
        "tokens": cosine.size,
        "tokens_below_0.999": int((cosine < 0.999).sum()),
        "min_cosine": float(cosine.min()),
        "mean_cosine": float(cosine.mean()),
        "relative_error": float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
    }


if __name__ == "__main__":
    main()
