"""`from_pretrained` and `save_pretrained`: folders, repos, shardings, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import clip_jax
from clip_jax import CheckpointError, ClipJaxError, ConfigError
from clip_jax.compat import CLIPTextEncoder, FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection, FlaxT5EncoderModel
from clip_jax.params.shapes import flatten
from tests.checkpoints import TINY, digests, hf_state, load_as_sd15, write_clip_model, write_text_encoder
from tests.compat.conftest import IDS, SMALL, SMALL_PROJECTED


def same(found, wanted):
    found, wanted = flatten(found), flatten(wanted)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        assert found[path].dtype == leaf.dtype
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize("name", ["clip", "projected", "t5"])
def test_what_is_saved_is_read_again(name, request, tmp_path):
    model = request.getfixturevalue(name)
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    same(again.params, model.params)
    assert again.module == model.module
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "notes.txt"}
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [model.architecture]


def test_what_is_saved_is_read_by_load(clip, tmp_path):
    low = clip.to_bf16(clip.params)
    clip.save_pretrained(tmp_path, params=low)
    same(load_as_sd15(tmp_path, SMALL).params["clip_l"], clip.to_fp32(low))


def test_saving_refuses_what_it_cannot_do_and_keeps_what_is_there(clip, tmp_path):
    clip.save_pretrained(tmp_path)
    before = digests(tmp_path)
    with pytest.raises(ClipJaxError, match="upload_folder"):
        clip.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(ClipJaxError, match="Only safetensors"):
        clip.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(CheckpointError, match="What is to be saved does not match"):
        clip.save_pretrained(tmp_path, params={"text_model": {}})
    with pytest.raises(CheckpointError, match="safetensors has no dtype int4. Cast the params"):
        clip.save_pretrained(tmp_path, params=jax.tree.map(lambda leaf: leaf.astype("int4"), clip.params))
    with pytest.raises(CheckpointError, match="cannot be written"):
        clip.save_pretrained(tmp_path / "config.json" / "below")
    assert digests(tmp_path) == before


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors"])
def test_saving_that_breaks_off_leaves_no_mixture(clip, tmp_path, monkeypatch, broken):
    clip.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # another model's
    before = digests(tmp_path)
    replace, there = os.replace, []

    def replaced(path, target):
        if target == tmp_path / broken and path.parent.name != "kept":
            raise OSError(5, "Input/output error")
        replace(path, target)
        there.append({name for name in ("config.json", "model.safetensors") if (tmp_path / name).exists()})

    monkeypatch.setattr(os, "replace", replaced)
    with pytest.raises(CheckpointError, match="Input/output error"):
        clip.save_pretrained(tmp_path, params=jax.tree.map(lambda leaf: 2 * leaf, clip.params))
    assert all("model.safetensors" not in names for names in there[:-1])  # a process that is killed leaves no mixture
    assert digests(tmp_path) == before


def test_the_arguments_of_old_are_taken(pipeline):
    model = FlaxCLIPTextModel.from_pretrained(
        str(pipeline),
        dtype="bfloat16",
        subfolder="text_encoder",
        from_pt=True,
        use_safetensors=True,
        resume_download=False,
        force_download=False,
        ignore_mismatched_sizes=False,
        revision="main",
        local_files_only=False,
        use_auth_token=None,
        cache_dir=None,
        seed=1,
        input_shape=(1, 77),
    )
    assert model.input_shape == (1, 77)
    with pytest.raises(ClipJaxError, match="does not offer ignore_mismatched_sizes: weights of other shapes are"):
        FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", ignore_mismatched_sizes=True)
    with pytest.raises(ClipJaxError, match="has no argument 'output_hidden_state', and its config no such field"):
        FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", output_hidden_state=True)


def test_a_config_may_be_given(pipeline, clip, tmp_path):
    shutil.copy(pipeline / "text_encoder" / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config.json, found model.safetensors. Name .* subfolder="):
        FlaxCLIPTextModel.from_pretrained(tmp_path)
    same(FlaxCLIPTextModel.from_pretrained(tmp_path, config=SMALL).params, clip.params)


def test_a_projection_is_left_aside_but_never_made_up(pipeline, projected):
    plain = FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder_2")
    same(plain.params["text_model"], projected.params["text_model"])
    assert "text_projection" not in plain.params
    with pytest.raises(CheckpointError, match="has no text_projection, .* it is never made up"):
        FlaxCLIPTextModelWithProjection.from_pretrained(pipeline, subfolder="text_encoder", config=SMALL_PROJECTED)


def test_other_sources_are_refused(pipeline, tmp_path):
    with pytest.raises(ConfigError, match="text_encoder_3: .*made from a 'clip_text_model', found 't5'"):
        FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder_3")
    with pytest.raises(CheckpointError, match="text_encoder_4 is no folder"):
        FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder_4")
    with pytest.raises(CheckpointError, match="does not exist"):
        FlaxCLIPTextModel.from_pretrained(tmp_path / "nowhere")
    shutil.copytree(pipeline / "text_encoder_3", tmp_path / "mixed")
    shutil.copy(pipeline / "text_encoder" / "model.safetensors", tmp_path / "mixed")
    with pytest.raises(CheckpointError, match="its config and its weights are of two models"):
        FlaxT5EncoderModel.from_pretrained(tmp_path / "mixed")


def test_params_go_where_shardings_say(pipeline, clip):
    device = SingleDeviceSharding(jax.devices()[0])
    mesh = NamedSharding(jax.sharding.Mesh(jax.devices()[:1], "x"), PartitionSpec())
    tree = jax.tree.map(lambda leaf: mesh if leaf.ndim == 2 else device, clip.params)
    asked = []

    def place(path, leaf):
        asked.append((path, leaf.shape, leaf.dtype))
        return mesh

    for shardings, expected in ((mesh, {mesh}), (tree, {mesh, device}), (place, {mesh})):
        model = FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", shardings=shardings)
        assert {leaf.sharding for leaf in jax.tree.leaves(model.params)} == expected
        same(model.params, clip.params)
    assert asked == [(path, leaf.shape, leaf.dtype) for path, leaf in flatten(clip.params).items()]


def test_shardings_that_do_not_fit_are_refused(pipeline, clip):
    device = SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ClipJaxError, match="found none for 36 params, such as text_model/"):
        FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", shardings={"a": device})
    with pytest.raises(ClipJaxError, match="Expected shardings to have a Sharding for .*, found None"):
        FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", shardings=lambda path, leaf: None)
    with pytest.raises(ClipJaxError, match="found other leaves"):
        FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", shardings=clip.params)


@pytest.mark.slow
def test_a_dimension_that_does_not_divide_is_named(pipeline):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    code = """
import sys, jax, clip_jax
from clip_jax.compat import FlaxCLIPTextModel
mesh = jax.sharding.Mesh(jax.devices(), "tensor")
for spec in (jax.P("tensor"), jax.P(None, "tensor")):
    sharding = jax.NamedSharding(mesh, spec)
    try:
        FlaxCLIPTextModel.from_pretrained(sys.argv[1], subfolder="text_encoder", shardings=sharding)
    except clip_jax.ClipJaxError as error:
        print(" ".join(str(error).split()))
"""
    done = subprocess.run([sys.executable, "-c", code, str(pipeline)], capture_output=True, text=True, env=environment)
    assert len(re.findall(r"shardings do not fit text_model/\S+ with the shape \(", done.stdout)) == 2, done.stderr


@pytest.mark.parametrize("scheme", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_quantised_params_are_run_but_have_no_names_on_disk(pipeline, clip, tmp_path, scheme):
    model = FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder")
    model.params = clip_jax.load(pipeline / "text_encoder", family="sd15", quantize=scheme).params["clip_l"]
    with pytest.raises(CheckpointError, match="the params are quantised, for which transformers has no names"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    pooled = model(IDS).pooler_output
    assert np.abs(pooled - clip(IDS).pooler_output).max() > 0
    np.testing.assert_allclose(CLIPTextEncoder(model)(IDS), pooled, atol=1e-5)
    low, before = (flatten(params) for params in (model.to_bf16(model.params), model.params))
    assert low["text_model/final_layer_norm/bias"].dtype == "bfloat16"
    assert (
        low["text_model/embeddings/token_embedding/embedding"]
        is before["text_model/embeddings/token_embedding/embedding"]
    )


def test_callables_hold_params(pipeline):
    with pytest.raises(ClipJaxError, match="CLIPTextEncoder holds params. Leave out _do_init, or use FlaxCLIPTextMod"):
        CLIPTextEncoder.from_pretrained(str(pipeline), subfolder="text_encoder", _do_init=False)


def test_callables_take_ids_and_return_arrays(pipeline, clip):
    encoder = CLIPTextEncoder.from_pretrained(str(pipeline), "bfloat16", subfolder="text_encoder")
    out = encoder(IDS)
    assert (out.shape, out.dtype.name) == ((2, 32), "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(encoder.params)} == {"bfloat16"}
    mesh = NamedSharding(jax.sharding.Mesh(jax.devices()[:1], "x"), PartitionSpec())
    encoder.place_params(mesh)
    assert {leaf.sharding for leaf in jax.tree.leaves(encoder.params)} == {mesh}
    np.testing.assert_array_equal(encoder(IDS), out)
    encoder.offload_params()
    assert {leaf.sharding for leaf in jax.tree.leaves(encoder.params)} == {SingleDeviceSharding(jax.devices("cpu")[0])}
    np.testing.assert_allclose(out.astype("float32"), clip(IDS).pooler_output, atol=0.05)
    assert clip_jax.compat.T5TextEncoder.from_pretrained(str(pipeline), subfolder="text_encoder_3")(
        IDS % 9000, np.ones_like(IDS)
    ).shape == (2, 9, 104)


def test_the_text_half_of_a_whole_clip_is_called_with_a_mask(tmp_path):
    """As FlaxDiff does."""
    write_clip_model(tmp_path / "whole", TINY, hf_state(TINY))
    write_text_encoder(tmp_path / "half", TINY.to_hf(), hf_state(TINY))
    ids = np.array([[49406, 320, 2368, 49407, 49407]])
    outputs = [
        FlaxCLIPTextModel.from_pretrained(tmp_path / name)(input_ids=ids, attention_mask=np.ones_like(ids))
        for name in ("whole", "half")
    ]
    np.testing.assert_array_equal(outputs[0].last_hidden_state, outputs[1].last_hidden_state)


@pytest.mark.slow
def test_the_callable_t5_heeds_its_mask_and_casts(pipeline, t5):
    encoder = clip_jax.compat.T5TextEncoder.from_pretrained(str(pipeline), "bfloat16", subfolder="text_encoder_3")
    mask = (np.arange(IDS.shape[1]) < 6)[None].repeat(2, 0)
    out = encoder(IDS % 9000, mask)
    assert out.dtype.name == "bfloat16"
    wanted, unmasked = (t5(IDS % 9000, given).last_hidden_state for given in (mask, None))
    error = np.linalg.norm(out.astype("float32") - wanted) / np.linalg.norm(wanted)
    assert error < 0.05 < np.linalg.norm(unmasked - wanted) / np.linalg.norm(wanted)
