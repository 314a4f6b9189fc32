"""Calls that find nothing, a part, or all in the cache: `python -m bench.workers.cache_clip_jax WEIGHTS REPEATS`.

Prints, for each kind of call, the milliseconds of one call in each round, and how many cores others took meanwhile.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.host import watch_others
from bench.interleave import PAUSE_S, WARMUP
from bench.workers.about import start_jax

_KNOWN = ("a lighthouse in a storm", "blurry, low quality")
_AT_ONCE = 1000  # one call of what is there is too short for the clock


def main(weights: str, repeats: int) -> None:
    about = start_jax("float32", "clip-jax-text", "flax")
    import jax

    import clip_jax

    encoder = clip_jax.load(Path(weights) / "converted", progress=False)
    known = jax.block_until_ready(encoder(*_KNOWN))

    def both_new(turn: int) -> None:
        jax.block_until_ready(encoder(f"a cat, number {turn}", f"blurry, number {turn}"))

    def known_negative(turn: int) -> None:
        jax.block_until_ready(encoder(f"a dog, number {turn}", _KNOWN[1]))

    def the_same(_turn: int) -> None:
        for _ in range(_AT_ONCE):
            again = encoder(*_KNOWN)
        assert again.prompt_embeds is known.prompt_embeds

    calls: dict[str, tuple[Callable[[int], None], int]] = {
        "a new prompt, a new negative": (both_new, 1),
        "a new prompt, a known negative": (known_negative, 1),
        "the same call again": (the_same, _AT_ONCE),
    }
    ms: dict[str, list[float]] = {name: [] for name in calls}
    other_cores = watch_others()
    for turn in range(WARMUP + repeats):
        for name, (call, times) in calls.items():
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            call(turn)
            if turn >= WARMUP:
                ms[name].append(round(1e3 * (time.perf_counter() - start) / times, 5))
    print(json.dumps({"about": about, "ms": ms, "other_cores": other_cores()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
