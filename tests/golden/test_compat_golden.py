"""`clip_jax.compat` against what the Flax classes of transformers 4 returned, where those are not at hand."""

import json
from pathlib import Path

import numpy as np
import pytest

import clip_jax.compat
from clip_jax.params.shapes import flatten, unflatten
from tests.golden.cases import COMPAT_CALL, COMPAT_SLICE
from tests.oracle.cases import CALLS, EOS, IDS, MODELS, VOCABULARY, flat_outputs, weights

TOLERANCE = 2e-5  # between machines, whose products are added in other orders; tests/oracle has the narrow one


@pytest.fixture(scope="module")
def golden():
    arrays = dict(np.load(Path(__file__).parent / "compat.npz"))
    return arrays, json.loads(str(arrays.pop("about")))


def made(name, golden):
    """The model of a case, from a dict, with the weights of the case."""
    cls, fields, _ = MODELS[name]
    if name != "t5":
        fields = {"intermediate_size": 80, "projection_dim": 24, "eos_token_id": EOS, **fields}
    model = getattr(clip_jax.compat, cls)({"vocab_size": VOCABULARY, **fields})
    assert {path: list(leaf.shape) for path, leaf in flatten(model.params).items()} == golden[1]["trees"][name]
    model.params = unflatten({path: weights(path, leaf.shape) for path, leaf in flatten(model.params).items()})
    return model


def error(found, golden, name):
    wanted = {
        key.removeprefix(f"{name}/{COMPAT_CALL}/"): array
        for key, array in golden[0].items()
        if key.startswith(f"{name}/{COMPAT_CALL}/")
    }
    assert found.keys() == wanted.keys()
    return max(np.abs(np.asarray(a)[COMPAT_SLICE[: a.ndim]] - wanted[key]).max() for key, a in found.items())


@pytest.mark.parametrize("name", MODELS)
def test_trees_and_outputs_are_those_of_the_old_class(golden, name):
    model = made(name, golden)
    assert error(flat_outputs(model(IDS, **CALLS[COMPAT_CALL])), golden, name) <= TOLERANCE
    unmasked = flat_outputs(model(IDS, output_hidden_states=True))
    assert error(unmasked, golden, name) > 1000 * TOLERANCE  # the control: a mask that is not there
