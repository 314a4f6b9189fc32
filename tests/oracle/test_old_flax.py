"""`clip_jax.compat` against the Flax classes of transformers 4.57 themselves: trees, outputs, dtypes, gradients.

Run by name: they need an environment of their own (`requirements.txt` beside this file).
"""

import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clip_jax.compat
from clip_jax.params.shapes import flatten, unflatten
from tests.oracle.cases import DTYPES, IDS, MODELS, calls_of, cotangent, flat_outputs

# Absolute, where the largest value is up to 4, as in the outputs that pipelines take; of larger ones (hidden states
# before the final norm) in proportion, as float32 itself is.
TOLERANCE = {"clip": 2e-6, "t5": 1e-5}
LOW_TOLERANCE = 0.02  # relative norm: both round to bfloat16, at different places


@pytest.fixture(scope="module")
def old(old_python, tmp_path_factory):
    """A folder for each model, written by the old classes; all that they returned; and what they are."""
    folder = tmp_path_factory.mktemp("old")
    root = Path(__file__).parents[2]
    subprocess.run([old_python, "-m", "tests.oracle.old_flax", folder], cwd=root, check=True)
    arrays = dict(np.load(folder / "outputs.npz"))
    return folder, arrays, json.loads(str(arrays.pop("about")))


def load(old, name, **kwargs):
    return getattr(clip_jax.compat, MODELS[name][0]).from_pretrained(old[0] / name, **kwargs)


def expected(old, *names):
    prefix = "/".join(names) + "/"
    return {key.removeprefix(prefix): array for key, array in old[1].items() if key.startswith(prefix)}


def worst(name, found, wanted):
    """The largest error of all outputs, in parts of what is tolerated."""
    assert found.keys() == wanted.keys()
    assert all(found[key].shape == wanted[key].shape for key in wanted)
    tolerance = TOLERANCE["t5" if name == "t5" else "clip"]
    return max(
        np.abs(np.asarray(found[key]) - array).max() / (tolerance * max(1, np.abs(array).max() / 4))
        for key, array in wanted.items()
    )


@pytest.mark.parametrize("name", MODELS)
def test_what_the_old_class_saved_is_read_bit_for_bit(old, name):
    found, wanted = flatten(load(old, name).params), expected(old, name, "params")
    assert list(found) == sorted(found)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize(("name", "call"), [(name, call) for name in MODELS for call in calls_of(name)])
def test_every_call_returns_what_the_old_class_returned(old, name, call):
    found = flat_outputs(load(old, name)(IDS, **calls_of(name)[call]))
    assert worst(name, found, expected(old, name, call)) <= 1


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_in_the_same_order(old, name):
    model = load(old, name)
    out = model(IDS, output_hidden_states=True, output_attentions=True)
    assert [key for key in out if key != "attentions"] == list(
        dict.fromkeys(key.split("/")[0] for key in expected(old, name, "hidden states"))
    )
    np.testing.assert_array_equal(out[0], model(IDS, return_dict=False)[0])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_old_class(old, name):
    model = load(old, name)

    def along(params):
        out = model(IDS, params=params, train=False)[0]
        return jnp.vdot(out, cotangent(out.shape))

    assert worst(name, flatten(jax.grad(along)(model.params)), expected(old, name, "gradient")) <= 1


@pytest.mark.parametrize("policy", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_dtypes_are_those_of_the_old_class(old, name, policy):
    dtype, param_dtype = DTYPES[policy]
    model = load(old, name, dtype=dtype)
    model.params = jax.tree.map(lambda leaf: leaf.astype(param_dtype), model.params)
    found = flat_outputs(model(IDS, output_hidden_states=True))
    assert {key: array.dtype.name for key, array in found.items()} == old[2]["dtypes"][f"{name}/{policy}"]
    for key, wanted in expected(old, name, policy).items():
        error = np.linalg.norm(np.asarray(found[key], np.float32) - wanted) / np.linalg.norm(wanted)
        assert error <= LOW_TOLERANCE, key


@pytest.mark.parametrize("name", MODELS)
def test_controls(old, name):
    """Two kernels swapped in one layer, and params a percent too large, are seen."""
    model = load(old, name)
    wanted = expected(old, name, "ids alone")
    leaves = flatten(model.params)
    query = next(path for path in leaves if path.endswith(("q_proj/kernel", "SelfAttention/q/kernel")))
    key = query.replace("q_proj", "k_proj").replace("/q/", "/k/")
    leaves[query], leaves[key] = leaves[key], leaves[query]
    swapped = flat_outputs(model(IDS, params=unflatten(leaves)))
    assert worst(name, swapped, wanted) > 1000

    scaled = jax.tree.map(lambda leaf: leaf * 1.01, model.params)
    assert worst(name, flat_outputs(model(IDS, params=scaled)), wanted) > 1000
