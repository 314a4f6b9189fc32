"""Floating-point operations of the compiled program, beside those of running every tower whole.

`python -m bench.flops` compiles all families at full size, without weights, and asks XLA's cost analysis. One prompt of
up to 16 tokens, without a negative prompt; with guidance where the family has it. Whole towers are every block of every
tower, on the rows that diffusers runs.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from bench.families import abstract_params
from bench.host import stamp
from clip_jax import FAMILIES, Family, Tokens, text_embeddings
from clip_jax.models import model_of

_SHORT = 16  # the length that a prompt of 9 to 16 tokens is cut to where only its pooled row is used


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.flops", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/flops.json"))
    arguments = parser.parse_args()
    families = {
        name: {"program": _program(family), "towers": _towers(family)}
        for name, family in tqdm(FAMILIES.items(), disable=None, desc="Compiling")
    }
    result = {
        **stamp(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "flax")},
        "flops": families,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def _program(family: Family) -> float:
    """Of one call as `TextEncoder` makes it."""
    lengths = {t.name: _SHORT if t.pooled_only else family.row_length(t, 77) for t in family.towers}
    ids = {name: _ids(1, length) for name, length in lengths.items()}
    encoded = _encodes_negative(family)
    tokens = Tokens(cond=ids, uncond=ids if encoded else None, zero_uncond=family.guidance and not encoded)
    return flops(lambda p, t: text_embeddings(p, t, family=family), abstract_params(family), tokens)


def _towers(family: Family) -> float:
    """Of every block of every tower, on the rows that diffusers runs."""
    params = abstract_params(family)
    rows = 2 if _encodes_negative(family) else 1
    return sum(
        flops(
            lambda p, ids, tower=tower: model_of(tower.config).apply({"params": p}, ids).last_hidden_state,
            params[tower.name],
            _ids(rows, family.row_length(tower, 77)),
        )
        for tower in family.towers
    )


def _encodes_negative(family: Family) -> bool:
    """Whether no negative prompt is encoded as the empty one, by diffusers and by us, rather than being zeros."""
    return family.guidance and not family.zero_negative


def _ids(rows: int, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, length), np.int32)


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Of a compiled function, by XLA's cost analysis; arguments may be shapes."""
    return float(jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"])


if __name__ == "__main__":
    main()
