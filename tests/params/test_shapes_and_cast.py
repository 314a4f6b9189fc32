"""Comparing trees, grouping paths, casting, random weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import CheckpointError, ClipJaxError
from clip_jax.params.cast import cast, check_range, float_dtype
from clip_jax.params.random import random_tensor, random_tensors
from clip_jax.params.shapes import check_shapes, layer_groups, param_shapes
from tests.checkpoints import TINY


def test_all_faults_are_reported_at_once():
    expected = {"a": (1,), "b": (2, 3), "c": (4,)}
    found = {"b": (3, 2), "c": (4,), "d": (5,)}
    message = (
        r"X does not match its architecture\. missing \(1\): a\. not expected \(1\): d\. "
        r"wrong shape \(1\): b has shape \(3, 2\), expected \(2, 3\)\."
    )
    with pytest.raises(CheckpointError, match=message):
        check_shapes(expected, found, "X")
    check_shapes(expected, expected, "X")


def test_long_lists_of_faults_are_cut():
    with pytest.raises(CheckpointError, match=r"missing \(50\): p00, .*p19 and 30 more\."):
        check_shapes({f"p{i:02}": (1,) for i in range(50)}, {}, "X")


def test_one_group_per_block_and_one_for_the_rest():
    groups = layer_groups(param_shapes(TINY))
    assert sorted(len(group) for group in groups) == [4, 16, 16, 16]
    assert sorted(path for group in groups for path in group) == sorted(param_shapes(TINY))


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype(jnp.bfloat16), jnp.dtype("bfloat16")])
def test_every_spelling_of_a_dtype(dtype):
    assert float_dtype(dtype) == np.dtype(jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["int8", "float64", np.int32, "float8_e4m3fn", "bananas", 7])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ClipJaxError, match="dtype must be one of float32, bfloat16, float16"):
        float_dtype(dtype)


def test_float16_overflow_names_the_tensor_and_the_value():
    array = np.array([1.0, -70000.0], np.float32)
    with pytest.raises(CheckpointError, match=r"fc1 holds values up to 70000, float16 ends at 65504. Use bfloat16"):
        cast(array, np.dtype(np.float16), "fc1")
    np.testing.assert_array_equal(cast(array / 2, np.dtype(np.float16), "fc1"), (array / 2).astype(np.float16))
    assert np.isfinite(cast(array, np.dtype(jnp.bfloat16), "fc1").astype(np.float32)).all()
    check_range(65504.0, "fc1")


def test_random_tensors_are_the_same_everywhere_and_different_from_each_other():
    a = random_tensor("clip_l/x/kernel", (64, 64))
    np.testing.assert_array_equal(a, random_tensor("clip_l/x/kernel", (64, 64)))
    assert not np.array_equal(a, random_tensor("clip_l/y/kernel", (64, 64)))
    assert a.dtype == np.float32
    assert a.std() == pytest.approx(0.02, rel=0.05)
    assert float(a[0, 0]) == pytest.approx(float(random_tensor("clip_l/x/kernel", (1, 1))[0, 0]))
    assert random_tensor("t5/layer_norm/weight", (2,)).tolist() == [1, 1]
    assert (random_tensor("n/scale", (3,)).tolist(), random_tensor("n/bias", (2,)).tolist()) == (
        [1, 1, 1],
        [0, 0],
    )


@pytest.mark.parametrize("cores", [1, 2, 3, None])
def test_a_tower_is_drawn_in_order_whatever_the_threads(cores, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    shapes = {f"{i}/{leaf}": (i + 1, 3) for i in range(4) for leaf in ("kernel", "bias")}
    found = list(random_tensors("t", shapes))
    assert [path for path, _ in found] == list(shapes)
    for path, array in found:
        np.testing.assert_array_equal(array, random_tensor(f"t/{path}", shapes[path]))
