"""Parity of whole families without torch: our embeddings against what diffusers' pipelines made of the same weights."""

import inspect
from pathlib import Path

import numpy as np
import pytest

import clip_jax
from clip_jax import FAMILIES
from tests.checkpoints import write_family
from tests.golden.cases import FAMILY_CALL, FAMILY_SLICE

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "families.npz") as file:
        return dict(file)


def call(encoder, **changed):
    taken = {tower.prompt for tower in encoder.family.towers} | {"negative_prompt", "guidance", "prompt"}
    if encoder.family.max_sequence_length:
        taken.add("max_sequence_length")
    assert FAMILY_CALL.keys() <= inspect.signature(encoder).parameters.keys()
    return encoder(**{k: v for k, v in {**FAMILY_CALL, **changed}.items() if k in taken})


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "sd3" else ()) for n in FAMILIES])
def test_embeddings_are_those_of_diffusers(name, golden, tmp_path):
    encoder = clip_jax.load(write_family(tmp_path, FAMILIES[name]), family=name)
    ours, other = call(encoder), call(encoder, prompt=["another", "prompt"], prompt_2=["for", "all"])
    fields = [field for field in FAMILY_SLICE if f"{name}/{field}" in golden]
    assert ("pooled_prompt_embeds" in fields) == (ours.pooled_prompt_embeds is not None)
    for field in fields:
        reference = golden[f"{name}/{field}"]
        kept = np.asarray(getattr(ours, field))[FAMILY_SLICE[field]]
        np.testing.assert_allclose(kept, reference, rtol=0, atol=TOLERANCE)
        # The control: another prompt is far outside the tolerance.
        assert np.abs(np.asarray(getattr(other, field))[FAMILY_SLICE[field]] - reference).max() > 100 * TOLERANCE
