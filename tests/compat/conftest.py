"""Small models of each class, on disk and loaded."""

import dataclasses

import numpy as np
import pytest

from clip_jax.compat import FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection, FlaxT5EncoderModel
from tests.checkpoints import TINY, TINY_T5, hf_state, t5_state, write_text_encoder

IDS = np.random.RandomState(0).randint(3, 9000, (2, 9)).astype(np.int64)
IDS[:, 6:] = 49407

T5_IDS = IDS % 9000

SMALL = dataclasses.replace(TINY, num_hidden_layers=2)
SMALL_PROJECTED = dataclasses.replace(SMALL, projection_dim=24)
SMALL_T5 = dataclasses.replace(TINY_T5, num_layers=2, vocab_size=10000)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A folder with text_encoder (CLIP), text_encoder_2 (CLIP with projection) and text_encoder_3 (T5). Read only."""
    folder = tmp_path_factory.mktemp("compat") / "pipeline"
    write_text_encoder(folder / "text_encoder", SMALL.to_hf(), hf_state(SMALL))
    write_text_encoder(folder / "text_encoder_2", SMALL_PROJECTED.to_hf(), hf_state(SMALL_PROJECTED, seed=1))
    write_text_encoder(folder / "text_encoder_3", SMALL_T5.to_hf(), t5_state(SMALL_T5))
    return folder


@pytest.fixture(scope="session")
def clip(pipeline):
    return FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder")


@pytest.fixture(scope="session")
def projected(pipeline):
    return FlaxCLIPTextModelWithProjection.from_pretrained(pipeline, subfolder="text_encoder_2")


@pytest.fixture(scope="session")
def t5(pipeline):
    return FlaxT5EncoderModel.from_pretrained(pipeline, subfolder="text_encoder_3")
