"""`from_pretrained` of `clip_jax.compat` from a Hub repo."""

import numpy as np
import pytest

from clip_jax import CheckpointError
from clip_jax.compat import FlaxCLIPTextModel
from tests.checkpoints import TINY, hf_state, write_text_encoder

REPO = "owner/pipeline"


@pytest.fixture
def published(hub, tmp_path):
    """A pipeline of which the client downloads what is asked for, and what it holds."""
    folder = write_text_encoder(tmp_path / "text_encoder", TINY.to_hf(), hf_state(TINY))
    files = {f"text_encoder/{path.name}": path.read_bytes() for path in folder.iterdir()}
    hub.repos[REPO] = {"main": {**files, "model_index.json": b"{}", "unet/config.json": b"{}"}}
    return hub


def test_a_subfolder_is_downloaded_and_nothing_else(published):
    model = FlaxCLIPTextModel.from_pretrained(REPO, subfolder="text_encoder", from_pt=True)

    assert published.downloads() == ["text_encoder/config.json", "text_encoder/model.safetensors"]
    embedding = model.params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(embedding, hf_state(TINY)["text_model.embeddings.token_embedding.weight"])


def test_what_fails_says_why(published):
    with pytest.raises(CheckpointError, match="as a Hub repo: owner/pipeline: .*found no weights"):
        FlaxCLIPTextModel.from_pretrained(REPO)
    with pytest.raises(CheckpointError, match="as a Hub repo: owner/none: not found on the Hub"):
        FlaxCLIPTextModel.from_pretrained("owner/none")
    with pytest.raises(CheckpointError, match="not in the cache"):
        FlaxCLIPTextModel.from_pretrained(REPO, subfolder="text_encoder", local_files_only=True)


@pytest.mark.parametrize("token", ["token", "use_auth_token"])
def test_options_reach_the_hub(published, tmp_path, token):
    published.repos[REPO]["v1"] = published.repos[REPO]["main"] | {"README.md": b"first"}
    options = {"revision": "v1", "cache_dir": tmp_path / "cache", token: "hf_secret"}
    FlaxCLIPTextModel.from_pretrained(REPO, subfolder="text_encoder", **options)
    sent = zip(published.requests, published.tokens, strict=True)
    assert {token for request, token in sent if REPO in request} == {"Bearer hf_secret"}
    (found,) = (tmp_path / "cache").rglob("config.json")
    assert published.commit(REPO, "v1") in found.parts
