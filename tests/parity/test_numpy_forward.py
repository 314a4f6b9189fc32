"""The float64 NumPy forward passes against torch in float64: transformers' models, and open_clip's text transformer."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

from clip_jax import ClipTextConfig, T5EncoderConfig
from clip_jax.convert import numpy_forward
from clip_jax.convert.numpy_forward import clip_forward, open_clip_forward, t5_forward
from tests.checkpoints import hf_state, t5_state
from tests.formats.names import open_clip as open_clip_names

TOLERANCE = 1e-12  # values are below 10
EOS = 90

CLIP = ClipTextConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    hidden_act="quick_gelu",
    vocab_size=100,
    max_position_embeddings=20,
    projection_dim=24,
    eos_token_id=EOS,
)
T5 = T5EncoderConfig(d_model=40, d_kv=8, d_ff=72, num_layers=3, num_heads=5, vocab_size=100)


def random_ids(length):
    ids = np.random.default_rng(length).integers(0, EOS, (3, length))
    ids[0, 3:], ids[1:, -1] = EOS, EOS
    return ids


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_clip_is_transformers_clip(act):
    config, ids = dataclasses.replace(CLIP, hidden_act=act), random_ids(20)
    state = hf_state(config)
    # Eager attention takes its softmax in float32.
    fields = transformers.CLIPTextConfig(**config.to_hf(), attn_implementation="sdpa")
    model = transformers.CLIPTextModelWithProjection(fields).double().eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=True)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), output_hidden_states=True)
    found = clip_forward(state.__getitem__, config, ids)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        close(ours, theirs)
    close(found.last_hidden_state, expected.last_hidden_state)
    close(found.text_embeds, expected.text_embeds)


def test_t5_is_transformers_t5(monkeypatch):
    # Its norms and its softmax are in float32, whatever the model is in.
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    state, ids = t5_state(T5), random_ids(60)
    model = transformers.T5EncoderModel(transformers.T5Config(**T5.to_hf())).double().eval()
    tied = {**state, "encoder.embed_tokens.weight": state["shared.weight"]}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in tied.items()}, strict=True)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).last_hidden_state
    assert expected.dtype == torch.float64
    close(t5_forward(state.__getitem__, T5, ids), expected)


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 16), (6, 100), (33, 128), (64, 512), (4, 2)])
def test_the_buckets_are_those_of_transformers_in_float32(buckets, farthest):
    """Also where a logarithm is a whole number, as at distance 64."""
    config = dataclasses.replace(T5, relative_attention_num_buckets=buckets, relative_attention_max_distance=farthest)
    distance = torch.arange(600)[None] - torch.arange(600)[:, None]
    expected = T5Attention._relative_position_bucket(distance, True, buckets, farthest)
    np.testing.assert_array_equal(numpy_forward._buckets(600, config), expected)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_openclip_is_open_clips_text_transformer(act):
    transformer = pytest.importorskip("open_clip.transformer", reason="open_clip_torch is not installed")
    config, ids = dataclasses.replace(CLIP, hidden_act=act), random_ids(20)
    model = transformer.TextTransformer(
        context_length=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        output_dim=config.projection_dim,
        output_tokens=True,
        act_layer=transformer.QuickGELU if act == "quick_gelu" else torch.nn.GELU,
    )
    state = open_clip_names(hf_state(config))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=True)
    model = model.double().eval()
    with torch.no_grad():
        expected, tokens = (out.numpy() for out in model(torch.from_numpy(ids)))
    found = open_clip_forward(state.__getitem__, config, ids)
    close(found.text_embeds, expected)
    close(found.last_hidden_state, tokens)
    # The rows of q, k and v in another order.
    in_proj = "transformer.resblocks.0.attn.in_proj_weight"
    rolled = {**state, in_proj: np.roll(state[in_proj], config.hidden_size, axis=0)}
    assert np.abs(open_clip_forward(rolled.__getitem__, config, ids).text_embeds - expected).max() > 1e-2
