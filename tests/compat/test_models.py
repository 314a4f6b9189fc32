"""The classes as pipelines call them. The numbers are held against the old ones in tests/golden and tests/oracle."""

import copy
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import ClipJaxError, ConfigError
from clip_jax.compat import FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection, FlaxPreTrainedModel, FlaxT5EncoderModel
from clip_jax.compat import base as compat_base
from clip_jax.params.shapes import flatten, param_shapes
from tests.compat.conftest import IDS, SMALL, SMALL_PROJECTED, SMALL_T5, T5_IDS


def test_outputs_by_attribute_key_and_index(clip, projected, t5):
    out = clip(IDS, params=clip.params, train=False)
    assert out[0] is out["last_hidden_state"] is out.last_hidden_state
    assert out[1] is out.pooler_output
    assert list(out) == ["last_hidden_state", "pooler_output"]
    assert len(out) == len(out[:]) == 2
    assert out.hidden_states is None
    assert "hidden_states" not in out
    assert out.last_hidden_state.shape == (2, 9, 32)
    assert out.pooler_output.shape == (2, 32)

    out = projected(IDS, output_hidden_states=True)
    assert out[0] is out.text_embeds
    assert out.text_embeds.shape == (2, 24)
    assert len(out["hidden_states"]) == SMALL_PROJECTED.num_hidden_layers + 1
    assert not hasattr(out, "pooler_output")

    out = t5(T5_IDS, attention_mask=None, output_hidden_states=False)
    assert list(out) == ["last_hidden_state"]
    assert out["last_hidden_state"].astype(t5.dtype).shape == (2, 9, SMALL_T5.d_model)
    with pytest.raises(KeyError):
        out["pooler_output"]
    with pytest.raises(IndexError):
        out[1]


def test_the_order_of_t5_arguments_is_another(t5):
    positional = t5(T5_IDS, np.ones_like(IDS), False, True)
    named = t5(T5_IDS, attention_mask=np.ones_like(IDS), output_hidden_states=True)
    np.testing.assert_array_equal(positional.hidden_states[1], named.hidden_states[1])


def test_attentions_are_weights(clip, t5):
    for model, ids, causal in ((clip, IDS, True), (t5, T5_IDS, False)):
        (first, _) = model(ids, output_attentions=True).attentions
        np.testing.assert_allclose(first.sum(-1), 1, rtol=1e-5)
        assert (np.triu(first, 1) == 0).all() == causal


def test_options_of_the_config_are_the_defaults(pipeline):
    model = FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", output_hidden_states=True)
    assert len(model(IDS).hidden_states) == 3
    model.config.return_dict = False
    last, pooled, hidden = model(IDS)
    assert (last.ndim, pooled.ndim, len(hidden)) == (3, 2, 3)
    assert model(IDS, output_hidden_states=False, return_dict=True).hidden_states is None


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_strict_promotion_is_for_others(clip, projected, t5, dtype):
    models = [(type(m)(m.config, dtype=dtype, _do_init=False), m.params) for m in (clip, projected, t5)]
    wanted = [model(ids, params=params)[0] for (model, params), ids in zip(models, (IDS, IDS, T5_IDS), strict=True)]
    with jax.numpy_dtype_promotion("strict"):
        found = [model(ids, params=params)[0] for (model, params), ids in zip(models, (IDS, IDS, T5_IDS), strict=True)]
        features = models[1][0].get_text_features(IDS, params=projected.params)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    np.testing.assert_allclose(features, wanted[1], atol=1e-2)


def test_a_second_call_is_not_traced_again_and_weights_are_no_constants(clip):
    clip(IDS)
    before = compat_base._compiled._cache_size()
    clip(IDS)
    clip(jnp.asarray(IDS), params=jax.tree.map(jnp.copy, clip.params))
    assert compat_base._compiled._cache_size() == before
    constants = jax.make_jaxpr(lambda params: clip(IDS, params=params)[0])(clip.params).consts
    assert sum(np.size(constant) for constant in constants) <= IDS.size


def test_params_can_be_cast_placed_and_set(clip):
    model = copy.copy(clip)
    model.params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    model.params = jax.device_put(model.params, jax.devices("cpu")[0])
    assert clip(IDS, params=model.params).last_hidden_state.dtype == jnp.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(clip.params)} == {"float32"}


def test_params_that_are_not_whole_are_refused(clip):
    model = copy.copy(clip)
    broken = {"text_model": {**clip.params["text_model"]}}
    del broken["text_model"]["final_layer_norm"]
    with pytest.raises(
        ClipJaxError, match=r"FlaxCLIPTextModel does not match .* missing \(2\): .*final_layer_norm/bias"
    ):
        model.params = broken
    assert model.params is clip.params


def test_params_are_cast_where_the_mask_says(clip):
    mask = jax.tree.map(lambda leaf: leaf.ndim == 2, clip.params)
    low = flatten(clip.to_bf16(clip.params, mask))
    assert {leaf.dtype.name for leaf in low.values() if leaf.ndim == 1} == {"float32"}
    assert {leaf.dtype.name for leaf in low.values() if leaf.ndim == 2} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(clip.to_fp16(clip.params))} == {"float16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(clip.to_fp32(low))} == {"float32"}


def test_without_init_params_are_kept_outside(pipeline, clip):
    model, params = FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", _do_init=False)
    np.testing.assert_array_equal(model(IDS, params=params)[0], clip(IDS)[0])
    for use in (lambda: model.params, lambda: model(IDS), lambda: setattr(model, "params", params)):
        with pytest.raises(ClipJaxError, match="made with _do_init=False"):
            use()


def test_a_pipeline_may_take_the_params_out(pipeline):
    """Maxdiffusion `pipeline_flax_utils.py`: `params = model.params; del model._params`."""
    model = FlaxCLIPTextModel.from_pretrained(str(pipeline / "text_encoder"), from_pt=True)
    params = model.params
    del model._params
    assert model(IDS, params=params)[0].shape == (2, 9, 32)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (FlaxCLIPTextModel, SMALL),
        (FlaxCLIPTextModel, SMALL.to_hf()),
        (FlaxCLIPTextModelWithProjection, SMALL_PROJECTED),
        (FlaxCLIPTextModelWithProjection, {"hidden_size": 32, "num_hidden_layers": 1, "projection_dim": 24}),
        (FlaxT5EncoderModel, SMALL_T5),
    ],
)
def test_models_are_made_from_configs_and_dicts(cls, config):
    model = cls(config, input_shape=(2, 7), seed=3, dtype=jnp.bfloat16, _do_init=False)
    assert model.dtype == jnp.bfloat16
    assert isinstance(model, FlaxPreTrainedModel)
    fields = json.loads(model.config.to_json_string())
    assert fields["model_type"] == ("t5" if cls is FlaxT5EncoderModel else "clip_text_model")
    again = cls(fields, _do_init=False)
    assert again.module == cls(config, _do_init=False).module
    assert again.config == type(again.config)(**fields)
    assert model.required_params == {tuple(path.split("/")) for path in param_shapes(model.module.config)}


def test_a_whole_clip_model_is_read_by_its_text_half():
    whole = {"model_type": "clip", "projection_dim": 24, "text_config": SMALL.to_hf(), "vision_config": {}}
    assert FlaxCLIPTextModelWithProjection(whole, _do_init=False).module.config == SMALL_PROJECTED
    plain = FlaxCLIPTextModel(whole, _do_init=False)
    assert plain.module.config == SMALL
    assert (plain.config.hidden_size, plain.config.max_position_embeddings, plain.config.projection_dim) == (32, 77, 24)


@pytest.mark.slow
def test_random_params_are_seeded():
    models = [FlaxCLIPTextModel(SMALL, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (flatten(model.params)["text_model/encoder/layers/0/mlp/fc1/kernel"] for model in models)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("cls", "config", "error", "message"),
    [
        (FlaxCLIPTextModel, 7, ConfigError, "Expected a config of transformers or of clip_jax, or a dict, found int"),
        (FlaxCLIPTextModel, SMALL_T5, ConfigError, "made from a 'clip_text_model', found 't5'"),
        (FlaxT5EncoderModel, SMALL, ConfigError, "made from a 't5', found 'clip_text_model'"),
        (FlaxT5EncoderModel, {"d_model": 8}, ConfigError, "T5 v1.0"),
        (FlaxCLIPTextModel, {"model_type": "bert"}, ConfigError, "found model_type 'bert'"),
    ],
)
def test_other_configs_are_refused(cls, config, error, message):
    with pytest.raises(error, match=message):
        cls(config, _do_init=False)


def test_bad_calls_are_refused(clip, t5):
    with pytest.raises(ClipJaxError, match=r"dtype must be one of .* found 'int8'"):
        FlaxCLIPTextModel(SMALL, dtype="int8", _do_init=False)
    with pytest.raises(ClipJaxError, match=r"Expected input_ids \[B, L\] of at least one token, found \(9,\)"):
        clip(IDS[0])
    with pytest.raises(ClipJaxError, match="Expected input_ids .* found none"):
        clip(None)
    with pytest.raises(ClipJaxError, match="90 tokens per row, the model has 77"):
        clip(np.zeros((1, 90), int))
    for ids in (IDS, IDS.tolist()):
        with pytest.raises(ClipJaxError, match="Expected ids from 0 to 9999, .* found [0-9]+ to 49407"):
            t5(ids)
    with pytest.raises(ClipJaxError, match=r"Expected arrays \[B, L\], found rows of several lengths"):
        clip([[1, 2], [3]])
    for model, ids in ((clip, IDS), (t5, T5_IDS)):
        with pytest.raises(ClipJaxError, match=r"shape of input_ids, \(2, 9\), found \(2, 8\)"):
            model(ids, np.ones((2, 8), int))
    for wrong in (-1, 77):
        with pytest.raises(ClipJaxError, match=f"Expected position_ids from 0 to 76, .* found {wrong} to {wrong}"):
            clip(IDS, None, np.full((1, 9), wrong))
    with pytest.raises(ClipJaxError, match=r"train=True means dropout, of which the config asks for 0.1"):
        t5(T5_IDS, train=True)  # transformers' default, where the config does not say
    t5.config.dropout_rate = 0.0
    assert t5(T5_IDS, train=True).last_hidden_state.shape == (2, 9, SMALL_T5.d_model)


class Tensor:
    """What another library has for an array: numpy's functions of reduction are not for it."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype)

    def min(self, dim):
        raise NotImplementedError

    max = min


def test_ids_of_another_library(clip):
    mask = np.arange(9) != 3
    found = clip(Tensor(IDS), Tensor(mask[None])).last_hidden_state
    np.testing.assert_array_equal(found, clip(IDS, mask[None]).last_hidden_state)


def test_neither_torch_nor_transformers_is_needed(pipeline):
    code = (
        "import sys, numpy as np; from clip_jax.compat import FlaxCLIPTextModel\n"
        f"model = FlaxCLIPTextModel.from_pretrained({str(pipeline)!r}, subfolder='text_encoder')\n"
        "model(np.zeros((1, 4), np.int64)); model.save_pretrained(sys.argv[1])\n"
        "print([name for name in ('torch', 'transformers', 'diffusers') if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(pipeline.parent / "again")], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("wrong", [-1, SMALL_T5.vocab_size])
def test_ids_next_to_those_that_there_are_are_refused(t5, wrong):
    ids = T5_IDS.copy()
    ids[0, 3] = wrong
    with pytest.raises(ClipJaxError, match=f"Expected ids from 0 to 9999, .* found .*{wrong}"):
        t5(ids)


def test_what_a_config_becomes_is_a_copy():
    config = FlaxCLIPTextModel(SMALL, _do_init=False).config
    before = config.to_json_string()
    config.to_dict()["architectures"].append("another")
    config.to_dict()["hidden_size"] = 7
    assert config.to_json_string() == before


def test_dropout_goes_by_the_name_of_published_configs_too(clip):
    model = copy.copy(clip)
    model.config = copy.copy(clip.config)
    model.config.dropout = 0.1
    with pytest.raises(ClipJaxError, match="train=True means dropout, of which the config asks for 0.1"):
        model(IDS, train=True)


def test_init_weights_refuses_params_that_are_not_whole(clip):
    with pytest.raises(ClipJaxError, match=r"FlaxCLIPTextModel does not match .* missing \(36\)"):
        clip.init_weights(jax.random.key(0), params={"text_model": {}})


def test_whole_numbers_are_not_cast(clip):
    params = {"step": jnp.arange(3), "a": jnp.ones(2)}
    for cast, dtype in ((clip.to_bf16, "bfloat16"), (clip.to_fp16, "float16"), (clip.to_fp32, "float32")):
        assert {name: leaf.dtype.name for name, leaf in cast(params).items()} == {"step": "int32", "a": dtype}


def test_the_text_config_dict_of_a_whole_clip_model_wins():
    """As in transformers, which wrote both."""
    act = {"hidden_act": "gelu"}
    whole = {"model_type": "clip", "text_config": SMALL.to_hf(), "text_config_dict": act, "vision_config": {}}
    model = FlaxCLIPTextModel(whole, _do_init=False)
    assert (model.module.config.hidden_act, model.config.hidden_act, SMALL.hidden_act) == ("gelu", "gelu", "quick_gelu")
