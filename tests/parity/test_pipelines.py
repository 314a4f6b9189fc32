"""The whole way, folder to embeddings, against the `encode_prompt` of diffusers' own pipelines."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import clip_jax
from clip_jax.tokenizers import ClipTokenizer
from tests.checkpoints import TINY, TINY_H

TOLERANCE = 2e-5
CONFIGS = {"sd15": (TINY, "<|endoftext|>"), "sd21": (TINY_H, "!")}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """Diffusers' pipeline around a small random text encoder, and our encoder of its saved folder."""
    config, pad = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    ClipTokenizer.packaged(pad).save(folder / "made")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "made")
    torch.manual_seed(1)
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config.to_hf())).eval()
    for parameter in text_encoder.parameters():  # far from the small values of the initialisation
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "saved")
    return pipeline, clip_jax.load(folder / "saved", family=request.param)


def encode_prompt(pipeline, prompt, negative=None, guidance=True):
    with torch.no_grad():
        cond, uncond = pipeline.encode_prompt(prompt, "cpu", 1, guidance, negative_prompt=negative)
    return np.concatenate([uncond, cond]) if guidance else np.asarray(cond)


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("a cat sitting on a windowsill", None),
        ("a cat!", ""),
        ("Ünïcode 猫咪 🐈 don't <|endoftext|> stop", "blurry!! 100%"),
        ("", "only a negative"),
        (["one", "two words", "three! of them"], None),
        (["one", "two words"], ["bad", "worse, worst"]),
    ],
)
def test_prompt_embeds(pair, prompt, negative, assert_parity):
    pipeline, encoder = pair
    ours = encoder(prompt, negative_prompt=negative).prompt_embeds
    name = f"{encoder.family.name}, encode_prompt of diffusers"
    assert_parity(ours, encode_prompt(pipeline, prompt, negative), TOLERANCE, name)


def test_a_str_negative_for_a_batch_is_diffusers_list_of_copies(pair, assert_parity):
    pipeline, encoder = pair
    theirs = encode_prompt(pipeline, ["a", "b"], ["bad", "bad"])
    assert_parity(encoder(["a", "b"], negative_prompt="bad").prompt_embeds, theirs, TOLERANCE)


def test_guidance_off(pair, assert_parity):
    pipeline, encoder = pair
    ours = encoder(["a cat", "a dog"], guidance=False).prompt_embeds
    assert_parity(ours, encode_prompt(pipeline, ["a cat", "a dog"], guidance=False), TOLERANCE)


def test_truncation(pair, assert_parity):
    pipeline, encoder = pair
    long = "a photograph of an astronaut riding a horse, " * 12
    with pytest.warns(UserWarning, match="This text was dropped"):
        ours = encoder(long, overflow="truncate").prompt_embeds
    assert_parity(ours, encode_prompt(pipeline, long), TOLERANCE)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip(pair, skip, assert_parity):
    """Diffusers' own `clip_skip` raises on transformers >= 5.6: its two lines, written out."""
    pipeline, encoder = pair
    theirs = encode_prompt(pipeline, "a cat", "bad")
    (ids,) = encoder.tokenize("a cat", guidance=False).cond.values()
    with torch.no_grad():
        hidden_states = pipeline.text_encoder(
            torch.from_numpy(ids).long(), output_hidden_states=True
        ).hidden_states
        theirs[1:] = pipeline.text_encoder.final_layer_norm(hidden_states[-(skip + 1)]).numpy()
    ours = encoder("a cat", negative_prompt="bad", clip_skip=skip).prompt_embeds
    assert_parity(ours, theirs, TOLERANCE)


def test_the_other_pad_token_is_seen(pair, assert_parity):
    """Negative control: padding with the other family's token must not pass."""
    pipeline, encoder = pair
    other = "!" if encoder.family.name == "sd15" else "<|endoftext|>"
    (tower,) = encoder.family.towers
    wrong = clip_jax.TextEncoder(encoder.family, encoder.params, {tower.name: ClipTokenizer.packaged(other)})
    with pytest.raises(AssertionError, match="max abs error"):
        assert_parity(wrong("a cat", "bad").prompt_embeds, encode_prompt(pipeline, "a cat", "bad"), TOLERANCE)


def test_rows_the_other_way_round_are_seen(pair, assert_parity):
    pipeline, encoder = pair
    ours = encoder("a cat", "bad").prompt_embeds
    with pytest.raises(AssertionError, match="max abs error"):
        assert_parity(jnp.flip(ours, 0), encode_prompt(pipeline, "a cat", "bad"), TOLERANCE)
