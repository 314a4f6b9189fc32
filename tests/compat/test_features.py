"""`get_text_features`: the rows of `text_embeds`, whatever texts are run together, and how little is run for them."""

import copy
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clip_jax
from clip_jax import ClipJaxError
from clip_jax.buckets import BATCHES, LENGTHS
from clip_jax.compat import FlaxCLIPTextModelWithProjection
from clip_jax.compat import clip as compat_clip
from clip_jax.compat.features import pooled_rows
from tests.checkpoints import write_family
from tests.compat.conftest import SMALL_PROJECTED

BOS, EOS = 49406, 49407


def texts(sizes, length=77, seed=0):
    """Ids [N, length] of texts of these sizes, BOS and EOS included, filled up with ids that end nothing."""
    ids = np.random.RandomState(seed).randint(3, 9000, (len(sizes), length))
    ids[:, 0] = BOS
    for row, size in zip(ids, sizes, strict=True):
        row[size - 1] = EOS
    return ids


SIZES = [5, 77, 3, 16, 17, 2, 40, 5, 9, 31, 48, 76, 8]


@pytest.fixture(scope="module")
def called(projected):
    return projected(texts(SIZES)).text_embeds


@pytest.mark.parametrize("batch_size", [1, 4, 128])
def test_rows_are_those_of_a_call_in_their_order(projected, called, batch_size):
    features = projected.get_text_features(texts(SIZES), batch_size=batch_size)
    assert isinstance(features, jax.Array)
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features, called, atol=1e-5)


def test_rows_tell_texts_apart(called):
    """Else what is above could not fail."""
    apart = np.abs(called[:, None] - called[None]).max(-1)
    assert apart[~np.eye(len(SIZES), dtype=bool)].min() > 1e-2


@pytest.mark.parametrize("length", [3, 13, 50])
def test_ids_that_are_padded_to_the_longest(projected, length):
    sizes = [length, 3, 2, length - 1]
    ids = texts(sizes, length)
    np.testing.assert_allclose(projected.get_text_features(ids), projected(ids).text_embeds, atol=1e-5)


def test_the_highest_id_ends_a_text_where_the_config_says_so(projected):
    config = dataclasses.replace(SMALL_PROJECTED, eos_token_id=2)
    model = FlaxCLIPTextModelWithProjection(config, _do_init=False)
    ids = texts([30, 4, 12])
    features = model.get_text_features(ids, params=projected.params)
    np.testing.assert_allclose(features, projected(ids).text_embeds, atol=1e-5)


def test_texts_without_an_end_are_as_in_a_call(projected):
    ids = np.where(texts([30, 4]) == EOS, 5, texts([30, 4]))
    np.testing.assert_allclose(projected.get_text_features(ids), projected(ids).text_embeds, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_masks_and_positions_are_cut_alike(projected, name):
    ids = texts([9, 30, 5, 12])
    given = {"attention_mask": (np.arange(77) != 1)[None], "position_ids": np.arange(77)[::-1][None]}[name]
    found = projected.get_text_features(ids, batch_size=2, **{name: given})
    np.testing.assert_allclose(found, projected(ids, **{name: given.repeat(4, 0)}).text_embeds, atol=1e-5)
    assert np.abs(found - projected(ids).text_embeds).max() > 1e-2


@pytest.mark.parametrize("length", [10, 77])
def test_where_a_mask_hides_all_up_to_an_end_every_token_counts(projected, length):
    """As it does with pads on the left that are end-of-text tokens."""
    ids = texts([9, 5, 4, 6], length)
    mask = np.ones_like(ids)
    mask[1, :5], mask[2] = 0, 0
    wanted = projected(ids, attention_mask=mask).text_embeds
    np.testing.assert_allclose(projected.get_text_features(ids, attention_mask=mask), wanted, atol=1e-5)
    other = projected(np.where(np.arange(length) == 9, 7, ids), attention_mask=mask).text_embeds
    assert (np.abs(other - wanted).max(-1) > 1e-4).tolist() == [False, True, True, False]


class Recorded:
    """Stands for a model: the size of each row's text, and what shapes came."""

    def __init__(self):
        self.shapes = []

    def __call__(self, ids, mask, positions):
        assert mask is None
        assert positions.shape == ids.shape
        self.shapes.append(ids.shape)
        return jnp.asarray((ids == EOS).argmax(-1) + 1)[:, None]


def run(sizes, batch_size, length=77, longest=77):
    recorded = Recorded()
    config = dataclasses.replace(SMALL_PROJECTED, max_position_embeddings=longest)
    rows = pooled_rows(recorded, (texts(sizes, length), None, np.arange(length)[None]), config, batch_size)
    np.testing.assert_array_equal(rows[:, 0], sizes)
    return recorded.shapes


def test_texts_of_like_length_go_together_the_longest_first():
    assert run([3, 60, 5, 4, 17, 20, 8, 2], 2) == [(2, 77), (2, 32), (2, 8), (2, 8)]
    assert run([5] * 70 + [20] * 40 + [60] * 33, 64) == [(64, 77), (64, 32), (64, 8), (8, 8)]


def test_where_few_are_left_shorter_ones_join_them():
    assert run([5] * 40 + [60] * 2, 64) == [(32, 77), (16, 8)]
    assert run([5] * 20 + [60] * 2 + [12] * 8, 64) == [(32, 77)]


def test_the_last_batch_is_filled_up_to_one_of_a_few_sizes():
    assert run([3] * 11, 4) == [(4, 8), (4, 8), (4, 8)]
    assert run([3] * 9, 4) == [(4, 8), (4, 8), (1, 8)]
    assert run([3] * 7, 6) == [(6, 8), (1, 8)]
    assert run([3] * 5, 6) == [(6, 8)]


def test_any_number_of_texts_needs_few_programs():
    random = np.random.RandomState(0)
    shapes = set()
    for number in (1, 2, 3, 30, 57, 100, 211):
        shapes |= set(run(random.randint(2, 78, number), 32))
    assert shapes <= {(batch, length) for batch in BATCHES for length in LENGTHS}


def test_no_row_is_longer_than_the_positions():
    assert run([20, 18], 2, length=20, longest=20) == [(2, 20)]
    assert run([200, 18], 1, length=248, longest=248) == [(1, 231), (1, 32)]
    assert run([240], 1, length=248, longest=248) == [(1, 248)]


def test_programs_are_not_traced_again(projected):
    projected.get_text_features(texts([5, 6, 7]))
    before = compat_clip._text_embeds._cache_size()
    projected.get_text_features(texts([3, 4, 8, 2]), params=jax.tree.map(jnp.copy, projected.params))
    assert compat_clip._text_embeds._cache_size() == before


def test_only_the_pooled_row_is_run(projected):
    """The products of the last block are of one row, but for its keys and values."""

    def flops(function):
        return jax.jit(function).lower(jnp.asarray(texts(SIZES))).compile().cost_analysis()["flops"]

    assert flops(projected.get_text_features) < 0.9 * flops(lambda ids: projected(ids).last_hidden_state)


def test_ids_on_a_device_and_within_a_jit(projected, called):
    ids = jnp.asarray(texts(SIZES))
    np.testing.assert_allclose(projected.get_text_features(ids), called, atol=1e-5)
    np.testing.assert_allclose(jax.jit(projected.get_text_features)(ids), called, atol=1e-5)


@pytest.mark.slow
def test_gradients_are_those_of_a_call(projected):
    ids = texts(SIZES)

    def loss(params, get):
        return (get(ids, params=params) ** 2).sum()

    found = jax.grad(loss)(projected.params, projected.get_text_features)
    wanted = jax.grad(loss)(projected.params, lambda ids, params: projected(ids, params=params).text_embeds)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), found, wanted)


def test_ids_in_a_list(projected, called):
    features = projected.get_text_features(texts(SIZES).tolist(), batch_size=4)
    np.testing.assert_allclose(features, called, atol=1e-5)


@pytest.mark.slow
def test_interceptors_are_noticed(projected, called):
    def doubled(call, args, kwargs, context):
        out = call(*args, **kwargs)
        return 2 * out if context.module.name == "text_projection" else out

    with nn.intercept_methods(doubled):
        features = projected.get_text_features(texts(SIZES))
    np.testing.assert_allclose(features, 2 * called, atol=2e-5)
    np.testing.assert_allclose(projected.get_text_features(texts(SIZES)), called, atol=1e-5)


def test_nothing_is_moved_unasked(projected, called):
    with jax.transfer_guard("disallow"):
        features = projected.get_text_features(texts(SIZES))
    np.testing.assert_allclose(features, called, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_params_of_an_encoder_quantised_too(tmp_path, quantize):
    folder = write_family(tmp_path / "sdxl", clip_jax.FAMILIES["sdxl"])
    encoder = clip_jax.load(folder, family="sdxl", quantize=quantize)
    model = FlaxCLIPTextModelWithProjection(encoder.config["clip_g"], _do_init=False)
    ids = texts([5, 77, 3, 12])
    features = model.get_text_features(ids, params=encoder.params["clip_g"])
    pooled = encoder.encode(clip_jax.Tokens(cond={"clip_l": ids, "clip_g": ids})).pooled_prompt_embeds
    np.testing.assert_allclose(features, pooled, atol=1e-5)


@pytest.mark.parametrize("batch_size", [0, -1, True, 2.0, None])
def test_batch_sizes_that_are_none(projected, batch_size):
    with pytest.raises(ClipJaxError, match="batch_size must be a positive int, found"):
        projected.get_text_features(texts([4]), batch_size=batch_size)


def test_what_a_call_refuses_is_refused(projected):
    with pytest.raises(ClipJaxError, match="78 tokens per row, the model has 77 positions"):
        projected.get_text_features(texts([4], 78))
    with pytest.raises(ClipJaxError, match=r"Expected input_ids \[B, L\] of at least one token, found \(77,\)"):
        projected.get_text_features(texts([4])[0])
    with pytest.raises(ClipJaxError, match=r"Expected input_ids \[B, L\] of at least one token, found \(0, 77\)"):
        projected.get_text_features(texts([]))
    with pytest.raises(ClipJaxError, match="Expected ids from 0 to"):
        projected.get_text_features(texts([4]) + 10**6)
    with pytest.raises(ClipJaxError, match=r"of the shape of input_ids, \(1, 77\), found \(1, 9\)"):
        projected.get_text_features(texts([4]), attention_mask=np.ones((1, 9)))
    dropping = copy.copy(projected)
    dropping.config = copy.copy(projected.config)
    dropping.config.attention_dropout = 0.1
    with pytest.raises(ClipJaxError, match="train=True means dropout"):
        dropping.get_text_features(texts([4]), train=True)
    with pytest.raises(ClipJaxError, match="made with _do_init=False"):
        FlaxCLIPTextModelWithProjection(SMALL_PROJECTED, _do_init=False).get_text_features(texts([4]))
