"""ClipTextModel: its parameter tree, and what can be said of its outputs without a reference."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import ClipTextConfig, ClipTextModel
from clip_jax.params.shapes import param_shapes, unflatten
from tests.checkpoints import TINY

EOS = 49407


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return unflatten({p: rng.standard_normal(s, np.float32) * 0.3 for p, s in param_shapes(TINY).items()})


def run(params, ids, config=TINY, **kwargs):
    return jax.jit(ClipTextModel(config).apply)({"params": params}, jnp.asarray(ids), **kwargs)


@pytest.fixture(scope="module")
def ids():
    ids = np.random.default_rng(1).integers(0, 49000, (2, 10), dtype=np.int32)
    ids[0, 4], ids[1, 6] = EOS, EOS
    return ids


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (ClipTextConfig.sd15(), 123_060_480),
        (ClipTextConfig.sd21(), 340_387_840),
        (dataclasses.replace(ClipTextConfig.sd21(), num_hidden_layers=24), 352_984_064),
        (ClipTextConfig.sdxl_clip_g(), 694_659_840),
    ],
)
def test_parameter_counts_are_those_of_the_published_models(config, count):
    assert sum(math.prod(shape) for shape in param_shapes(config).values()) == count


def test_parameter_tree_is_that_of_the_removed_flax_class():
    layer = {
        f"text_model/encoder/layers/{i}/{name}"
        for i in "012"
        for name in (
            "layer_norm1/bias",
            "layer_norm1/scale",
            "layer_norm2/bias",
            "layer_norm2/scale",
            "mlp/fc1/bias",
            "mlp/fc1/kernel",
            "mlp/fc2/bias",
            "mlp/fc2/kernel",
            *(f"self_attn/{p}_proj/{leaf}" for p in ("q", "k", "v", "out") for leaf in ("bias", "kernel")),
        )
    }
    outer = {
        "text_model/embeddings/position_embedding/embedding",
        "text_model/embeddings/token_embedding/embedding",
        "text_model/final_layer_norm/bias",
        "text_model/final_layer_norm/scale",
    }
    assert set(param_shapes(TINY)) == layer | outer
    projected = param_shapes(dataclasses.replace(TINY, projection_dim=24))
    assert set(projected) == layer | outer | {"text_projection/kernel"}
    assert projected["text_projection/kernel"] == (32, 24)
    assert projected["text_model/encoder/layers/0/mlp/fc1/kernel"] == (32, 64)


@pytest.mark.parametrize("layers", [1, 12, 23, 24, 32])
def test_there_is_one_hidden_state_more_than_layers(layers):
    config = dataclasses.replace(TINY, num_hidden_layers=layers, projection_dim=24)
    model = ClipTextModel(config)
    out = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, 7), jnp.int32))[0]
    assert [h.shape for h in out.hidden_states] == [(2, 7, 32)] * (layers + 1)
    assert (out.last_hidden_state.shape, out.pooler_output.shape) == ((2, 7, 32), (2, 32))
    assert out.text_embeds.shape == (2, 24)


def test_last_hidden_state_is_the_normed_last_block_and_hidden_states_are_not_normed(params, ids):
    out = ClipTextModel(TINY).apply({"params": params}, jnp.asarray(ids))  # an operation at a time, as `final_norm` is
    normed = ClipTextModel(TINY).bind({"params": params}).final_norm(out.hidden_states[-1])
    np.testing.assert_array_equal(out.last_hidden_state, normed)
    assert not np.allclose(out.hidden_states[-1], out.last_hidden_state)


def test_pooled_is_the_row_of_the_first_end_of_text(params, ids):
    padded = ids.copy()
    padded[0, 4:] = EOS  # CLIP-L pads with the end-of-text token
    out = run(params, padded)
    np.testing.assert_allclose(out.pooler_output[0], out.last_hidden_state[0, 4], atol=1e-6)
    np.testing.assert_allclose(out.pooler_output[1], out.last_hidden_state[1, 6], atol=1e-6)


def test_pooled_is_not_drawn_to_ids_above_the_end_of_text(params, ids):
    config = dataclasses.replace(TINY, eos_token_id=40_000)
    with_inversion = ids.copy()
    with_inversion[0, 2], with_inversion[0, 4] = 49_000, 40_000
    out = run(params, with_inversion, config)
    np.testing.assert_allclose(out.pooler_output[0], out.last_hidden_state[0, 4], atol=1e-6)


def test_pooled_is_at_the_highest_id_where_the_end_of_text_is_said_to_be_2(params):
    """Small vocabularies of tests: transformers takes `argmax(input_ids)` there."""
    config = dataclasses.replace(TINY, eos_token_id=2)
    rows = np.array([[0, 2, 9, 22, 22, 22], [5, 22, 2, 22, 2, 2]], np.int32)
    out = run(params, rows, config)
    np.testing.assert_allclose(out.pooler_output[0], out.last_hidden_state[0, 3], atol=1e-6)
    np.testing.assert_allclose(out.pooler_output[1], out.last_hidden_state[1, 1], atol=1e-6)


def test_attention_is_causal(params, ids):
    changed = ids.copy()
    changed[:, 6:] = 5
    before, after = run(params, ids).last_hidden_state, run(params, changed).last_hidden_state
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert not np.allclose(before[:, 6:], after[:, 6:])


def test_attention_mask_narrows_the_causal_mask(params, ids):
    mask = np.ones_like(ids)
    mask[:, 3] = 0
    plain, masked = run(params, ids), run(params, ids, attention_mask=jnp.asarray(mask))
    # Position 3 is hidden from those after it, and causality still holds for those before it.
    np.testing.assert_array_equal(plain.last_hidden_state[:, :3], masked.last_hidden_state[:, :3])
    assert not np.allclose(plain.last_hidden_state[:, 4:], masked.last_hidden_state[:, 4:])
    changed = ids.copy()
    changed[:, 3] = 7
    again = run(params, changed, attention_mask=jnp.asarray(mask)).last_hidden_state
    np.testing.assert_array_equal(masked.last_hidden_state[:, 4:], again[:, 4:])
    changed[:, 8] = 7
    later = run(params, changed, attention_mask=jnp.asarray(mask)).last_hidden_state
    np.testing.assert_array_equal(again[:, :8], later[:, :8])


def test_mask_of_ones_is_no_mask(params, ids):
    masked = run(params, ids, attention_mask=jnp.ones_like(ids))
    np.testing.assert_array_equal(run(params, ids).last_hidden_state, masked.last_hidden_state)


def test_a_row_with_nothing_to_attend_to_is_finite(params, ids):
    mask = np.ones_like(ids)
    mask[0, :2] = 0
    assert np.isfinite(run(params, ids, attention_mask=jnp.asarray(mask)).last_hidden_state).all()


def test_position_ids_are_used(params, ids):
    given = run(params, ids, position_ids=jnp.arange(10)[None])
    shifted = run(params, ids, position_ids=jnp.arange(1, 11)[None])
    np.testing.assert_array_equal(run(params, ids).last_hidden_state, given.last_hidden_state)
    assert not np.allclose(given.last_hidden_state, shifted.last_hidden_state)


def test_position_count_comes_from_the_config():
    long = dataclasses.replace(TINY, max_position_embeddings=248)
    model = ClipTextModel(long)
    out = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((1, 248), jnp.int32))[0]
    assert out.last_hidden_state.shape == (1, 248, 32)
    with pytest.raises(ValueError, match="249 tokens per row, the model has 248 positions"):
        jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((1, 249), jnp.int32))


@pytest.mark.slow
def test_bfloat16_outputs_are_near_float32(params, ids):
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    out = jax.jit(ClipTextModel(TINY, dtype=jnp.bfloat16).apply)({"params": low}, jnp.asarray(ids)).last_hidden_state
    exact = np.asarray(run(params, ids).last_hidden_state)
    assert out.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(out, np.float32) - exact) < 0.02 * np.linalg.norm(exact)


def test_what_is_not_zero_in_a_mask_is_attended_to(params, ids):
    mask = (np.arange(ids.shape[1]) != 3)[None] * np.ones_like(ids)
    ones, others = (run(params, ids, attention_mask=jnp.asarray(mask * factor)) for factor in (1, -3))
    jax.tree.map(np.testing.assert_array_equal, ones, others)


def test_the_pooled_row_is_masked_as_the_others_are(params, ids):
    out = run(params, ids, attention_mask=jnp.asarray((np.arange(ids.shape[1]) != 3)[None].repeat(2, 0)))
    for row, end in enumerate((4, 6)):
        np.testing.assert_allclose(out.pooler_output[row], out.last_hidden_state[row, end], atol=1e-6)
