"""`clip_jax.compat` beside transformers 5 itself: its config objects, its weights, its namespace, torch's numbers."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import clip_jax.compat
from clip_jax.compat import FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection, FlaxT5EncoderModel
from clip_jax.tokenizers import ClipTokenizer
from clip_jax.tokenizers.stand_in import stand_in_t5_tokenizer

TOLERANCE = 2e-5  # that of parity
ROOT = Path(__file__).parents[2]

IDS = np.random.RandomState(0).randint(3, 98, (2, 12))
IDS[:, 9:] = 98

MODELS = {
    "CLIPTextModel": (
        transformers.CLIPTextConfig(
            vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            eos_token_id=98,
        ),
        FlaxCLIPTextModel,
    ),
    "CLIPTextModelWithProjection": (
        transformers.CLIPTextConfig(
            vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            eos_token_id=98, projection_dim=24, hidden_act="gelu",
        ),
        FlaxCLIPTextModelWithProjection,
    ),
    "T5EncoderModel": (
        transformers.T5Config(
            vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"
        ),
        FlaxT5EncoderModel,
    ),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def case(request, tmp_path):
    """The torch model, with norms and biases away from the identity, and its folder."""
    config, cls = MODELS[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, request.param)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "torch")
    return model, cls, tmp_path


def outputs(torch_model, ids):
    with torch.no_grad():
        out = torch_model(torch.tensor(ids), output_hidden_states=True)
    kept = ("last_hidden_state", "pooler_output", "text_embeds", "hidden_states")
    return {name: out[name] for name in kept if name in out}


def check(assert_parity, found, wanted):
    for name, array in wanted.items():
        pairs = zip(found[name], array, strict=True) if isinstance(array, tuple) else [(found[name], array)]
        for ours, theirs in pairs:
            assert_parity(ours, theirs.numpy(), TOLERANCE, "clip_jax.compat, on folders of transformers 5")


def test_a_folder_of_transformers_5(case, assert_parity):
    reference, cls, folder = case
    model = cls.from_pretrained(folder / "torch")
    found = model(IDS, output_hidden_states=True)
    wanted = outputs(reference, IDS)
    if cls is FlaxCLIPTextModelWithProjection:
        wanted.pop("pooler_output", None)  # the old class had none
    assert found.keys() == wanted.keys()
    check(assert_parity, found, wanted)


def test_its_config_objects_are_taken_and_kept(case):
    reference, cls, folder = case
    model = cls(reference.config, dtype=jnp.bfloat16, _do_init=False)
    assert model.config is reference.config
    assert model.module.config == cls.from_pretrained(folder / "torch").module.config
    assert json.loads(model.config.to_json_string())["vocab_size"] == 99
    assert model(IDS, params=model.init_weights(jax.random.key(0)))[0].shape[0] == 2


def test_what_is_saved_is_read_by_torch(case, assert_parity):
    reference, cls, folder = case
    cls.from_pretrained(folder / "torch").save_pretrained(folder / "ours")
    again, info = type(reference).from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, array in reference.state_dict().items():
        assert torch.equal(again.state_dict()[name], array), name


def test_names_are_looked_up_on_transformers(case):
    """As maxdiffusion's `pipeline_flax_utils.py` does for each entry of `model_index.json`."""
    reference, _, folder = case
    name = type(reference).__name__
    assert not hasattr(transformers, f"Flax{name}")
    clip_jax.compat.install()
    try:
        library = importlib.import_module("transformers")
        found = getattr(library, f"Flax{name}")
        assert issubclass(found, library.FlaxPreTrainedModel)
        assert not issubclass(library.CLIPTokenizer, library.FlaxPreTrainedModel)
        model, params = found.from_pretrained(folder / "torch", _do_init=False)
        assert model(IDS, params=params)[0].shape[0] == 2
        assert type(model).__module__.split(".")[0] == "transformers"
        from transformers import FlaxCLIPTextModel as imported

        assert imported is FlaxCLIPTextModel
    finally:
        clip_jax.compat.uninstall()
    assert not hasattr(transformers, f"Flax{name}")


@pytest.mark.parametrize("case", ["CLIPTextModel", "T5EncoderModel"], indirect=True)
def test_the_loading_functions_for_maxdiffusion(case):
    """`examples/maxdiffusion_text_encoders.py`, with a config as maxdiffusion's is: no such key is a ValueError."""
    reference, cls, folder = case

    class Config:
        weights_dtype = jnp.dtype("bfloat16")
        max_sequence_length = 12
        clip_model_name_or_path = t5xxl_model_name_or_path = str(folder)
        clip_model_subfolder = t5xxl_model_subfolder = "torch"

        def __getattr__(self, name):
            raise ValueError(f"no {name}")

    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "maxdiffusion_text_encoders.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    tokenizer = ClipTokenizer.packaged() if cls is FlaxCLIPTextModel else stand_in_t5_tokenizer()
    tokenizer.save(folder)
    kind = "clip" if cls is FlaxCLIPTextModel else "t5"
    encoder, tokenizer = getattr(example, f"load_{kind}_encoder_and_tokenizer")(Config())
    assert len(tokenizer("a cat", padding="max_length").input_ids) == {"clip": 77, "t5": 12}[kind]
    with torch.no_grad():
        wanted = reference(torch.tensor(IDS))["pooler_output" if kind == "clip" else "last_hidden_state"].numpy()
    found = encoder(IDS)
    assert found.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(found, np.float32) - wanted) <= 0.02 * np.linalg.norm(wanted)


def test_text_features_of_a_whole_clip(tmp_path, assert_parity):
    """As those who have `CLIPModel` ask for them: texts padded to the longest, with a mask of the pads."""
    text, _ = MODELS["CLIPTextModelWithProjection"]
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    torch.manual_seed(0)
    reference = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path)
    sizes = np.random.RandomState(1).randint(2, 31, 40)
    ids = np.random.RandomState(2).randint(3, 98, (40, 30))
    mask = np.arange(30) < sizes[:, None]
    ids = np.where(mask, ids, 98)
    ids[np.arange(40), sizes - 1] = 98
    with torch.no_grad():
        wanted = reference.get_text_features(torch.tensor(ids), attention_mask=torch.tensor(mask).long())
    wanted = getattr(wanted, "pooler_output", wanted).numpy()  # transformers 5 returns the pooled output beside others
    assert wanted.shape == (40, 24)
    model = FlaxCLIPTextModelWithProjection.from_pretrained(tmp_path)
    found = model.get_text_features(ids, attention_mask=mask, batch_size=16)
    assert_parity(found, wanted, TOLERANCE, "clip_jax.compat, on folders of transformers 5")
    with pytest.raises(AssertionError):  # texts that change places
        assert_parity(found[::-1], wanted, TOLERANCE, "clip_jax.compat, on folders of transformers 5")
