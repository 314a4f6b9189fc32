"""Texts to their pooled rows, in buckets of lengths and whole: `python -m bench.features`.

Both are `FlaxCLIPTextModelWithProjection` on the same random weights and the same ids of random captions, on the host:
`get_text_features`, which cuts rows after the end of their text, and calls for `text_embeds` of as many texts at once.
Times of one process, interleaved; programs are compiled before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench.host import ROOT, slug, stamp, tell_noise, versions, watch_others
from bench.presets import LENGTH, clip_ids
from bench.stats import pairwise_ratio, summary
from bench.workers.about import device_facts
from clip_jax import ClipTextConfig
from clip_jax.compat import FlaxCLIPTextModelWithProjection
from clip_jax.compat.features import BATCH_SIZE

_L = dataclasses.replace(ClipTextConfig.sd15(), projection_dim=768)
#: The text encoders of OpenAI's models.
_MODELS = {
    "ViT-B/32": dataclasses.replace(
        _L, hidden_size=512, intermediate_size=2048, num_attention_heads=8, projection_dim=512
    ),
    "ViT-L/14": _L,
}
_DTYPES = ("float32", "bfloat16")
_TEXTS, _ROUNDS, _WARMUP = 256, 9, 1

_Ids = np.ndarray  # [N, 77], int32
_Contender = Callable[[_Ids], jax.Array]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.features", description=__doc__)
    parser.add_argument("--out", type=Path, help="by default bench/results/features-DEVICE.json")
    arguments = parser.parse_args()
    device = device_facts()
    cases = [(model, dtype) for model in _MODELS for dtype in _DTYPES]
    result = {
        **stamp(),
        "platform": device["platform"],
        "device": device["name"],
        "versions": versions("jax", "jaxlib", "flax"),
        "rounds": _ROUNDS,
        "sizes": {"texts": _TEXTS, **summary(sizes())},
        "features": [_measure(*case) for case in tqdm(cases, disable=None, desc="Models")],
    }
    out = arguments.out or ROOT / "bench" / "results" / f"features-{slug(device)}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    for case in result["features"]:
        tell_noise(case["other_cores"], f"{case['model']} {case['dtype']}")


def sizes() -> list[int]:
    """How many tokens each of some random captions has, BOS and EOS included; always the same."""
    rng = random.Random(0)
    return [min(LENGTH, round(rng.lognormvariate(math.log(14), 0.4))) for _ in range(_TEXTS)]


def captions() -> _Ids:
    """Ids of these captions, in no order, each filled up with its last one as CLIP's tokenizer does."""
    rows = np.array(clip_ids(_TEXTS), np.int32)
    for row, size in zip(rows, sizes(), strict=True):
        row[size - 1 :] = row[-1]
    return rows


def contenders(model: FlaxCLIPTextModelWithProjection) -> dict[str, _Contender]:
    """Both ways from ids to [N, P]."""

    def whole(ids: _Ids) -> jax.Array:
        pieces = [ids[begin : begin + BATCH_SIZE] for begin in range(0, len(ids), BATCH_SIZE)]
        return jnp.concatenate([model(piece).text_embeds for piece in pieces])

    return {"in buckets": model.get_text_features, "whole": whole}


def _measure(name: str, dtype: str) -> dict[str, Any]:
    model = FlaxCLIPTextModelWithProjection(_MODELS[name], dtype=dtype)
    model.params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
    # jax's default is less than float32 on accelerators. No difference on a CPU.
    highest = dtype == "float32" and jax.default_backend() != "cpu"
    with jax.default_matmul_precision("highest" if highest else None):
        return {"model": name, "dtype": dtype, **_times(contenders(model))}


def _times(both: dict[str, _Contender]) -> dict[str, Any]:
    """Texts in a second of each, interleaved; and how far what they compute is apart."""
    ids = captions()
    found = {name: np.float32(embed(ids)) for name, embed in both.items()}  # compiles
    error = np.linalg.norm(found["in buckets"] - found["whole"]) / np.linalg.norm(found["whole"])
    seconds: dict[str, list[float]] = {name: [] for name in both}
    other_cores = watch_others()
    for turn in range(_WARMUP + _ROUNDS):
        for name, embed in both.items():
            begin = time.perf_counter()
            jax.block_until_ready(embed(ids))
            if turn >= _WARMUP:
                seconds[name].append(time.perf_counter() - begin)
    per_second = {name: [round(_TEXTS / s, 3) for s in taken] for name, taken in seconds.items()}
    return {
        "other_cores": other_cores(),
        "relative_error": float(f"{error:.3g}"),
        "texts_per_second": {name: {**summary(rates), "samples": rates} for name, rates in per_second.items()},
        "ratio": pairwise_ratio(seconds["in buckets"], seconds["whole"]),
    }


if __name__ == "__main__":
    main()
