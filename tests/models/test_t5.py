"""T5Encoder: its parameter tree, its numerics, and what can be said of its outputs without a reference."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models import T5Encoder, functional, t5
from clip_jax.params.shapes import flatten, unflatten
from clip_jax.t5_config import T5EncoderConfig

TINY = T5EncoderConfig(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=3, vocab_size=100)


def shapes(config, param_dtype=jnp.float32):
    model = T5Encoder(config, param_dtype=param_dtype)
    return flatten(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


@pytest.fixture(scope="module")
def params():
    return jax.jit(T5Encoder(TINY).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(0, 100, (2, 10), dtype=np.int32)


def run(params, ids, dtype=jnp.float32, **kwargs):
    return jax.jit(T5Encoder(TINY, dtype).apply)({"params": params}, jnp.asarray(ids), **kwargs)


def scaled(params, **factors):
    """The parameters with each kernel whose name is given multiplied."""
    return unflatten({p: x * factors.get(p.split("/")[-2], 1) for p, x in flatten(params).items()})


# The parameter tree


def test_parameter_count_is_that_of_the_published_encoder():
    tree = shapes(T5EncoderConfig.xxl())
    assert sum(math.prod(leaf.shape) for leaf in tree.values()) == 4_762_310_656
    assert len(tree) == 219


def test_parameter_tree_is_that_of_the_removed_flax_class():
    block = {
        "layer/0/SelfAttention/q/kernel": (32, 24),
        "layer/0/SelfAttention/k/kernel": (32, 24),
        "layer/0/SelfAttention/v/kernel": (32, 24),
        "layer/0/SelfAttention/o/kernel": (24, 32),
        "layer/0/layer_norm/weight": (32,),
        "layer/1/DenseReluDense/wi_0/kernel": (32, 48),
        "layer/1/DenseReluDense/wi_1/kernel": (32, 48),
        "layer/1/DenseReluDense/wo/kernel": (48, 32),
        "layer/1/layer_norm/weight": (32,),
    }
    outer = {
        "shared/embedding": (100, 32),
        "encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding": (32, 3),
        "encoder/final_layer_norm/weight": (32,),
    }
    expected = outer | {f"encoder/block/{i}/{name}": shape for i in range(3) for name, shape in block.items()}
    assert {path: leaf.shape for path, leaf in shapes(TINY).items()} == expected


def test_parameters_are_made_in_the_asked_dtype():
    assert {leaf.dtype for leaf in shapes(TINY, jnp.bfloat16).values()} == {jnp.dtype(jnp.bfloat16)}


def test_initial_weights_have_the_spread_of_transformers():
    config = T5EncoderConfig(d_model=256, d_kv=64, d_ff=512, num_layers=1, num_heads=8, vocab_size=1000)
    tree = flatten(jax.jit(T5Encoder(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    spread = {path.split("/")[-2]: float(np.std(x)) for path, x in tree.items()}
    expected = {"shared": 1.0, "q": (256 * 64) ** -0.5, "k": 256**-0.5, "v": 256**-0.5, "o": 512**-0.5}
    expected |= {"wi_0": 256**-0.5, "wi_1": 256**-0.5, "wo": 512**-0.5, "relative_attention_bias": 256**-0.5}
    for name, value in expected.items():
        assert spread[name] == pytest.approx(value, rel=0.15), name


# Outputs


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 3])
def test_there_is_one_hidden_state_more_than_layers_and_the_last_is_normed(layers):
    model = T5Encoder(dataclasses.replace(TINY, num_layers=layers))
    out = model.init_with_output(jax.random.key(0), jnp.zeros((2, 7), jnp.int32))[0]
    assert [h.shape for h in out.hidden_states] == [(2, 7, 32)] * (layers + 1)
    np.testing.assert_array_equal(out.hidden_states[-1], out.last_hidden_state)
    square = np.mean(np.square(out.last_hidden_state), axis=-1)
    np.testing.assert_allclose(square, 1, rtol=1e-4)  # the norms of a new model scale by one


def test_unused_outputs_cost_nothing(params, ids):
    def flops(output):
        compiled = jax.jit(lambda p, i: output(run(p, i))).lower(params, ids).compile()
        return compiled.cost_analysis()["flops"]

    everything = flops(lambda out: out)
    assert flops(lambda out: out.last_hidden_state) == pytest.approx(everything, rel=0.01)
    assert flops(lambda out: out.hidden_states[1]) < 0.4 * everything


def test_attention_looks_both_ways(params, ids):
    changed = ids.copy()
    changed[:, 5] = 99 - changed[:, 5]
    before, after = run(params, ids).last_hidden_state, run(params, changed).last_hidden_state
    assert (np.abs(before - after).max(axis=-1) > 1e-4).all()


def test_only_relative_positions_count(params, ids):
    """The outputs of a text are those of the same text further right, where what is around it is masked."""
    shifted, mask = np.zeros((2, 40), np.int32), np.zeros((2, 40), np.int32)
    shifted[:, 17:27], mask[:, 17:27] = ids, 1
    there = run(params, shifted, attention_mask=jnp.asarray(mask)).last_hidden_state[:, 17:27]
    np.testing.assert_allclose(there, run(params, ids).last_hidden_state, atol=1e-5)
    backwards = run(params, ids[:, ::-1]).last_hidden_state[:, ::-1]
    assert not np.allclose(backwards, there, atol=1e-3)


def test_the_bias_of_the_first_block_acts_in_the_others(params, ids):
    first = "encoder/block/0/layer/0/SelfAttention/"
    flat = flatten(params)
    flat[f"{first}o/kernel"] = jnp.zeros_like(flat[f"{first}o/kernel"])  # the first block attends to nothing
    table = flat[f"{first}relative_attention_bias/embedding"]
    plain, other = (
        run(unflatten({**flat, f"{first}relative_attention_bias/embedding": factor * table}), ids) for factor in (1, 5)
    )
    np.testing.assert_array_equal(plain.hidden_states[1], other.hidden_states[1])
    assert not np.allclose(plain.hidden_states[2], other.hidden_states[2], atol=1e-3)


# Masks


def test_a_masked_token_is_not_seen(params, ids):
    mask = np.ones_like(ids)
    mask[0, 6:], mask[1, 2] = 0, 0
    changed = ids.copy()
    changed[0, 6:], changed[1, 2] = 3, 4
    before = run(params, ids, attention_mask=jnp.asarray(mask)).last_hidden_state
    after = run(params, changed, attention_mask=jnp.asarray(mask)).last_hidden_state
    seen = mask.astype(bool)
    np.testing.assert_array_equal(before[seen], after[seen])
    assert not np.allclose(run(params, ids).last_hidden_state[seen], before[seen], atol=1e-3)


def test_masked_pads_leave_the_outputs_of_the_short_row(params, ids):
    mask = np.ones_like(ids)
    mask[:, 6:] = 0
    padded = run(params, ids, attention_mask=jnp.asarray(mask)).last_hidden_state
    np.testing.assert_allclose(padded[:, :6], run(params, ids[:, :6]).last_hidden_state, atol=1e-5)


def test_mask_of_ones_is_no_mask(params, ids):
    masked = run(params, ids, attention_mask=jnp.ones_like(ids))
    np.testing.assert_array_equal(run(params, ids).last_hidden_state, masked.last_hidden_state)


def test_a_row_with_nothing_to_attend_to_is_finite(params, ids):
    out = run(params, ids, attention_mask=jnp.zeros_like(ids))
    assert np.isfinite(out.last_hidden_state).all()


# Position buckets

BUCKETS = {
    **{-130: 15, -64: 14, -16: 10, -8: 8, -7: 7, -1: 1, 0: 0},
    **{1: 17, 7: 23, 8: 24, 12: 25, 16: 26, 64: 30, 91: 31, 128: 31},
}


def test_buckets_are_those_of_transformers():
    found = functional.relative_position_buckets(np.array(list(BUCKETS)), 32, 128)
    assert found.tolist() == list(BUCKETS.values())


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (4, 2), (33, 100), (40, 300)])
def test_buckets_grow_with_distance_and_fill_the_table(num_buckets, max_distance):
    half = num_buckets // 2
    found = functional.relative_position_buckets(np.arange(-1000, 1001), num_buckets, max_distance)
    before, after = found[1000::-1], found[1001:]
    assert (np.diff(before) >= 0).all()
    assert (before[0], before[-1], before[max_distance]) == (0, half - 1, half - 1)
    np.testing.assert_array_equal(after, before[1:] + half)


# Dtypes


def test_rms_norm():
    x = jnp.array([[3.0, -4.0, 0.0, 0.0]])
    weight = jnp.array([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(functional.rms_norm(x, weight, 0.0), [[1.2, -3.2, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(functional.rms_norm(x, weight, 18.75), [[0.6, -1.6, 0, 0]], rtol=1e-6)


def test_rms_norm_squares_in_float32_and_gives_the_dtype_of_the_weight():
    x = jnp.array([[60_000.0, -60_000.0]], jnp.float16)
    out = functional.rms_norm(x, jnp.ones(2, jnp.float16), 1e-6)
    assert out.dtype == jnp.float16
    np.testing.assert_array_equal(out, [[1, -1]])
    assert functional.rms_norm(x, jnp.ones(2), 1e-6).dtype == jnp.float32


def test_bfloat16_outputs_are_near_float32(params, ids):
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    out = run(low, ids, jnp.bfloat16)
    exact = np.asarray(run(params, ids).last_hidden_state)
    assert {h.dtype for h in out.hidden_states} == {jnp.dtype(jnp.bfloat16)}
    error = np.asarray(out.last_hidden_state, np.float32) - exact
    assert np.linalg.norm(error) < 0.03 * np.linalg.norm(exact)


def test_float32_computation_takes_bfloat16_params(params, ids):
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), low)
    out = run(low, ids).last_hidden_state
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, run(rounded, ids).last_hidden_state)


# float16


class PlainFeedForward(t5._Module):
    """The feed-forward layer, in float16 throughout."""

    @nn.compact
    def __call__(self, x):
        gate, value = self.dense(self.config.d_ff, "wi_0")(x), self.dense(self.config.d_ff, "wi_1")(x)
        return self.dense(self.config.d_model, "wo")(functional.activation(gate, "gelu_new") * value)


@pytest.mark.parametrize("dtype", [jnp.float16, "float16"])
@pytest.mark.parametrize(
    "factors", [{}, {"wo": 3e4}, {"wi_0": 300.0, "wi_1": 300.0}], ids=["plain", "large wo", "large products"]
)
def test_float16_outputs_are_near_float32(params, ids, factors, dtype):
    large = scaled(params, **factors)
    out, exact = run(large, ids, dtype), np.asarray(run(large, ids).last_hidden_state)
    error = np.asarray(out.last_hidden_state, np.float32) - exact
    assert np.linalg.norm(error) < 0.01 * np.linalg.norm(exact)
    # The result of `wo` stays in float32, and with it the residual stream, as in transformers.
    dtypes = [jnp.float16, jnp.float32, jnp.float32, jnp.float16]
    assert [h.dtype for h in out.hidden_states] == [jnp.dtype(dtype) for dtype in dtypes]


@pytest.mark.slow
@pytest.mark.parametrize("factors", [{"wo": 3e4}, {"wi_0": 300.0, "wi_1": 300.0}])
def test_float16_would_overflow_without_the_rule_for_wo(params, ids, factors, monkeypatch, trace_anew):
    monkeypatch.setattr(t5, "T5DenseReluDense", PlainFeedForward)
    monkeypatch.setattr(functional, "clamp_float16", lambda x: x)
    trace_anew()
    assert np.isfinite(run(params, ids, jnp.float16).last_hidden_state).all()
    large = scaled(params, **factors)
    assert not np.isfinite(run(large, ids, jnp.float16).last_hidden_state).all()


def test_float16_is_clamped_where_the_first_attention_overflows(params, ids, monkeypatch, trace_anew):
    large = scaled(params, o=1e6)
    large = jax.tree.map(lambda x: jnp.clip(x, -6e4, 6e4), large)
    out = run(large, ids, jnp.float16)
    assert np.isfinite(out.last_hidden_state).all()
    assert all(np.isfinite(h).all() for h in out.hidden_states)
    monkeypatch.setattr(functional, "clamp_float16", lambda x: x)
    trace_anew()
    assert not np.isfinite(run(large, ids, jnp.float16).last_hidden_state).all()


def test_clamp_keeps_finite_values_and_other_dtypes():
    large = jnp.array([65504.0, -65504.0, 1.0], jnp.float16)
    np.testing.assert_array_equal(functional.clamp_float16(large), large)
    infinite = jnp.array([jnp.inf, -jnp.inf, 65504.0, 1.0], jnp.float16)
    np.testing.assert_array_equal(functional.clamp_float16(infinite), [64512, -64512, 64512, 1])
    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(functional.clamp_float16(infinite.astype(dtype))[:2], [np.inf, -np.inf])


def test_what_is_not_zero_in_a_mask_is_attended_to(params, ids):
    mask = (np.arange(ids.shape[1]) != 3)[None] * np.ones_like(ids)
    ones, others = (run(params, ids, attention_mask=jnp.asarray(mask * factor)) for factor in (1, -3))
    np.testing.assert_array_equal(ones.last_hidden_state, others.last_hidden_state)


def test_float16_is_clamped_where_the_first_sum_overflows(params, ids):
    """Embeddings and what attention adds to them are finite."""
    large = jax.tree.map(lambda x: jnp.clip(x, -6e4, 6e4), scaled(params, shared=3e4, o=3e4))
    assert all(np.isfinite(h).all() for h in run(large, ids, jnp.float16).hidden_states)
