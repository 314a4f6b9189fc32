"""Blocks that are traced once: what comes out is the same, and whoever looks at each block still sees each."""

import dataclasses
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.config import T5EncoderConfig
from clip_jax.models import model_of, repeated
from clip_jax.params.shapes import flatten
from tests.checkpoints import TINY_H

TINY_T5 = T5EncoderConfig(
    vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, relative_attention_max_distance=32
)
CONFIGS = {"clip": dataclasses.replace(TINY_H, num_hidden_layers=3), "t5": TINY_T5}


@pytest.fixture(scope="module", params=["clip", pytest.param("t5", marks=pytest.mark.slow)])
def model(request):
    return model_of(CONFIGS[request.param])


@pytest.fixture(scope="module")
def params(model):
    return nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), ids(1)))["params"]


def ids(rows):
    return jnp.asarray(np.random.default_rng(rows).integers(0, 100, (rows, 11)))


def lowered_length(model, layers):
    name = "num_layers" if isinstance(model.config, T5EncoderConfig) else "num_hidden_layers"
    deep = dataclasses.replace(model, config=dataclasses.replace(model.config, **{name: layers}))
    shapes = jax.eval_shape(deep.init, jax.random.key(0), ids(1))
    return jax.jit(lambda v, i: deep.apply(v, i).last_hidden_state).lower(shapes, ids(1)).as_text().count("dot_general")


def test_the_program_does_not_grow_with_the_number_of_blocks(model):
    assert lowered_length(model, 12) == lowered_length(model, 4) > 0


@pytest.mark.slow
def test_outputs_are_those_of_blocks_traced_one_by_one(model, params, monkeypatch):
    ours = jax.jit(lambda p, i: model.apply({"params": p}, i))(params, ids(3))
    monkeypatch.setattr(repeated, "intercepted", lambda: True)
    plain = jax.jit(lambda p, i: model.apply({"params": p}, i))(params, ids(3))
    assert len(ours.hidden_states) == len(plain.hidden_states) == 4
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


@pytest.mark.slow
def test_a_model_of_the_same_shapes_is_not_run_as_another(model, params):
    other = {"layer_norm_epsilon": 0.5} if isinstance(model.config, T5EncoderConfig) else {"hidden_act": "quick_gelu"}
    changed = dataclasses.replace(model, config=dataclasses.replace(model.config, **other))
    first, second = (each.apply({"params": params}, ids(2)).hidden_states[-2] for each in (model, changed))
    assert np.abs(first - second).max() > 1e-4


@pytest.mark.slow
def test_gradients_reach_every_block(model, params):
    grads = jax.jit(jax.grad(lambda p: model.apply({"params": p}, ids(2)).last_hidden_state.std()))(params)
    empty = {path for path, leaf in flatten(grads).items() if not np.any(leaf)}
    assert {path for path in empty if "bias" not in path and "position" not in path} == set()


def test_what_is_captured_is_there_for_every_block(model, params):
    _, state = model.apply({"params": params}, ids(2), capture_intermediates=True, mutable=["intermediates"])
    paths = {path for path in flatten(state["intermediates"]) if path.endswith("__call__")}
    inner = "block/{}/layer/1/DenseReluDense/wo" if isinstance(model.config, T5EncoderConfig) else "layers/{}/mlp/fc2"
    for block in range(3):
        assert any(inner.format(block) in path for path in paths)


def test_an_interceptor_sees_every_block(model, params):
    seen = []

    def interceptor(call, args, kwargs, context):
        seen.append("/".join(context.module.path))
        return call(*args, **kwargs)

    model.apply({"params": params}, ids(2))  # what was traced without one is not taken
    with nn.intercept_methods(interceptor):
        model.apply({"params": params}, ids(2))
    inner = "block/{}/layer/1" if isinstance(model.config, T5EncoderConfig) else "layers/{}/mlp"
    for block in range(3):
        assert any(inner.format(block) in path for path in seen)


@pytest.mark.slow
def test_threads_may_trace_at_the_same_time(model, params, trace_anew):
    run = jax.jit(lambda p, i: model.apply({"params": p}, i).last_hidden_state)
    found = {}
    trace_anew()
    threads = [threading.Thread(target=lambda n=n: found.update({n: run(params, ids(n))})) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rows in range(1, 5):
        np.testing.assert_array_equal(found[rows], run(params, ids(rows)))
