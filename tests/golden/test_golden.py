"""Parity without torch: our embeddings against the golden files that torch's were written to."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import ClipTextModel
from tests.checkpoints import hf_state, load_as_sd15, write_pipeline
from tests.golden.cases import CASES, PROMPTS, SLICE

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "clip.npz") as file:
        return dict(file)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """An encoder loaded from a folder with the weights and tokenizer of a case."""
    config, pad_token, seed = CASES[request.param]
    state = hf_state(config, seed=seed)
    folder = write_pipeline(tmp_path_factory.mktemp("golden"), config, state, pad_token=pad_token)
    return request.param, load_as_sd15(folder, config)


def test_prompt_embeds(case, golden):
    name, encoder = case
    tokens = encoder.tokenize(PROMPTS, guidance=False)
    np.testing.assert_array_equal(tokens.cond["clip_l"], golden[f"{name}/ids"])
    ours = np.asarray(encoder(PROMPTS, guidance=False).prompt_embeds)[SLICE]
    np.testing.assert_allclose(ours, golden[f"{name}/last_hidden_state"], rtol=0, atol=TOLERANCE)


def test_penultimate_and_pooled(case, golden):
    name, encoder = case
    model = ClipTextModel(encoder.config["clip_l"])
    out = jax.jit(model.apply)({"params": encoder.params["clip_l"]}, jnp.asarray(golden[f"{name}/ids"]))
    pooled = out.pooler_output if out.text_embeds is None else out.text_embeds
    penultimate = np.asarray(out.hidden_states[-2])[SLICE]
    np.testing.assert_allclose(penultimate, golden[f"{name}/penultimate"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(pooled, golden[f"{name}/pooled"], rtol=0, atol=TOLERANCE)


def test_another_case_is_told_apart(case, golden):
    """Negative control: the tolerance is far below what a wrong activation makes of the numbers."""
    name, encoder = case
    config = encoder.config["clip_l"]
    wrong = dataclasses.replace(config, hidden_act="gelu" if config.hidden_act == "quick_gelu" else "gelu_new")
    out = jax.jit(ClipTextModel(wrong).apply)({"params": encoder.params["clip_l"]}, jnp.asarray(golden[f"{name}/ids"]))
    error = np.abs(np.asarray(out.last_hidden_state)[SLICE] - golden[f"{name}/last_hidden_state"]).max()
    assert error > 2 * TOLERANCE


def test_the_file_says_how_it_was_made(golden):
    made_with = json.loads(str(golden["made_with"]))
    assert made_with["prompts"] == PROMPTS
    assert made_with["versions"]["transformers"].startswith("5.")
