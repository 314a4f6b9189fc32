"""`clip_jax.compat`: the drop-in classes, called with ids of numpy as pipelines call them."""

from __future__ import annotations

import time

from bench.presets import COMPAT
from bench.protocol import Message, Model, serve
from bench.workers.about import start_jax


def start(case: Message) -> Model:
    about = start_jax(case["precision"], "clip-jax-text", "flax")
    import jax
    import numpy as np

    from clip_jax import compat

    preset = COMPAT[case["preset"]]
    begin = time.perf_counter()
    model = getattr(compat, preset.flax_class).from_pretrained(case["checkpoint"])
    jax.block_until_ready(model.params)
    load_s = time.perf_counter() - begin
    ids = np.asarray(case["ids"], np.int64)

    def call() -> jax.Array:
        return jax.block_until_ready(model(ids)[preset.output])

    facts = {"about": about, "load_s": round(load_s, 3)}
    return Model(facts, call, lambda out: {preset.output: np.asarray(out)})


if __name__ == "__main__":
    serve(start)
