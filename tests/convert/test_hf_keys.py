"""The key table of HF's CLIP text models: every parameter has its tensor, and what is left over is named."""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from clip_jax.convert.hf_keys import map_keys, to_flax
from clip_jax.convert.safetensors import TensorInfo
from clip_jax.errors import CheckpointError
from clip_jax.params.shapes import param_shapes
from tests.checkpoints import TINY, hf_state

PROJECTED = dataclasses.replace(TINY, projection_dim=16)
Q_PROJ = "encoder.layers.1.self_attn.q_proj.weight"


def tensors(config=TINY, prefix="text_model.", dtype=np.float32, **shapes):
    """What the header of such a checkpoint says, with further or other tensors by name."""
    found = {name: array.shape for name, array in hf_state(config, prefix=prefix).items()} | shapes
    return {name: TensorInfo(name, s, np.dtype(dtype), Path("x"), 0, 0) for name, s in found.items()}


def retyped(info, dtype):
    return dataclasses.replace(info, dtype=np.dtype(dtype))


@pytest.mark.parametrize("prefix", ["text_model.", ""])
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
def test_parameters_and_their_tensors(prefix, path, key, transposed):
    keys, ignored, *_ = map_keys(tensors(prefix=prefix), TINY, "X")
    assert keys[f"text_model/{path}"] == (prefix + key, transposed)
    assert ignored == []


@pytest.mark.parametrize("prefix", ["text_model.", ""])
@pytest.mark.parametrize("config", [TINY, PROJECTED])
def test_every_parameter_has_one_tensor_and_every_tensor_one_parameter(config, prefix):
    found = tensors(config, prefix)
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


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_blocks_beyond_the_tower_are_ignored_only_if_the_source_is_known_to_have_them(prefix):
    shorter = dataclasses.replace(TINY, num_hidden_layers=2)
    _, ignored, *_ = map_keys(tensors(prefix=prefix), shorter, "X", source_blocks=3)
    assert len(ignored) == 16
    assert all(name.startswith(f"{prefix}encoder.layers.2.") for name in ignored)
    message = rf"not expected \(16\): {prefix}encoder\.layers\.2\.layer_norm1\.bias"
    for blocks in (None, 2):
        with pytest.raises(CheckpointError, match=message):
            map_keys(tensors(prefix=prefix), shorter, "X", source_blocks=blocks)


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


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_readable_dtypes(dtype):
    assert len(map_keys(tensors(dtype=dtype), TINY, "X")[0]) == 52


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, float])
def test_other_dtypes_are_named_with_their_tensors(dtype):
    found = tensors()
    for name in (f"text_model.{Q_PROJ}", "text_model.final_layer_norm.bias"):
        found[name] = retyped(found[name], dtype)
    name = np.dtype(dtype).name
    message = (
        r"^X holds tensors of dtypes that are not read: expected one of float16, bfloat16, float32\. "
        rf"found \(2\): text_model\.{Q_PROJ} is {name}, text_model\.final_layer_norm\.bias is {name}\.$"
    )
    with pytest.raises(CheckpointError, match=message):
        map_keys(found, TINY, "X")


def test_the_dtype_of_what_is_ignored_does_not_matter():
    found = tensors(position_ids=(1, 77))
    found["position_ids"] = retyped(found["position_ids"], np.int64)
    assert map_keys(found, TINY, "X")[1] == ["position_ids"]


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 encoder"),
        ("transformer.resblocks.0.attn.in_proj_weight", "an OpenCLIP model"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a single-file SD checkpoint"),
        ("vision_model.embeddings.patch_embedding.weight", "a CLIP image encoder"),
        ("down_blocks.0.resnets.0.conv1.weight", "a diffusers UNet"),
        ("encoder.conv_in.weight", "a diffusers VAE"),
        ("embeddings.word_embeddings.weight", "a BERT model"),
    ],
)
def test_another_model_is_called_by_its_name(key, model):
    found = {key: TensorInfo(key, (1,), np.dtype(np.float32), Path("x"), 0, 0)}
    with pytest.raises(CheckpointError, match=rf"^X is not a CLIP text model: .* found the tensors of {model}"):
        map_keys(found, TINY, "X")


@pytest.mark.parametrize(
    ("names", "found"), [([], "no tensors"), (list("gfedcba"), "a, b, c, d, e")], ids=["none", "some"]
)
def test_an_unknown_model_is_shown_by_its_tensors(names, found):
    infos = {name: TensorInfo(name, (1,), np.dtype(np.float32), Path("x"), 0, 0) for name in names}
    with pytest.raises(CheckpointError, match=rf"not a CLIP text model: .*, found {found}\.$"):
        map_keys(infos, TINY, "X")
