"""The key table of HF's CLIP text models: every parameter has its tensor, and what is left over is named."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from clip_jax.convert.hf_keys import map_keys, to_flax
from clip_jax.convert.state import Tensor
from clip_jax.errors import CheckpointError
from clip_jax.params.shapes import param_shapes
from tests.checkpoints import TINY, hf_state

PROJECTED = dataclasses.replace(TINY, projection_dim=16)
Q_PROJ = "encoder.layers.1.self_attn.q_proj.weight"


def tensor(name, shape, dtype=np.float32):
    return Tensor(name, shape, np.dtype(dtype), lambda: np.zeros(shape, dtype))


def tensors(config=TINY, dtype=np.float32, **shapes):
    """What such a checkpoint holds, with further or other tensors by name."""
    found = {name: array.shape for name, array in hf_state(config).items()} | shapes
    return {name: tensor(name, shape, dtype) for name, shape in found.items()}


def retyped(info, dtype):
    return dataclasses.replace(info, dtype=np.dtype(dtype))


@pytest.mark.parametrize(
    ("path", "key", "transposed"),
    [
        ("embeddings/token_embedding/embedding", "embeddings.token_embedding.weight", False),
        ("embeddings/position_embedding/embedding", "embeddings.position_embedding.weight", False),
        ("encoder/layers/1/self_attn/q_proj/kernel", Q_PROJ, True),
        ("encoder/layers/1/self_attn/q_proj/bias", "encoder.layers.1.self_attn.q_proj.bias", False),
        ("encoder/layers/2/layer_norm1/scale", "encoder.layers.2.layer_norm1.weight", False),
        ("encoder/layers/0/mlp/fc2/kernel", "encoder.layers.0.mlp.fc2.weight", True),
        ("final_layer_norm/bias", "final_layer_norm.bias", False),
    ],
)
def test_parameters_and_their_tensors(path, key, transposed):
    keys, ignored, *_ = map_keys(tensors(), TINY, "X")
    assert keys[f"text_model/{path}"] == (f"text_model.{key}", transposed)
    assert ignored == []


@pytest.mark.parametrize("config", [TINY, PROJECTED])
def test_every_parameter_has_one_tensor_and_every_tensor_one_parameter(config):
    found = tensors(config)
    keys, *_ = map_keys(found, config, "X")
    assert keys.keys() == param_shapes(config).keys()
    assert sorted(key for key, _ in keys.values()) == sorted(found)


def test_a_linear_weight_is_transposed_and_not_copied():
    array = np.arange(6).reshape(2, 3)
    assert to_flax(array, True).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert np.shares_memory(to_flax(array, True), array)
    assert to_flax(array, False) is array


def test_the_projection_is_read_where_the_tower_has_one():
    keys, ignored, *_ = map_keys(tensors(PROJECTED), PROJECTED, "X")
    assert keys["text_projection/kernel"] == ("text_projection.weight", True)
    assert ignored == []
    keys, ignored, *_ = map_keys(tensors(PROJECTED), TINY, "X")
    assert "text_projection/kernel" not in keys
    assert ignored == ["text_projection.weight"]


@pytest.mark.parametrize(
    "name",
    [
        "logit_scale",
        "position_ids",
        "text_model.embeddings.position_ids",
        "embeddings.position_ids",
        "vision_model.embeddings.position_ids",
        "vision_model.encoder.layers.0.mlp.fc1.weight",
        "visual_projection.weight",
    ],
)
def test_what_is_no_part_of_the_text_model_is_ignored_by_name(name):
    assert map_keys(tensors(**{name: (1, 77)}), TINY, "X")[1] == [name]


@pytest.mark.parametrize("name", ["logit_scale2", "visual_projection.bias", "vision_model", "lora.weight"])
def test_any_other_name_is_an_error(name):
    with pytest.raises(CheckpointError, match=rf"not expected \(1\): {name}\.$"):
        map_keys(tensors(**{name: (1,)}), TINY, "X")


def test_blocks_beyond_the_tower_are_ignored_only_if_the_source_is_known_to_have_them():
    shorter = dataclasses.replace(TINY, num_hidden_layers=2)
    _, ignored, *_ = map_keys(tensors(), shorter, "X", source_blocks=3)
    assert len(ignored) == 16
    assert all(name.startswith("text_model.encoder.layers.2.") for name in ignored)
    message = r"not expected \(16\): text_model\.encoder\.layers\.2\.layer_norm1\.bias"
    for blocks in (None, 2):
        with pytest.raises(CheckpointError, match=message):
            map_keys(tensors(), shorter, "X", source_blocks=blocks)


def test_block_numbers_are_compared_whole():
    shorter = dataclasses.replace(TINY, num_hidden_layers=1)
    found = tensors(shorter, **{"text_model.encoder.layers.10.mlp.fc1.bias": (64,)})
    with pytest.raises(CheckpointError, match=r"not expected \(1\): text_model.encoder.layers.10.mlp"):
        map_keys(found, shorter, "X", source_blocks=2)


def test_all_faults_are_reported_at_once():
    found = tensors(extra=(3,), **{f"text_model.{Q_PROJ}": (16, 32)})
    del found["text_model.final_layer_norm.bias"], found["text_model.encoder.layers.0.mlp.fc1.bias"]
    message = (
        r"^X does not match its architecture\. "
        r"missing \(2\): text_model\.encoder\.layers\.0\.mlp\.fc1\.bias, text_model\.final_layer_norm\.bias"
        r"\. "
        r"not expected \(1\): extra\. "
        rf"wrong shape \(1\): text_model\.{Q_PROJ} has shape \(16, 32\), expected \(32, 32\)\.$"
    )
    with pytest.raises(CheckpointError, match=message):
        map_keys(found, TINY, "X")


def test_a_kernel_that_is_already_transposed_has_the_wrong_shape():
    found = tensors(**{"text_model.encoder.layers.0.mlp.fc1.weight": (32, 64)})
    with pytest.raises(CheckpointError, match=r"fc1\.weight has shape \(32, 64\), expected \(64, 32\)"):
        map_keys(found, TINY, "X")


def test_a_mix_of_both_spellings_is_an_error():
    found = tensors()
    found[Q_PROJ] = found.pop(f"text_model.{Q_PROJ}")
    message = rf"missing \(1\): text_model\.{Q_PROJ}\. not expected \(1\): {Q_PROJ}\.$"
    with pytest.raises(CheckpointError, match=message):
        map_keys(found, TINY, "X")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_readable_dtypes(dtype):
    assert len(map_keys(tensors(dtype=dtype), TINY, "X")[0]) == 52


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_other_dtypes_are_named_with_their_tensors(dtype):
    found = tensors()
    for name in (f"text_model.{Q_PROJ}", "text_model.final_layer_norm.bias"):
        found[name] = retyped(found[name], dtype)
    name = np.dtype(dtype).name
    message = (
        r"^X holds tensors of dtypes that are not read: expected one of float16, bfloat16, float32, float64\. "
        rf"found \(2\): text_model\.{Q_PROJ} is {name}, text_model\.final_layer_norm\.bias is {name}\.$"
    )
    with pytest.raises(CheckpointError, match=message):
        map_keys(found, TINY, "X")


def test_the_dtype_of_what_is_ignored_does_not_matter():
    found = tensors(position_ids=(1, 77))
    found["position_ids"] = retyped(found["position_ids"], np.int64)
    assert map_keys(found, TINY, "X")[1] == ["position_ids"]
