"""Every layout gives the params and the embeddings of the diffusers folder of the same model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import clip_jax
from clip_jax import FAMILIES, CheckpointError
from clip_jax.convert import convert
from clip_jax.params.shapes import flatten
from clip_jax.tokenizers.stand_in import stand_in_t5_tokenizer
from tests.checkpoints import hf_state, write_clip_model
from tests.formats import LAYOUTS, Layout
from tests.formats.files import write_msgpack, write_safetensors
from tests.formats.model import CONFIGS, SD2_H, State, configs_of, model, used, write_pipeline_folder
from tests.formats.names import flax, open_clip
from tests.formats.values import comfy_2024, scaled


@pytest.fixture(scope="module", autouse=True)
def small_sd21() -> Iterator[None]:
    """SD 2 does without the last block of the small H, too."""
    towers = (dataclasses.replace(FAMILIES["sd21"].towers[0], config=SD2_H),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "sd21", dataclasses.replace(FAMILIES["sd21"], towers=towers))
        yield


@pytest.fixture(scope="module")
def t5_tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    stand_in_t5_tokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, clip_jax.TextEncoder]:
    """Family -> what its diffusers folder gives."""
    place, encoders = tmp_path_factory.mktemp("folders"), {}
    for family in FAMILIES:
        source = write_pipeline_folder(place / family, family, {name: used(name) for name in CONFIGS})
        encoders[family] = clip_jax.load(source, family=family)
    return encoders


def layout_called(name: str) -> Layout:
    if "GGUF" in LAYOUTS[name].format:
        pytest.importorskip("gguf")
    return LAYOUTS[name]


@pytest.fixture(params=LAYOUTS)
def layout(request) -> Layout:
    return layout_called(request.param)


def options_of(layout: Layout, t5_tokenizer: Path) -> dict[str, Any]:
    tokenizer = {"tokenizer": {"t5": t5_tokenizer}} if "t5" in layout.names else {}
    return {"config": configs_of(layout.family), **tokenizer, **layout.options}


def expected_params(state: State) -> State:
    """The parameters that a state dict of transformers stands for, by its rules."""
    leaves = {}
    for name, array in state.items():
        *module, kind = name.split(".")
        if kind == "weight" and ("norm" not in module[-1] or "text_model" in module):
            embedding = module[-1] in ("shared", "relative_attention_bias") or module[-1].endswith("embedding")
            kind = "embedding" if embedding else "scale" if "norm" in module[-1] else "kernel"
        leaves["/".join([*module, kind])] = array.T if kind == "kernel" else array
    return leaves


def assert_params_are(params: dict[str, Any], values: State) -> None:
    expected, found = expected_params(values), flatten(params)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array.astype(np.float32), err_msg=path, strict=True)


def embeddings(encoder: clip_jax.TextEncoder, params: dict[str, Any]) -> dict[str, np.ndarray]:
    length = {"max_sequence_length": 16} if encoder.family.max_sequence_length else {}
    found = clip_jax.text_embeddings(params, encoder.tokenize("a cat", **length), family=encoder.family)
    return {name: np.asarray(leaf) for name, leaf in vars(found).items() if leaf is not None}


def test_a_layout_is_the_model_that_was_written(layout, folders, t5_tokenizer, tmp_path):
    sources, options = layout.files(tmp_path), options_of(layout, t5_tokenizer)
    encoder, folder = clip_jax.load(sources, **options), folders[layout.family]

    assert encoder.family.name == layout.family
    assert encoder.params.keys() == folder.params.keys() == layout.names.keys()
    for tower in layout.names:
        assert_params_are(encoder.params[tower], layout.values.get(tower, used(tower)))

    # SD 3's folder has the identity for CLIP-L's projection, its files have none.
    theirs = embeddings(folder, {**folder.params, **{name: encoder.params[name] for name in layout.values}})
    ours = embeddings(encoder, encoder.params)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=1e-6 if layout.family == "sd3" else 0)

    provenance = encoder.provenance
    assert provenance["format"] == layout.format
    assert provenance.get("ignored", {}) == layout.ignored
    assert {name: tower["names"] for name, tower in provenance["towers"].items()} == layout.names
    aside = {name: len(tower["ignored"]) for name, tower in provenance["towers"].items()}
    assert aside == {name: layout.aside.get(name, 0) for name in layout.names}

    options.pop("tokenizer", None)
    info = clip_jax.info(sources, **options)
    assert info.provenance == provenance
    kept = {name: set(tower.dtypes) for name, tower in info.towers.items()}
    assert kept == {name: layout.dtypes.get(name, {"float32"}) for name in layout.names}


@pytest.mark.parametrize(
    "name",
    [
        "SDXL",
        "SD 1, Lightning",
        "FLUX in float8, its transformer in another quantisation",
        "GGUF Q8_0, names of llama.cpp",
        "Flax T5",
    ],
)
def test_convert_keeps_what_was_written(name, t5_tokenizer, tmp_path):
    layout = layout_called(name)
    sources, options = layout.files(tmp_path), options_of(layout, t5_tokenizer)
    source = clip_jax.load(sources, **options)

    out = convert(sources, tmp_path / "out", **options)

    loaded, info = clip_jax.load(out), clip_jax.info(out)
    assert loaded.family == source.family
    for tower, tree in source.params.items():
        found = flatten(loaded.params[tower])
        for path, array in flatten(tree).items():
            # What was quantised is kept in bfloat16.
            rounded = np.asarray(array).astype(ml_dtypes.bfloat16).astype(np.float32)
            quantised = "bfloat16" in layout.dtypes.get(tower, ()) and not np.array_equal(found[path], array)
            np.testing.assert_array_equal(found[path], rounded if quantised else array, err_msg=path)
    assert {n: set(t.dtypes) for n, t in info.towers.items()} == {
        n: layout.dtypes.get(n, {"float32"}) for n in layout.names
    }
    towers = info.provenance["towers"]
    assert info.provenance["format"] == layout.format
    assert {n: tower["names"] for n, tower in towers.items()} == layout.names
    assert all(len(digest) == 64 for tower in towers.values() for digest in tower["sha256"].values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_convert_casts_what_is_quantised(dtype, t5_tokenizer, tmp_path):
    layout = LAYOUTS["t5xxl_fp8_e4m3fn_scaled"]
    out = convert(layout.files(tmp_path), tmp_path / "out", dtype=dtype, **options_of(layout, t5_tokenizer))
    info = clip_jax.info(out)
    assert info.towers["clip_l"].dtypes == (dtype,)
    # T5's `wo` overflows float16, and stays in float32.
    assert set(info.towers["t5"].dtypes) == {dtype, "float32"} - ({"float32"} if dtype == "bfloat16" else set())


# --- what the tables above do not show


def test_a_projection_that_is_stored_the_other_way_round_is_mended_by_the_switch(tmp_path, folders):
    """Square as it is, no shape tells."""
    state = {**open_clip(model("clip_g")), "text_projection": model("clip_g")["text_projection.weight"]}
    source = write_safetensors(tmp_path / "0.weights", state)
    folder = folders["sdxl_refiner"]
    wrong = clip_jax.load(source, config=configs_of("sdxl_refiner"))
    mended = clip_jax.load(source, config=configs_of("sdxl_refiner"), text_projection="transpose")
    right = embeddings(folder, folder.params)["pooled_prompt_embeds"]

    assert np.abs(embeddings(wrong, wrong.params)["pooled_prompt_embeds"] - right).max() > 0.1
    np.testing.assert_array_equal(embeddings(mended, mended.params)["pooled_prompt_embeds"], right)


def test_longclip_has_its_248_positions(tmp_path):
    config = dataclasses.replace(CONFIGS["clip_l"], max_position_embeddings=248)
    source = write_safetensors(tmp_path / "0.weights", open_clip(hf_state(config)))
    encoder = clip_jax.load(source, config={"clip_l": config})
    assert encoder("a cat " * 100).prompt_embeds.shape == (2, 248, 16)


def test_a_whole_clip_model_of_flax_is_read(tmp_path):
    """Its temperature stands at the top, below no module."""
    config = CONFIGS["clip_l"]
    folder = write_clip_model(tmp_path / "clip", config, model("clip_l"))
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    top = {"logit_scale": whole.pop("logit_scale")}
    write_msgpack(folder / "flax_model.msgpack", {**flax(whole), **top})
    encoder = clip_jax.load(folder, family="sd15")
    assert_params_are(encoder.params["clip_l"], model("clip_l"))
    assert "logit_scale" in encoder.provenance["towers"]["clip_l"]["ignored"]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_the_scale_of_a_tensor_may_have_any_shape_of_one(tmp_path, shape, t5_tokenizer):
    state = comfy_2024(scaled(model("t5")))
    reshaped = {n: a.reshape(shape) if n.endswith(".scale_weight") else a for n, a in state.items()}
    options = {"config": configs_of("flux"), "tokenizer": {"t5": t5_tokenizer}}
    clip_l = write_safetensors(tmp_path / "0.weights", model("clip_l"))
    found = [
        flatten(clip_jax.load([clip_l, write_safetensors(tmp_path / "1.weights", t5)], **options).params["t5"])
        for t5 in (state, reshaped)
    ]
    assert found[0].keys() == found[1].keys()
    for path, array in found[0].items():
        np.testing.assert_array_equal(found[1][path], array, err_msg=path)


def test_the_tokenizer_that_comfyui_saves_as_a_tensor_is_ignored(tmp_path, t5_tokenizer):
    t5 = {**model("t5"), "spiece_model": np.frombuffer(b"pieces", np.uint8)}
    sources = [write_safetensors(tmp_path / f"{i}.weights", state) for i, state in enumerate((model("clip_l"), t5))]
    encoder = clip_jax.load(sources, config=configs_of("flux"), tokenizer={"t5": t5_tokenizer})
    assert encoder.provenance["towers"]["t5"]["ignored"] == ["spiece_model"]


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"), [("F4", [3, 4], 6), ("F8_E8M0", [5], 5), ("C64", [2], 16), ("F8_E4M3FNUZ", [5], 5)]
)
def test_the_dtypes_of_a_diffusion_model_in_the_same_file_do_not_matter(tmp_path, dtype, shape, nbytes):
    prefix = "cond_stage_model.transformer."
    path = write_safetensors(tmp_path / "0", {prefix + name: array for name, array in model("clip_l").items()})
    add_tensor(path, "model.diffusion_model.x.weight", dtype, shape, nbytes)
    encoder = clip_jax.load(path, config=configs_of("sd15"))
    assert_params_are(encoder.params["clip_l"], model("clip_l"))


@pytest.mark.parametrize(("dtype", "found"), [("F4", "F4"), ("C64", "complex64")])
def test_such_a_dtype_in_the_text_encoder_is_refused_by_name(tmp_path, dtype, found):
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    state = {other: array for other, array in model("clip_l").items() if other != name}
    path = write_safetensors(tmp_path / "0", state)
    add_tensor(path, name, dtype, [32, 16], 32 * 16 * {"F4": 1, "C64": 16}[dtype] // 2)
    with pytest.raises(CheckpointError, match=rf"dtypes that are not read: .* found \(1\): {name} is {found}"):
        clip_jax.load(path, config=configs_of("sd15"))


def add_tensor(path: Path, name: str, dtype: str, shape: list[int], nbytes: int) -> None:
    """Puts a tensor of any dtype at the end of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + nbytes]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data + bytes(nbytes))
