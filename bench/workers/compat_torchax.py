"""torchax around transformers' classes: un-jitted as maxdiffusion's pull request 483 calls it, and under `jax.jit`."""

from __future__ import annotations

import time

from bench.presets import COMPAT
from bench.protocol import Message, Model, serve
from bench.workers.about import start_jax


def start(case: Message) -> Model:
    about = start_jax(case["precision"], "torchax", "torch", "transformers")
    import jax
    import numpy as np
    import torchax
    import transformers
    from torchax import interop

    preset = COMPAT[case["preset"]]
    begin = time.perf_counter()
    # Eager attention, as the pull request has it for torchax to trace.
    loaded = getattr(transformers, preset.torch_class).from_pretrained(case["checkpoint"], attn_implementation="eager")
    with torchax.default_env():
        module = interop.JittableModule(loaded.eval().to("jax"))
    params, buffers = (jax.device_put(interop.jax_view(x)) for x in (module.params, module.buffers))
    jax.block_until_ready(params)
    load_s = time.perf_counter() - begin
    ids = np.asarray(case["ids"], np.int64)

    def run(params: object, buffers: object, ids: jax.Array) -> jax.Array:
        with torchax.default_env():
            out = module.functional_call(
                lambda model, ids: model(input_ids=ids)[preset.output],
                interop.torch_view(params),
                interop.torch_view(buffers),
                interop.torch_view(ids),
            )
        return interop.jax_view(out)

    if case["options"]["jitted"]:
        run = jax.jit(run)

    def call() -> jax.Array:
        return jax.block_until_ready(run(params, buffers, jax.numpy.asarray(ids)))

    facts = {"about": about, "load_s": round(load_s, 3)}
    return Model(facts, call, lambda out: {preset.output: np.asarray(out)})


if __name__ == "__main__":
    serve(start)
