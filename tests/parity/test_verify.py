"""`verify_tower` with torch: transformers runs the source, and finds the same as NumPy does."""

import sys

import numpy as np
import pytest
import torch
import transformers

from clip_jax import CheckpointError
from clip_jax.convert import verify as verify_module
from clip_jax.convert.foreign import open_foreign
from clip_jax.convert.verify import verify_tower
from clip_jax.params.cast import float_dtype
from clip_jax.params.shapes import flatten, unflatten
from tests.formats.model import model, write_pipeline_folder

TORCH = f"transformers {transformers.__version__}, torch {torch.__version__}"


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """CLIP with a projection and without one, and T5."""
    states = {name: model(name) for name in ("clip_l", "clip_g", "t5")}
    return open_foreign([write_pipeline_folder(tmp_path_factory.mktemp("verify") / "sd3", "sd3", states)])


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    states = {name: model(name) for name in ("clip_l", "t5")}
    return open_foreign([write_pipeline_folder(tmp_path_factory.mktemp("verify") / "flux", "flux", states)])


def verify(checkpoint, tower, dtype, change=lambda tree: tree):
    params = checkpoint.read_params(None if dtype is None else float_dtype(dtype), progress=False)[tower]
    changed = unflatten(change(flatten(params)))
    return verify_tower(tower, checkpoint.towers[tower], changed, checkpoint.tokenizer(tower))


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize(("family", "tower"), [("sd3", "clip_g"), ("sd3", "t5"), ("flux", "clip_l")])
def test_torch_and_numpy_find_the_same(request, monkeypatch, family, tower, dtype):
    checkpoint = request.getfixturevalue(family)
    by_torch = verify(checkpoint, tower, dtype)
    monkeypatch.setitem(sys.modules, "torch", None)
    by_numpy = verify(checkpoint, tower, dtype)
    assert (by_torch.oracle, by_numpy.oracle) == (TORCH, "NumPy, float64")
    assert by_torch.largest == pytest.approx(by_numpy.largest, rel=1e-6)
    assert by_torch.rounding_error == pytest.approx(by_numpy.rounding_error, rel=1e-2)
    assert 0 < by_torch.relative_error < 5e-6
    assert 0 < by_torch.max_abs_error < 1e-5


def test_a_large_tower_is_not_given_to_torch(sd3, monkeypatch):
    monkeypatch.setattr(verify_module, "_TORCH_PARAMETERS", 1000)
    assert verify(sd3, "t5", None).oracle == "NumPy, float64"


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("tower", "a", "b"),
    [
        ("clip_g", "encoder/layers/1/self_attn/q_proj/kernel", "encoder/layers/1/self_attn/k_proj/kernel"),
        ("clip_g", "text_projection/kernel", None),
        ("t5", "1/layer/1/DenseReluDense/wi_0/kernel", "1/layer/1/DenseReluDense/wi_1/kernel"),
    ],
)
def test_a_fault_fails(sd3, tower, a, b, dtype):
    def change(tree):
        paths = [path for path in tree if path.endswith((a, b or a))]
        arrays = [tree[path] for path in reversed(paths)] if b else [tree[paths[0]].T]
        return {**tree, **dict(zip(paths, arrays, strict=True))}

    with pytest.raises(CheckpointError, match=f"{tower} does not compute what its source does"):
        verify(sd3, tower, dtype, change)


def test_every_weight_of_the_reference_is_the_sources(sd3, monkeypatch):
    """None keeps the random value that transformers gave it."""
    seen = {}

    def keep(self, *args, **kwargs):
        seen.update({name: tensor.numpy().copy() for name, tensor in self.state_dict().items()})
        raise KeyboardInterrupt  # enough

    monkeypatch.setattr(transformers.CLIPTextModelWithProjection, "forward", keep)
    with pytest.raises(KeyboardInterrupt):
        verify(sd3, "clip_g", None)
    state = model("clip_g")
    assert seen.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(seen[name], array)
