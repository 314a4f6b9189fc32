"""What `export` writes is opened by transformers and diffusers, and computes the same there."""

import json

import diffusers
import numpy as np
import pytest
import torch
import transformers

import clip_jax
from clip_jax import FAMILIES
from clip_jax.convert import convert, export
from tests.formats.model import used, write_pipeline_folder

TOLERANCE = 2e-5
PIPELINES = {"sd15": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}


def exported(folder, family):
    towers = FAMILIES[family].towers
    source = write_pipeline_folder(folder / "source", family, {tower.name: used(tower.name) for tower in towers})
    converted = convert(source, folder / "converted", family=family)
    return clip_jax.load(converted), export(converted, folder / "exported")


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_opens_every_tower(tmp_path, family):
    _, folder = exported(tmp_path, family)
    index = json.loads((folder / "model_index.json").read_text())
    for tower in FAMILIES[family].towers:
        library, name = index[tower.folder]
        assert library == "transformers"
        model, info = getattr(transformers, name).from_pretrained(
            folder, subfolder=tower.folder, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        found, expected = model.state_dict(), used(tower.name)
        for key, array in expected.items():
            key = key if key in found else key.removeprefix("text_model.")
            np.testing.assert_array_equal(found[key].numpy(), array.astype(np.float32), err_msg=key)


@pytest.mark.parametrize("family", PIPELINES)
def test_diffusers_makes_the_same_embeddings(tmp_path, family, assert_parity):
    encoder, folder = exported(tmp_path, family)
    options = {"safety_checker": None, "feature_extractor": None} if family == "sd15" else {}
    pipeline = PIPELINES[family].from_pretrained(folder, unet=None, vae=None, scheduler=None, **options)
    ours = encoder("a cat", negative_prompt="two dogs")
    with torch.no_grad():
        cond, uncond, *pooled = pipeline.encode_prompt(
            "a cat",
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt="two dogs",
        )
    assert_parity(ours.prompt_embeds, torch.cat([uncond, cond]), TOLERANCE)
    if pooled:
        assert_parity(ours.pooled_prompt_embeds, torch.cat(pooled[::-1]), TOLERANCE)
    with pytest.raises(AssertionError, match="max abs error"):
        assert_parity(ours.prompt_embeds, torch.cat([cond, uncond]), TOLERANCE)
