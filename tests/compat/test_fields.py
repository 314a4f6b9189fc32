"""Fields of the config as arguments of `from_pretrained`: they are set before the model is built.

The numbers are those of transformers 4.57.6, whose Flax classes were given the same arguments and the models of
tests/oracle/cases.py.
"""

import copy
import json
import shutil
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import clip_jax.compat
from clip_jax import CheckpointError, ClipJaxError, ConfigError, T5EncoderConfig
from clip_jax.compat import CLIPTextEncoder, FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection, FlaxT5EncoderModel
from clip_jax.compat.config import HfConfig, with_fields
from clip_jax.params.shapes import flatten, unflatten
from tests.checkpoints import TINY_H, digests, hf_state, write_clip_model
from tests.compat.conftest import IDS, SMALL, SMALL_T5, T5_IDS
from tests.oracle import cases

TOLERANCE = 2e-5  # as in tests/golden

# Model, arguments, and of every output of the first row of `cases.IDS` the first four numbers, at its last token.
OLD = [
    ("clip_l", {}, [[-1.007766, -1.1727, 0.82022, -0.122025], [-1.919672, -0.921343, 0.593415, -0.057453]]),
    (
        "clip_l",
        {"num_hidden_layers": 2},
        [[-0.842869, -0.643263, 0.856566, 0.326899], [-1.892102, -0.252088, 1.089498, 0.079461]],
    ),
    (
        "clip_l",
        {"hidden_act": "gelu"},
        [[-1.013071, -1.172802, 0.826603, -0.125086], [-1.931956, -0.91613, 0.601191, -0.054509]],
    ),
    (
        "clip_l",
        {"layer_norm_eps": 0.01},
        [[-1.016393, -1.170055, 0.817737, -0.135507], [-1.928297, -0.931985, 0.587319, -0.074271]],
    ),
    (
        "clip_l",
        {"eos_token_id": 50},
        [[-1.007766, -1.1727, 0.82022, -0.122025], [-1.941522, -0.597183, 1.125708, -1.622723]],
    ),
    (
        "clip_l",
        {"num_attention_heads": 2},
        [[-0.492491, -0.956377, 0.792899, -0.349588], [-1.154216, -1.107138, 0.322006, 0.156564]],
    ),
    (
        "clip_g",
        {"num_hidden_layers": 2, "hidden_act": "quick_gelu"},
        [[1.009348, -0.963608, -0.103847, -0.002204], [-0.842869, -0.643263, 0.856566, 0.326899]],
    ),
    ("t5", {"num_layers": 2}, [[0.672131, -0.158064, 0.026031, 0.07455]]),
    ("t5", {"num_hidden_layers": 2}, [[0.672131, -0.158064, 0.026031, 0.07455]]),
    ("t5", {"layer_norm_epsilon": 0.01}, [[0.781582, -0.557548, -0.763011, 0.822119]]),
    ("t5", {"relative_attention_max_distance": 16}, [[0.701829, -0.62182, -0.236034, 0.12382]]),
]


@pytest.fixture(scope="module")
def old_models(tmp_path_factory):
    """A folder for each model of `OLD`. Read only."""
    folder = tmp_path_factory.mktemp("fields")
    for name in ("clip_l", "clip_g", "t5"):
        cls, fields, _ = cases.MODELS[name]
        if name != "t5":
            fields = {"intermediate_size": 80, "projection_dim": 24, "eos_token_id": cases.EOS, **fields}
        model = getattr(clip_jax.compat, cls)({"vocab_size": cases.VOCABULARY, **fields})
        leaves = {path: cases.weights(path, leaf.shape) for path, leaf in flatten(model.params).items()}
        model.save_pretrained(folder / name, params=unflatten(leaves))
    return folder


@pytest.mark.parametrize(("name", "fields", "wanted"), OLD)
@pytest.mark.filterwarnings("ignore:.*The rest is left aside")
def test_fields_say_what_is_computed_as_they_did(old_models, tmp_path, name, fields, wanted):
    cls = getattr(clip_jax.compat, cases.MODELS[name][0])
    model = cls.from_pretrained(old_models / name, **fields)
    outputs = model(cases.IDS)[:]
    found = [array[0, -1, :4] if array.ndim == 3 else array[0, :4] for array in outputs]
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)

    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        again = cls.from_pretrained(tmp_path)
    for array, same in zip(outputs, again(cases.IDS)[:], strict=True):
        np.testing.assert_array_equal(array, same)


@pytest.mark.slow
def test_blocks_after_those_asked_for_are_left_aside(pipeline, clip, t5):
    """Clip-skip: what remains is the model up to there, and its own params alone."""
    with pytest.warns(UserWarning, match="asks for num_hidden_layers=1, found weights of 2 blocks. The rest") as caught:
        short = FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", num_hidden_layers=1)
    assert [str(warning.filename) for warning in caught] == [__file__]
    assert short.config.num_hidden_layers == 1
    assert {"/".join(path) for path in short.required_params} == flatten(short.params).keys()
    kept = {path: leaf for path, leaf in flatten(clip.params).items() if "/layers/1/" not in path}
    assert flatten(short.params).keys() == kept.keys()
    for path, leaf in flatten(short.params).items():
        np.testing.assert_array_equal(leaf, kept[path], err_msg=path)
    last = short(IDS, output_hidden_states=True).hidden_states[-1]
    np.testing.assert_allclose(last, clip(IDS, output_hidden_states=True).hidden_states[1], atol=2e-6)

    with pytest.warns(UserWarning, match="asks for num_layers=1, found weights of 2 blocks"):
        short, params = FlaxT5EncoderModel.from_pretrained(
            pipeline, subfolder="text_encoder_3", num_layers=1, _do_init=False
        )
    assert flatten(params).keys() == {path for path in flatten(t5.params) if "/block/1/" not in path}
    first = short(T5_IDS, params=params, output_hidden_states=True).hidden_states[0]
    np.testing.assert_array_equal(first, t5(T5_IDS, output_hidden_states=True).hidden_states[0])


def test_a_config_that_is_given_may_ask_for_fewer_blocks(pipeline):
    config = SMALL.to_hf() | {"num_hidden_layers": 1}
    with pytest.warns(UserWarning, match="The rest is left aside"):
        model = FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", config=config)
    assert model.module.config.num_hidden_layers == 1


def test_fields_of_a_whole_clip_are_those_of_its_text_half(tmp_path):
    write_clip_model(tmp_path, SMALL, hf_state(SMALL))
    with pytest.warns(UserWarning, match="The rest is left aside"):
        model = FlaxCLIPTextModel.from_pretrained(tmp_path, num_hidden_layers=1, hidden_act="gelu")
    assert (model.module.config.num_hidden_layers, model.module.config.hidden_act) == (1, "gelu")


def test_wrappers_pass_fields_on(pipeline):
    encoder = CLIPTextEncoder.from_pretrained(str(pipeline), subfolder="text_encoder", hidden_act="gelu")
    assert encoder.model.module.config.hidden_act == "gelu"


def test_blocks_are_never_made_up(pipeline, tmp_path):
    match = r"asks for num_hidden_layers=9, found weights of 2 blocks; none are made up. Set num_hidden_layers to 2 or"
    for config in ({"num_hidden_layers": 9}, {"config": SMALL.to_hf() | {"num_hidden_layers": 9}}):
        with pytest.raises(CheckpointError, match=match):
            FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", **config)
    with pytest.raises(CheckpointError, match="asks for num_layers=3, found weights of 2 blocks"):
        FlaxT5EncoderModel.from_pretrained(pipeline, subfolder="text_encoder_3", num_hidden_layers=3, _do_init=False)

    # A gap is no end: block 0 of 2 is missing.
    shutil.copytree(pipeline / "text_encoder", tmp_path / "gap")
    state = load_file(tmp_path / "gap" / "model.safetensors")
    rest = {key: tensor for key, tensor in state.items() if ".layers.0." not in key}
    save_file(rest, tmp_path / "gap" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \(16\): .*layers.0.*not expected \(16\): .*layers.1"):
        FlaxCLIPTextModel.from_pretrained(tmp_path / "gap", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("cls", "folder", "fields", "error", "match"),
    [
        (
            FlaxCLIPTextModel,
            "text_encoder",
            {"hidden_act": "relu"},
            ConfigError,
            "text_encoder: hidden_act must be one",
        ),
        (FlaxCLIPTextModel, "text_encoder", {"num_hidden_layers": 0}, ConfigError, "must be a positive int, found 0"),
        (FlaxCLIPTextModel, "text_encoder", {"vocab_size": 50}, CheckpointError, r"wrong shape \(1\): .*expected \(50"),
        (FlaxCLIPTextModel, "text_encoder", {"model_type": "bert"}, ConfigError, "found model_type 'bert'"),
        (
            FlaxCLIPTextModel,
            "text_encoder",
            {"num_layers": 1},
            ClipJaxError,
            "no argument 'num_layers', and its config",
        ),
        (FlaxCLIPTextModel, "text_encoder", {"to_dict": 1}, ClipJaxError, "has no argument 'to_dict'"),
        (
            FlaxCLIPTextModelWithProjection,
            "text_encoder_2",
            {"projection_dim": 8},
            CheckpointError,
            r"wrong shape \(1\): .*text_projection",
        ),
        (FlaxT5EncoderModel, "text_encoder_3", {"feed_forward_proj": "relu"}, ConfigError, "T5 v1.0"),
        (FlaxT5EncoderModel, "text_encoder_3", {"hidden_size": 8}, CheckpointError, "wrong shape"),
    ],
)
def test_fields_that_cannot_be_honoured_are_refused(pipeline, cls, folder, fields, error, match):
    with pytest.raises(error, match=match):
        cls.from_pretrained(pipeline, subfolder=folder, **fields)


def test_beside_a_config_there_are_no_fields(pipeline):
    """As with the old classes, where it was a TypeError; the config of the caller is never written to."""
    config = SMALL.to_hf()
    for fields in ({"num_hidden_layers": 1}, {"output_hidden_states": True}):
        with pytest.raises(ClipJaxError, match=f"found {next(iter(fields))} beside config=. Set them in that config"):
            FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", config=config, **fields)
    assert config == SMALL.to_hf()


def test_a_config_that_was_changed_afterwards_is_not_saved(pipeline, tmp_path):
    model = FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder")
    model.config.output_hidden_states = True
    model.save_pretrained(tmp_path)
    before = digests(tmp_path)
    model.config.hidden_act = "gelu"
    with pytest.raises(ConfigError, match="was changed after the model was made from it"):
        model.save_pretrained(tmp_path)
    assert digests(tmp_path) == before
    assert json.loads((tmp_path / "config.json").read_text())["output_hidden_states"] is True


@pytest.mark.parametrize("there", [True, False])
def test_params_that_are_not_the_models_are_not_saved(clip, tmp_path, there):
    """Missing ones, too many, and those of other shapes, all at once, before anything is on disk."""
    folder = tmp_path / "saved"
    if there:
        clip.save_pretrained(folder)
    before = digests(tmp_path)
    leaves = flatten(clip.params)
    norm = "text_model/final_layer_norm"
    wrong = {
        r"not expected \(2\): lora/alpha, lora/down/kernel.* merge a LoRA into them, or leave it out": leaves
        | {"lora/down/kernel": np.ones((32, 2)), "lora/alpha": 1.0},
        rf"missing \(1\): {norm}/bias": {path: leaf for path, leaf in leaves.items() if path != f"{norm}/bias"},
        rf"wrong shape \(1\): {norm}/bias has shape \(31,\)": leaves | {f"{norm}/bias": np.ones(31)},
    }
    for match, params in wrong.items():
        with pytest.raises(CheckpointError, match=match):
            clip.save_pretrained(folder, params=unflatten(params))
    assert digests(tmp_path) == before
    assert folder.exists() == there


def test_a_lora_among_the_models_own_params_is_not_dropped_on_saving(pipeline, tmp_path):
    model = FlaxT5EncoderModel.from_pretrained(pipeline, subfolder="text_encoder_3")
    model.params = {**model.params, "lora": {"a": np.ones(SMALL_T5.d_model)}}
    with pytest.raises(CheckpointError, match=r"not expected \(1\): lora/a"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_names_that_transformers_has_for_other_names():
    fields = T5EncoderConfig(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2).to_hf()
    names = {"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
    for name, own in {**names, "head_dim": "d_kv"}.items():
        assert vars(with_fields(fields, "T5EncoderModel", {name: 16}))[own] == 16


def test_a_config_of_t5_answers_to_those_names_too(pipeline, tmp_path):
    model = FlaxT5EncoderModel.from_pretrained(pipeline, subfolder="text_encoder_3")
    config = copy.deepcopy(model.config)
    assert (config.hidden_size, config.num_hidden_layers) == (SMALL_T5.d_model, SMALL_T5.num_layers)
    assert (config.num_attention_heads, config.head_dim) == (SMALL_T5.num_heads, SMALL_T5.d_kv)
    assert "hidden_size" not in config.to_dict()
    model.config.hidden_size = 5
    assert model.config.d_model == 5
    with pytest.raises(ConfigError, match="config was changed after the model was made"):
        model.save_pretrained(tmp_path)
    both = HfConfig(model_type="t5", hidden_size=1, d_model=2)
    assert (both.hidden_size, both.to_dict()["d_model"]) == (2, 2)
    both.hidden_size = 3
    assert both.hidden_size == both.d_model == 3
    del both.hidden_size
    assert not hasattr(both, "d_model")
    with pytest.raises(AttributeError, match="no field 'n_embd'"):
        _ = config.n_embd
    with pytest.raises(AttributeError, match="no field 'd_model'"):
        _ = FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder").config.d_model


@pytest.mark.slow
def test_a_dropout_of_none_is_none():
    fields = TINY_H.to_hf() | {"attention_dropout": None}
    FlaxCLIPTextModel(fields)(np.ones((1, 4), np.int32), train=True)
