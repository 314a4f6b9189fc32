"""The Flax classes of transformers 4: called as pipelines called them, which is not jitted, and under `jax.jit`."""

from __future__ import annotations

import time

from bench.presets import COMPAT
from bench.protocol import LeftOut, Message, Model, serve
from bench.workers.about import start_jax


def start(case: Message) -> Model:
    about = start_jax(case["precision"], "transformers", "flax")
    import jax
    import numpy as np
    import transformers

    preset = COMPAT[case["preset"]]
    if not hasattr(transformers, preset.flax_class):
        raise LeftOut(f"transformers {transformers.__version__} has no Flax classes")
    begin = time.perf_counter()
    model = getattr(transformers, preset.flax_class).from_pretrained(case["checkpoint"])
    params = jax.block_until_ready(jax.device_put(model.params))
    load_s = time.perf_counter() - begin
    ids = np.asarray(case["ids"], np.int64)

    def run(params: object, ids: np.ndarray) -> jax.Array:
        return model(ids, params=params)[preset.output]

    if case["options"]["jitted"]:
        run = jax.jit(run)

    def call() -> jax.Array:
        return jax.block_until_ready(run(params, ids))

    facts = {"about": about, "load_s": round(load_s, 3)}
    return Model(facts, call, lambda out: {preset.output: np.asarray(out)})


if __name__ == "__main__":
    serve(start)
