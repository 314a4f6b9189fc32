"""The contender `clip_jax`: `text_embeddings` on ids that are on the device, with seeded random weights."""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Sequence

from bench.host import cores, cpu_model
from bench.protocol import Call, Message, serve


def start(case: Message) -> tuple[Message, Call]:
    # On a GPU, jax would take most of the memory that the peer needs too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import flax
    import jax
    import jaxlib
    import numpy as np

    import clip_jax

    device = jax.devices()[0]
    if device.platform != "cpu" and case["dtype"] == "float32":
        # jax's default is less than float32 on accelerators, torch's is not. No difference on a CPU.
        jax.config.update("jax_default_matmul_precision", "highest")

    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = clip_jax.load(f"random:{case['family']}", dtype=case["dtype"], progress=False)
    jax.block_until_ready(encoder.params)
    load_s = time.perf_counter() - begin

    (tower,) = encoder.family.towers
    uncond, cond = (jax.device_put(np.asarray([row], np.int32)) for row in case["ids"])
    tokens = clip_jax.Tokens(cond={tower.name: cond}, uncond={tower.name: uncond})

    def call() -> Sequence[int]:
        out = clip_jax.text_embeddings(
            encoder.params, tokens, family=encoder.family, dtype=encoder.dtype, compute_dtype=encoder.dtype
        )
        return jax.block_until_ready(out.prompt_embeds).shape

    about = {
        "device": cpu_model() if device.platform == "cpu" else device.device_kind,
        "threads": cores(),
        "versions": {
            "python": platform.python_version(),
            "clip_jax": clip_jax.__version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "flax": flax.__version__,
        },
    }
    return {"about": about, "config": tower.config.to_hf(), "load_s": round(load_s, 3)}, call


if __name__ == "__main__":
    serve(start)
