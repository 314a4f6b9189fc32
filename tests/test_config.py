"""ClipTextConfig: presets, config.json of transformers 4 and 5, and what is refused."""

import dataclasses

import pytest

from clip_jax import ClipTextConfig, ConfigError
from tests.checkpoints import TINY

PRESETS = [ClipTextConfig.sd15(), ClipTextConfig.sd21(), ClipTextConfig.sdxl_clip_g()]

# As transformers 4 wrote it for SD 1.5: legacy special tokens, `torch_dtype`.
SD15_V4 = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}


@pytest.mark.parametrize("config", [*PRESETS, TINY, dataclasses.replace(TINY, max_position_embeddings=248)])
def test_to_hf_round_trips(config):
    assert ClipTextConfig.from_hf(config.to_hf()) == config


def test_config_of_transformers_4_is_the_preset():
    assert ClipTextConfig.from_hf(SD15_V4) == ClipTextConfig.sd15()


def test_projection_is_that_of_the_class_not_of_the_field():
    with_projection = {**SD15_V4, "architectures": ["CLIPTextModelWithProjection"]}
    assert ClipTextConfig.from_hf(SD15_V4).projection_dim is None
    assert ClipTextConfig.from_hf(with_projection).projection_dim == 768


def test_whole_clip_model_gives_its_text_half_with_the_outer_projection():
    text = {k: v for k, v in SD15_V4.items() if k != "architectures"}
    config = ClipTextConfig.from_hf(
        {
            "model_type": "clip",
            "projection_dim": 512,
            "text_config": text,
            "vision_config": {"hidden_size": 1},
        }
    )
    assert config == dataclasses.replace(ClipTextConfig.sd15(), projection_dim=512)


def test_absent_fields_are_transformers_defaults():
    config = ClipTextConfig.from_hf({"model_type": "clip_text_model"})
    assert (config.hidden_size, config.num_attention_heads, config.hidden_act) == (512, 8, "quick_gelu")


@pytest.mark.parametrize(("vocab_size", "expected"), [(49408, 49407), (49410, 49407), (1000, 2)])
def test_legacy_end_of_text_id_is_the_real_one(vocab_size, expected):
    assert ClipTextConfig.from_hf({**SD15_V4, "vocab_size": vocab_size}).eos_token_id == expected


def test_unknown_fields_warn_by_name():
    with pytest.warns(UserWarning, match="ignored: flux_capacitor, zebra"):
        ClipTextConfig.from_hf({**SD15_V4, "zebra": 1, "flux_capacitor": 2})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_act": "swish"}, "hidden_act must be one of quick_gelu, gelu, .* found 'swish'"),
        ({"model_type": "t5"}, "found model_type 't5'"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key'.* cannot honour",
        ),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"use_attention_mask": True}, "use_attention_mask=True"),
        ({"attention_type": "linear"}, "attention_type='linear'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"num_attention_heads": 7}, "multiple of num_attention_heads, found 768 and 7"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive int, found 0"),
        ({"hidden_size": "768"}, "hidden_size must be a positive int, found '768'"),
        ({"vocab_size": 10**20}, "vocab_size must be at most 16777216, found 1000"),
        ({"num_hidden_layers": 10**5}, "num_hidden_layers must be at most 1000, found 100000"),
        ({"eos_token_id": [49407, 2]}, r"eos_token_id must be one token id .* found \[49407, 2\]"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be a positive float"),
    ],
)
def test_values_that_cannot_be_honoured_are_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        ClipTextConfig.from_hf({**SD15_V4, **changed})


def test_not_a_dict_is_refused():
    with pytest.raises(ConfigError, match="found list"):
        ClipTextConfig.from_hf([])
