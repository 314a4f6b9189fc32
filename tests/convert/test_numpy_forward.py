"""The float64 forward passes: held against our models, which share nothing with them, and against known values.

`tests/parity/test_numpy_forward.py` holds them against transformers and open_clip.
"""

import dataclasses
import math
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import ClipTextConfig, T5EncoderConfig
from clip_jax.convert import numpy_forward
from clip_jax.convert.hf_keys import hf_key
from clip_jax.convert.numpy_forward import clip_forward, open_clip_forward, t5_forward
from clip_jax.models import model_of
from clip_jax.params.shapes import param_shapes, unflatten
from tests.checkpoints import hf_state, t5_state
from tests.formats.names import open_clip

TOLERANCE = 1e-5  # the float32 of our models; values are below 10
EOS = 90

CLIP = ClipTextConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    hidden_act="quick_gelu",
    vocab_size=100,
    max_position_embeddings=20,
    projection_dim=32,
    eos_token_id=EOS,
)
T5 = T5EncoderConfig(d_model=40, d_kv=8, d_ff=72, num_layers=3, num_heads=5, vocab_size=100)

CLIPS = {
    "quick_gelu": CLIP,
    "gelu": dataclasses.replace(CLIP, hidden_act="gelu"),
    "tanh gelu": dataclasses.replace(CLIP, hidden_act="gelu_new"),
    "no projection": dataclasses.replace(CLIP, projection_dim=None),
    "another epsilon": dataclasses.replace(CLIP, layer_norm_eps=1e-2),
}


def random_ids(length):
    """Rows that end early, late and never."""
    ids = np.random.default_rng(length).integers(0, EOS, (3, length), dtype=np.int32)
    ids[0, 3:] = EOS
    ids[1, -1] = EOS
    return ids


def params_of(config, state):
    """The same weights in the tree of our models."""
    keys = {path: hf_key(path) for path in param_shapes(config)}
    return unflatten(
        {p: jnp.asarray(state[key].T if transposed else state[key]) for p, (key, transposed) in keys.items()}
    )


def flat(out):
    """Every output in one array, so that all of them are compared."""
    parts = [*out.hidden_states, out.last_hidden_state, out.pooled]
    return np.concatenate([part.ravel() for part in parts + ([] if out.text_embeds is None else [out.text_embeds])])


def swapped(state, *pairs):
    """The state with tensors of one shape in each other's place."""
    found = dict(state)
    for a, b in pairs:
        found[a], found[b] = state[b], state[a]
    return found


# --- against our models


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIPS)
def test_clip_equals_our_model(name):
    config, ids = CLIPS[name], random_ids(20)
    state = hf_state(config)
    ours = model_of(config, jnp.float32).apply({"params": params_of(config, state)}, jnp.asarray(ids))
    out = clip_forward(state.__getitem__, config, ids)
    assert len(out.hidden_states) == config.num_hidden_layers + 1
    assert {part.dtype for part in out.hidden_states} == {np.dtype(np.float64)}
    for found, expected in zip(out.hidden_states, ours.hidden_states, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(out.last_hidden_state, ours.last_hidden_state, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(out.pooled, ours.pooler_output, rtol=0, atol=TOLERANCE)
    if config.projection_dim is None:
        assert out.text_embeds is None
    else:
        np.testing.assert_allclose(out.text_embeds, ours.text_embeds, rtol=0, atol=TOLERANCE)


def test_t5_equals_our_model():
    state, ids = t5_state(T5), random_ids(150)  # longer than the farthest distance with a bucket of its own
    ours = model_of(T5, jnp.float32).apply({"params": params_of(T5, state)}, jnp.asarray(ids))
    found = t5_forward(state.__getitem__, T5, ids)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, ours.last_hidden_state, rtol=0, atol=TOLERANCE)


def test_openclip_names_give_the_very_same():
    state, ids = hf_state(CLIP), random_ids(20)
    expected = flat(clip_forward(state.__getitem__, CLIP, ids))
    found = flat(open_clip_forward(open_clip(state).__getitem__, CLIP, ids))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


# --- against known values


def test_the_activations_at_one():
    at_one = {name: float(numpy_forward._activation(np.ones(()), name)) for name in ("quick_gelu", "gelu", "gelu_new")}
    assert at_one == pytest.approx(
        {"quick_gelu": 0.8457957659, "gelu": 0.8413447461, "gelu_new": 0.8411919906}, abs=1e-10
    )


@pytest.mark.parametrize("name", ["quick_gelu", "gelu", "gelu_new"])
def test_the_activations_do_not_overflow(name):
    found = numpy_forward._activation(np.array([-1e4, 0.0, 1e4]), name)  # warnings are errors
    np.testing.assert_allclose(found, [0, 0, 1e4])


def test_the_buckets_are_those_of_t5():
    """Memory less query: bucket, as `T5Attention._relative_position_bucket` gives them."""
    known = {-130: 15, -64: 14, -16: 10, -8: 8, -7: 7, -1: 1, 0: 0, 1: 17, 7: 23, 8: 24, 12: 25, 16: 26, 64: 30, 91: 31}
    buckets = numpy_forward._buckets(140, T5)
    found = {
        distance: int(buckets[130, 130 + distance] if distance < 0 else buckets[0, distance]) for distance in known
    }
    assert found == known


def test_a_softmax_of_one_token_and_a_norm_by_hand():
    """One token attends to itself alone: the block is linear but for its norms and activation."""
    config = dataclasses.replace(CLIP, num_hidden_layers=1)
    state = hf_state(config)
    layer = "text_model.encoder.layers.0."
    x = state["text_model.embeddings.token_embedding.weight"][[7]].astype(np.float64)
    x = x + state["text_model.embeddings.position_embedding.weight"][0]

    def norm(x, name):
        normal = (x - x.mean()) / math.sqrt(x.var() + config.layer_norm_eps)
        return normal * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T.astype(np.float64) + state[f"{name}.bias"]

    attended = linear(norm(x, f"{layer}layer_norm1"), f"{layer}self_attn.v_proj")
    x = x + linear(attended, f"{layer}self_attn.out_proj")
    y = linear(norm(x, f"{layer}layer_norm2"), f"{layer}mlp.fc1")
    x = x + linear(y / (1 + np.exp(-1.702 * y)), f"{layer}mlp.fc2")
    found = clip_forward(state.__getitem__, config, np.array([[7]]))
    np.testing.assert_allclose(found.hidden_states[1][0], x, rtol=1e-12)


def test_no_token_looks_ahead_in_clip_and_each_does_in_t5():
    ids = random_ids(20)
    other = ids.copy()
    other[:, 10] += 1
    state, t5 = hf_state(CLIP), t5_state(T5)
    change = np.abs(clip_forward(state.__getitem__, CLIP, other)[1] - clip_forward(state.__getitem__, CLIP, ids)[1])
    assert change[:, :10].max() == 0 < change[:, 10:].max(axis=-1).min()
    change = np.abs(t5_forward(t5.__getitem__, T5, other) - t5_forward(t5.__getitem__, T5, ids))
    assert change.max(axis=-1).min() > 0


def test_the_first_end_of_text_is_pooled():
    ids = random_ids(20)
    out = clip_forward(hf_state(CLIP).__getitem__, CLIP, ids)
    rows = [3, 19, 0]  # the last row has none
    np.testing.assert_array_equal(out.pooled, out.last_hidden_state[range(3), rows])


# --- what they are for: faults show


L1 = "text_model.encoder.layers.1."
CLIP_FAULTS = {
    "q and k": lambda s: swapped(
        s, *((f"{L1}self_attn.q_proj.{k}", f"{L1}self_attn.k_proj.{k}") for k in ("weight", "bias"))
    ),
    "the norms of a block": lambda s: swapped(s, (f"{L1}layer_norm1.weight", f"{L1}layer_norm2.weight")),
    "two blocks": lambda s: swapped(s, (f"{L1}mlp.fc1.weight", "text_model.encoder.layers.0.mlp.fc1.weight")),
    "out_proj transposed": lambda s: {**s, f"{L1}self_attn.out_proj.weight": s[f"{L1}self_attn.out_proj.weight"].T},
    "text_projection transposed": lambda s: {**s, "text_projection.weight": s["text_projection.weight"].T},
    "no bias": lambda s: {**s, f"{L1}mlp.fc2.bias": np.zeros_like(s[f"{L1}mlp.fc2.bias"])},
}


@pytest.mark.parametrize("fault", CLIP_FAULTS)
def test_a_fault_in_clip_shows(fault):
    state, ids = hf_state(CLIP), random_ids(20)
    right, wrong = (clip_forward(s.__getitem__, CLIP, ids) for s in (state, CLIP_FAULTS[fault](state)))
    assert np.abs(flat(wrong) - flat(right)).max() > 1000 * TOLERANCE


B1 = "encoder.block.1.layer."
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
T5_FAULTS = {
    "q and k": lambda s: swapped(s, (f"{B1}0.SelfAttention.q.weight", f"{B1}0.SelfAttention.k.weight")),
    "gate and value": lambda s: swapped(s, (f"{B1}1.DenseReluDense.wi_0.weight", f"{B1}1.DenseReluDense.wi_1.weight")),
    "the directions of the bias": lambda s: {**s, BIAS: np.roll(s[BIAS], 16, axis=0)},
    "the heads of the bias": lambda s: {**s, BIAS: np.roll(s[BIAS], 1, axis=1)},
    "no final norm": lambda s: {**s, "encoder.final_layer_norm.weight": np.ones(40)},
}


@pytest.mark.parametrize("fault", T5_FAULTS)
def test_a_fault_in_t5_shows(fault):
    state, ids = t5_state(T5), random_ids(30)
    right, wrong = (t5_forward(s.__getitem__, T5, ids) for s in (state, T5_FAULTS[fault](state)))
    assert np.abs(wrong - right).max() > 1000 * TOLERANCE


def test_another_activation_shows():
    state, ids = hf_state(CLIP), random_ids(20)
    outputs = [flat(clip_forward(state.__getitem__, CLIPS[name], ids)) for name in ("quick_gelu", "gelu", "tanh gelu")]
    assert np.abs(outputs[0] - outputs[1]).max() > 1000 * TOLERANCE
    assert np.abs(outputs[1] - outputs[2]).max() > 10 * TOLERANCE  # of a kind, and yet apart


# --- memory


def test_one_matrix_at_a_time_is_in_float64():
    config = dataclasses.replace(T5, d_model=256, d_kv=32, d_ff=512, num_layers=8, num_heads=8)
    state = {name: array.astype(np.float16) for name, array in t5_state(config).items()}
    largest = max(array.size for name, array in state.items() if name != "shared.weight") * 8
    whole = sum(array.size for array in state.values()) * 8
    tracemalloc.start()
    try:
        t5_forward(state.__getitem__, config, random_ids(8))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert largest < peak < 2 * largest < whole / 10
