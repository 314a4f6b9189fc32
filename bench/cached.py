"""Times calls of an encoder whose cache has nothing, a part, or all of what they want, interleaved in one process."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from bench.environments import run_helper
from bench.stats import pairwise_ratio, summary
from bench.workshop import Workshop

_WORKER = "bench.workers.cache_clip_jax"


def run_cache(shop: Workshop, presets: Sequence[str], worker: str = _WORKER) -> dict[str, Any]:
    """A case for each preset; its contenders are kinds of calls, and the first is what the others are held against.

    Raises:
        WorkerError: The process failed.
    """
    cases, contenders = [], {}
    for preset in tqdm(presets, desc="cache", unit="preset", disable=None, leave=False, file=sys.stderr):
        printed = run_helper(shop.pythons["clip_jax"], worker, shop.checkpoint(preset), shop.repeats)
        found = json.loads(printed.splitlines()[-1])
        (first, unknown), *known = found["ms"].items()
        cases.append(
            {
                "preset": preset,
                "precision": "float32",
                "batch": 1,
                "other_cores": found["other_cores"],
                "contenders": {name: {"ms": {**summary(ms), "samples": ms}} for name, ms in found["ms"].items()},
                "ratios": {first: {name: pairwise_ratio(ms, unknown) for name, ms in known}},
                "left_out": {},
            }
        )
        contenders = dict.fromkeys(found["ms"], found["about"])
    return {"contenders": contenders, "left_out": {}, "cases": cases}
