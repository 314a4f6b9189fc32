"""What the machine can do at most, as measured: products of square matrices, and copying memory.

`python -m bench.ceilings`; with `sd15:1 sdxl:8 ...` it also counts the operations of that many guidance pairs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.families import abstract_params
from bench.flops import flops
from bench.presets import LENGTH, PRECISIONS, T5_LENGTH
from clip_jax import FAMILIES, ClipTextConfig, Tokens, text_embeddings

_SIZES = {"cpu": (1024, 2048, 4096)}
_LARGE_SIZES = (4096, 8192)  # of an accelerator
_COPY_BYTES = 2**30
_SECONDS = 2.0  # per probe and size
_FEW_SECONDS = 0.5  # of an accelerator, where that is many calls


def matmul_gops(size: int, dtype: Any) -> float:
    """Operations per second of a product of two square matrices, in thousand millions; the best of several."""
    keys = jax.random.split(jax.random.key(0))
    if jnp.issubdtype(dtype, jnp.integer):
        a, b = (jax.random.randint(key, (size, size), -127, 128, dtype) for key in keys)
        kept: Any = jnp.int32
    else:
        a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
        kept = dtype
    precision = "highest" if dtype == jnp.float32 else None
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=kept, precision=precision))
    return 2 * size**3 / _best_seconds(lambda: product(a, b)) / 1e9


def copy_gbps() -> float:
    """Bytes read and written per second while an array is copied, in thousand millions; the best of several."""
    x = jnp.zeros(_COPY_BYTES // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)  # a plain copy may be left out
    return 2 * _COPY_BYTES / _best_seconds(lambda: copy(x)) / 1e9


def pair_flops(family: str, pairs: int) -> float:
    """Operations of our program for guidance pairs (of FLUX prompts) of full length, by XLA's cost analysis."""
    found = FAMILIES[family]
    lengths = {t.name: LENGTH if isinstance(t.config, ClipTextConfig) else T5_LENGTH for t in found.towers}
    ids = {name: jax.ShapeDtypeStruct((pairs, length), np.int32) for name, length in lengths.items()}
    tokens = Tokens(cond=ids, uncond=ids if found.guidance else None)
    with jax.default_device(jax.devices("cpu")[0]):  # a GPU's compiler would try out kernels, for nothing
        return flops(lambda p, t: text_embeddings(p, t, family=found), abstract_params(found), tokens)


def _best_seconds(call: Callable[[], jax.Array]) -> float:
    call().block_until_ready()
    seconds = _SECONDS if jax.default_backend() == "cpu" else _FEW_SECONDS
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        call().block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return best


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ceilings", description=__doc__)
    parser.add_argument("pairs", nargs="*", metavar="FAMILY:PAIRS")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS, help="of the products")
    arguments = parser.parse_args(argv)
    device = jax.devices()[0]
    sizes = _SIZES.get(device.platform, _LARGE_SIZES)
    found: Mapping[str, Any] = {
        "matmul_gops": {
            name: round(max(matmul_gops(size, jnp.dtype(name)) for size in sizes), 1) for name in arguments.precisions
        },
        "copy_gbps": round(copy_gbps(), 1),
        "flops": {
            pair: pair_flops(family, int(count))
            for pair in arguments.pairs
            for family, _, count in [pair.partition(":")]
        },
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
