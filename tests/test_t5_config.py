"""T5EncoderConfig: the preset, config.json of transformers 4 and 5, and what is refused."""

import dataclasses

import pytest

from clip_jax.errors import ConfigError
from clip_jax.t5_config import T5EncoderConfig

# As transformers 4 wrote it for FLUX.1 and SD 3.
XXL_V4 = {
    "_name_or_path": "google/t5-v1_1-xxl",
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": 32128,
}
XXL = T5EncoderConfig.xxl()


@pytest.mark.parametrize(
    "config",
    [XXL, dataclasses.replace(XXL, d_model=24, layer_norm_epsilon=1e-5, relative_attention_num_buckets=8)],
)
def test_to_hf_round_trips(config):
    assert T5EncoderConfig.from_hf(config.to_hf()) == config


def test_config_of_transformers_4_is_the_preset():
    assert T5EncoderConfig.from_hf(XXL_V4) == XXL


def test_config_of_transformers_5_is_the_preset():
    changes = {"dtype": "bfloat16", "is_decoder": False, "scale_decoder_outputs": True, "output_past": None}
    assert T5EncoderConfig.from_hf(XXL_V4 | changes) == XXL


@pytest.mark.parametrize(
    "spelling",
    [
        {"dense_act_fn": "gelu_pytorch_tanh"},
        {"dense_act_fn": None, "is_gated_act": None},
        {"feed_forward_proj": "gated-gelu_new"},
        {"feed_forward_proj": "gated-gelu_pytorch_tanh"},
        {"architectures": ["T5ForConditionalGeneration"]},
    ],
)
def test_spellings_of_the_gated_tanh_gelu(spelling):
    assert T5EncoderConfig.from_hf(XXL_V4 | spelling) == XXL


def test_absent_fields_are_transformers_defaults():
    config = T5EncoderConfig.from_hf({"feed_forward_proj": "gated-gelu", "d_model": None})
    assert config == T5EncoderConfig(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8)


def test_unknown_fields_warn_by_name():
    with pytest.warns(UserWarning, match="ignored: flux_capacitor, zebra") as caught:
        T5EncoderConfig.from_hf({**XXL_V4, "zebra": 1, "flux_capacitor": 2})
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"feed_forward_proj": "relu"}, r"feed_forward_proj='relu' \(T5 v1\.0.*expected 'gated-gelu'"),
        ({"feed_forward_proj": None}, r"feed_forward_proj='relu' \(T5 v1\.0"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu'"),
        ({"feed_forward_proj": "gelu_new"}, "feed_forward_proj='gelu_new'"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn='gelu', which T5Encoder cannot honour"),
        ({"is_gated_act": False}, "is_gated_act=False"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"model_type": "umt5"}, "found 'umt5': every block"),
        ({"model_type": "mt5"}, "found 'mt5': .* 250,112"),
        ({"model_type": "clip_text_model"}, r"\(model_type 't5'\), found 'clip_text_model'\."),
        ({"model_type": ["t5"]}, r"\(model_type 't5'\), found \['t5'\]\."),
        ({"num_layers": 10**5}, "num_layers must be at most 1000, found 100000"),
        ({"num_heads": 0}, "num_heads must be a positive int, found 0"),
        ({"d_model": "4096"}, "d_model must be a positive int, found '4096'"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be a positive float"),
        ({"relative_attention_num_buckets": 3}, "must be 4 or more, .* found 3 and 128"),
        ({"relative_attention_max_distance": 8}, "more than a quarter of it, found 32 and 8"),
    ],
)
def test_values_that_cannot_be_honoured_are_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        T5EncoderConfig.from_hf({**XXL_V4, **changed})


def test_not_a_dict_is_refused():
    with pytest.raises(ConfigError, match="found list"):
        T5EncoderConfig.from_hf([])
