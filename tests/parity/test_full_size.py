"""bigG at its real size, from a folder to embeddings; CLIP-L and H are in test_clip, T5's 24 layers in test_t5."""

import gc
import shutil

import numpy as np
import pytest
import torch

import clip_jax
from tests.parity.pipelines import build, new_clip_model, reference

# Two towers of 31 layers, one in torch and one in XLA, add float32 products in different orders.
TOLERANCE = 2e-5


@pytest.fixture
def folder(tmp_path):
    """Deleted after the test, where pytest would keep the 2.8 GB for some runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_big_g(folder, assert_parity):
    """The penultimate layer and the projected row, by way of a refiner, whose only encoder it is."""
    config = clip_jax.FAMILIES["sdxl_refiner"].towers[0].config
    assert (config.num_hidden_layers, config.hidden_size, config.projection_dim) == (32, 1280, 1280)
    torch.manual_seed(0)
    pipeline = build("sdxl_refiner", folder, clip_g=new_clip_model(config))
    arguments = {
        "prompt": "a cat sitting on a windowsill, 35mm photograph!",
        "negative_prompt": "blurry, low quality",
    }
    theirs = reference(pipeline, "sdxl_refiner", **arguments)
    del pipeline
    gc.collect()
    encoder = clip_jax.load(folder / "saved")
    assert encoder.family == clip_jax.FAMILIES["sdxl_refiner"]
    ours = encoder(**arguments)
    assert theirs["prompt_embeds"].shape == (2, 77, 1280)
    for name, array in theirs.items():
        assert np.abs(array).max() > 1
        assert_parity(getattr(ours, name), array, TOLERANCE, "bigG at full size")
