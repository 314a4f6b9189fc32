"""ClipTextModel against torch: transformers' CLIPTextModel on the same weights, eager attention, float32."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import clip_jax
from clip_jax import ClipTextConfig, ClipTextModel
from clip_jax.compat import FlaxCLIPTextModelWithProjection
from clip_jax.models import functional
from tests.checkpoints import TINY, TINY_H, hf_state, load_as_sd15, write_text_encoder

# Two towers of 23 layers, one in torch and one in XLA, add float32 products in different orders.
TOLERANCE = 2e-5
EOS = 49407


def torch_model(config):
    """Transformers' model of an architecture, with its own random weights."""
    cls = transformers.CLIPTextModel if config.projection_dim is None else transformers.CLIPTextModelWithProjection
    model = cls(transformers.CLIPTextConfig(**config.to_hf()))
    model.set_attn_implementation("eager")
    return model.eval()


def reference(config, state):
    """The torch model with a state dict in it."""
    model = torch_model(config)
    # transformers 5.6 and later has dropped the prefix from the plain model.
    dropped = "text_model." if config.projection_dim is None else ""
    model.load_state_dict({k.removeprefix(dropped): torch.from_numpy(v) for k, v in state.items()}, strict=True)
    return model


def load_params(folder, config, state):
    """Our params of the same state dict, by way of a checkpoint folder."""
    return load_as_sd15(write_text_encoder(folder, config.to_hf(), state), config).params["clip_l"]


def random_ids(rows, length, pad=EOS):
    rng = np.random.default_rng(length)
    ids = rng.integers(0, 49000, (rows, length), dtype=np.int32)
    for row, end in enumerate(rng.integers(1, length, rows)):
        ids[row, end], ids[row, end + 1 :] = EOS, pad
    return ids


def torch_outputs(model, ids, mask=None):
    with torch.no_grad():
        out = model(
            torch.from_numpy(ids).long(),
            attention_mask=None if mask is None else torch.from_numpy(mask),
            output_hidden_states=True,
        )
    return out


def test_a_small_vocabulary_pools_where_transformers_does(tmp_path):
    """As in the pipelines that diffusers tests with: `eos_token_id: 2`, and another id in the tokenizer."""
    config = dataclasses.replace(TINY_H, vocab_size=1000, eos_token_id=2, projection_dim=40)
    state = hf_state(config)
    ids = np.array([[0, 5, 22, 22, 22], [0, 7, 2, 9, 22]], np.int32)
    wanted = torch_outputs(reference(config, state), ids).text_embeds
    folder = write_text_encoder(tmp_path / "small", config.to_hf(), state)
    found = FlaxCLIPTextModelWithProjection.from_pretrained(folder)(ids).text_embeds
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
    assert not np.allclose(found[0], found[1], atol=1e-2)


OPTIONS = {
    "quick_gelu": TINY,
    "gelu": TINY_H,
    "tanh gelu": dataclasses.replace(TINY, hidden_act="gelu_new"),
    "one layer, one head": dataclasses.replace(TINY, num_hidden_layers=1, num_attention_heads=1),
    "epsilon": dataclasses.replace(TINY, layer_norm_eps=1e-3),
    "248 positions": dataclasses.replace(TINY, max_position_embeddings=248),
    "projection": dataclasses.replace(TINY_H, projection_dim=24),
    "vocabulary with added tokens": dataclasses.replace(TINY, vocab_size=49410),
}


@pytest.fixture(scope="module", params=OPTIONS)
def pair(request, tmp_path_factory):
    """A torch model and our params, for each of the options."""
    config = OPTIONS[request.param]
    state = hf_state(config)
    return config, reference(config, state), load_params(tmp_path_factory.mktemp("pair"), config, state)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "padding mask"])
def test_every_output(pair, masked, assert_parity):
    config, model, params = pair
    ids = random_ids(3, config.max_position_embeddings)
    mask = np.ones_like(ids)
    if masked:
        mask[0, 20:], mask[1, 5], mask[2, 1:3] = 0, 0, 0
    theirs = torch_outputs(model, ids, mask if masked else None)
    ours = ClipTextModel(config).apply(
        {"params": params}, jnp.asarray(ids), attention_mask=jnp.asarray(mask) if masked else None
    )
    name = "tiny models over all options"
    for ours_h, theirs_h in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_parity(ours_h, theirs_h, TOLERANCE, name)
    assert_parity(ours.last_hidden_state, theirs.last_hidden_state, TOLERANCE, name)
    if config.projection_dim is None:
        assert_parity(ours.pooler_output, theirs.pooler_output, TOLERANCE, name)
    else:
        assert_parity(ours.text_embeds, theirs.text_embeds, TOLERANCE, name)


def test_config_written_by_transformers_is_read(pair):
    config, model, _ = pair
    assert ClipTextConfig.from_hf(model.config.to_dict() | {"architectures": [type(model).__name__]}) == config


# Negative controls: each of these faults must be seen by the very comparison that passes without it.


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    state = hf_state(TINY)
    ids = random_ids(2, 77)
    theirs = torch_outputs(reference(TINY, state), ids).last_hidden_state
    return load_params(tmp_path_factory.mktemp("sound"), TINY, state), ids, theirs


def compare(params, ids, theirs, assert_parity, config=TINY):
    ours = ClipTextModel(config).apply({"params": params}, jnp.asarray(ids)).last_hidden_state
    assert_parity(ours, theirs, TOLERANCE)


def test_without_a_fault_the_comparison_passes(sound, assert_parity):
    compare(*sound, assert_parity)


def test_control_mask_shifted_by_one(sound, assert_parity, monkeypatch, trace_anew):
    shifted = jnp.tril(jnp.ones((77, 77), bool), 1)[None, None]
    monkeypatch.setattr(functional, "causal_mask", lambda *_: shifted)
    trace_anew()
    with pytest.raises(AssertionError, match="max abs error"):
        compare(*sound, assert_parity)


@pytest.mark.parametrize(
    ("module", "one", "other"),
    [
        ("self_attn", "q_proj", "k_proj"),
        ("self_attn", "v_proj", "out_proj"),
        (None, "layer_norm1", "layer_norm2"),
    ],
)
def test_control_two_weights_swapped(sound, assert_parity, module, one, other):
    params, ids, theirs = sound
    faulty = jax.tree.map(lambda x: x, params)
    layer = faulty["text_model"]["encoder"]["layers"]["1"]
    layer = layer if module is None else layer[module]
    layer[one], layer[other] = layer[other], layer[one]
    with pytest.raises(AssertionError, match="max abs error"):
        compare(faulty, ids, theirs, assert_parity)


@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_control_wrong_activation(sound, assert_parity, act):
    with pytest.raises(AssertionError, match="max abs error"):
        compare(*sound, assert_parity, config=dataclasses.replace(TINY, hidden_act=act))


def test_control_tanh_for_exact_gelu(assert_parity, tmp_path):
    state = hf_state(TINY_H)
    ids = random_ids(2, 77)
    theirs = torch_outputs(reference(TINY_H, state), ids).last_hidden_state
    tanh = dataclasses.replace(TINY_H, hidden_act="gelu_new")
    with pytest.raises(AssertionError, match="max abs error"):
        compare(load_params(tmp_path, TINY_H, state), ids, theirs, assert_parity, config=tanh)


def test_control_final_norm_left_out(sound, assert_parity):
    params, ids, theirs = sound
    ours = ClipTextModel(TINY).apply({"params": params}, jnp.asarray(ids)).hidden_states[-1]
    with pytest.raises(AssertionError, match="max abs error"):
        assert_parity(ours, theirs, TOLERANCE)


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_full_size(name, assert_parity, tmp_path):
    """The real architectures with torch's own initialisation, saved by transformers and loaded by us."""
    config = clip_jax.FAMILIES[name].towers[0].config
    torch.manual_seed(0)
    model = torch_model(config)
    model.save_pretrained(tmp_path)
    encoder = clip_jax.load(tmp_path)
    assert encoder.family.name == name
    prompts = ["a cat sitting on a windowsill, 35mm photograph!", "blurry, low quality"]
    tokens = encoder.tokenize(*prompts)
    (tower,) = encoder.family.towers
    ids = np.concatenate([tokens.uncond[tower.name], tokens.cond[tower.name]])
    theirs = torch_outputs(model, ids).last_hidden_state.numpy()
    del model
    gc.collect()
    ours = np.asarray(encoder(*prompts).prompt_embeds)
    assert_parity(ours, theirs, TOLERANCE, f"{name} at full size")

    half = clip_jax.load(tmp_path, dtype="bfloat16")
    low = np.asarray(half(*prompts).prompt_embeds, np.float32)
    relative = np.linalg.norm(low - ours) / np.linalg.norm(ours)
    assert 0 < relative < 0.02
