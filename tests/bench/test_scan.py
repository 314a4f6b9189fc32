"""The scan computes what the models compute, so that their times are of the same work."""

import jax
import jax.numpy as jnp
import numpy as np

from bench.scan import programs, stacked


def test_both_ways_compute_the_same(encoder):
    config, params = encoder.config["clip_l"], encoder.params["clip_l"]
    ids = jnp.asarray(encoder.tokenize("a cat", negative_prompt="blurry").cond["clip_l"])
    found = programs(config, "float32")
    unrolled = jax.jit(found["unrolled"])(params, ids)
    np.testing.assert_allclose(jax.jit(found["scan"])(stacked(params), ids), unrolled, atol=1e-5)
    other = jax.tree.map(lambda leaf: leaf[::-1], stacked(params)["text_model"]["encoder"])
    params = {**params, "text_model": {**params["text_model"], "encoder": other}}
    assert np.abs(jax.jit(found["scan"])(params, ids) - unrolled).max() > 1e-2  # blocks in another order
