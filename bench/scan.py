"""Blocks one after the other, as the models have them, beside `lax.scan` over stacked params: `python -m bench.scan`.

Both are the same modules on the same random weights, from ids [2, 77] to the last hidden state. Times of one process,
interleaved; a first call is tracing, compiling and running.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import clip_jax
from bench.host import cpu_model, stamp, tell_noise, versions, watch_others
from bench.presets import clip_ids
from bench.stats import pairwise_ratio, summary
from clip_jax.config import ClipTextConfig
from clip_jax.models import ClipTextModel
from clip_jax.models.clip_text import ClipEncoderLayer

#: Family -> the tower that is taken of it.
_TOWERS = {"sd15": "clip_l", "sd21": "clip_h"}
_DTYPES = ("float32", "bfloat16")
_ROUNDS, _WARMUP = 15, 2

_Program = Callable[[Mapping[str, Any], jax.Array], jax.Array]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scan", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/scan.json"))
    arguments = parser.parse_args()
    cases = [(family, dtype) for family in _TOWERS for dtype in _DTYPES]
    result = {
        **stamp(),
        "device": cpu_model() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        "versions": versions("jax", "jaxlib", "flax"),
        "rounds": _ROUNDS,
        "scan": [_measure(*case) for case in tqdm(cases, disable=None, desc="Towers")],
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for case in result["scan"]:
        tell_noise(case["other_cores"], f"{case['family']} {case['dtype']}")


def programs(config: ClipTextConfig, dtype: str) -> dict[str, _Program]:
    """Both ways, from the params of a tower and ids [B, L] to [B, L, D]; that of the scan takes stacked blocks."""
    model = ClipTextModel(config, dtype)
    block = ClipEncoderLayer(config, dtype)

    def unrolled(params: Mapping[str, Any], ids: jax.Array) -> jax.Array:
        return model.apply({"params": params}, ids).last_hidden_state

    def scanned(params: Mapping[str, Any], ids: jax.Array) -> jax.Array:
        bound = model.bind({"params": params})
        x = bound.text_model.embeddings(ids, jnp.arange(ids.shape[1])[None])

        def step(x: jax.Array, params: Mapping[str, Any]) -> tuple[jax.Array, None]:
            return block.apply({"params": params}, x, None)[0], None

        x, _ = jax.lax.scan(step, x, params["text_model"]["encoder"]["stacked"])
        return bound.final_norm(x)

    return {"unrolled": unrolled, "scan": scanned}


def stacked(params: Mapping[str, Any]) -> dict[str, Any]:
    """Params of a tower with its blocks stacked, for the scan."""
    text_model = params["text_model"]
    layers = text_model["encoder"]["layers"]
    blocks = [layers[str(i)] for i in range(len(layers))]
    encoder = {"stacked": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
    return {**params, "text_model": {**text_model, "encoder": encoder}}


def _measure(family: str, dtype: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the weights are random
        encoder = clip_jax.load(f"random:{family}", dtype=dtype, progress=False)
    config, params = encoder.config[_TOWERS[family]], encoder.params[_TOWERS[family]]
    # jax's default is less than float32 on accelerators. No difference on a CPU.
    whole = dtype == "float32" and jax.default_backend() != "cpu"
    with jax.default_matmul_precision("highest" if whole else None):
        times = _times(config, params, dtype)
    return {"family": family, "dtype": dtype, "layers": config.num_hidden_layers, **times}


def _times(config: ClipTextConfig, params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Of both ways, interleaved, on the params of a tower; and how far what they compute is apart."""
    ids = jnp.asarray(clip_ids(2))
    given = {"unrolled": params, "scan": jax.block_until_ready(stacked(params))}
    compiled = {name: jax.jit(program) for name, program in programs(config, dtype).items()}
    other_cores = watch_others()
    first_s, out = {}, {}
    for name, program in compiled.items():
        begin = time.perf_counter()
        out[name] = jax.block_until_ready(program(given[name], ids))
        first_s[name] = round(time.perf_counter() - begin, 3)
    difference = np.abs(np.float32(out["scan"]) - np.float32(out["unrolled"])).max()
    ms: dict[str, list[float]] = {name: [] for name in compiled}
    for turn in range(_WARMUP + _ROUNDS):
        for name, program in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(given[name], ids))
            if turn >= _WARMUP:
                ms[name].append(round(1e3 * (time.perf_counter() - begin), 3))
    return {
        "other_cores": other_cores(),
        "max_difference": float(difference),
        "first_call_s": first_s,
        "ms": {name: {**summary(times), "samples": times} for name, times in ms.items()},
        "ratio": pairwise_ratio(ms["unrolled"], ms["scan"]),
    }


if __name__ == "__main__":
    main()
