"""`export`: the round trip gives every bit back, in files that others read, whole or not at all."""

import dataclasses
import importlib
import itertools
import json
import math
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

import clip_jax
from clip_jax import FAMILIES, CheckpointError, ClipJaxError
from clip_jax.convert import convert, export
from clip_jax.convert import export as export_function
from clip_jax.convert.export import _INDEX, MARK, write_component
from clip_jax.convert.readers.safetensors import SafetensorsFile
from clip_jax.params import checkpoint as checkpoints
from tests.checkpoints import TINY, digests, hf_state, write_text_encoder
from tests.formats.model import CONFIGS, model, used, write_pipeline_folder
from tests.formats.names import below


def mixed(state):
    """As a model in float16 that keeps what is sensitive in float32."""
    keep = ("norm", "embedding", "wo.weight", "shared")
    return {name: a if any(part in name for part in keep) else a.astype(np.float16) for name, a in state.items()}


def in_dtype(dtype):
    return lambda state: {name: array.astype(dtype) for name, array in state.items()}


CHANGES = {
    "float32": in_dtype(np.float32),
    "bfloat16": in_dtype(ml_dtypes.bfloat16),
    "float16": in_dtype(np.float16),
    "mixed": mixed,
}


def write_source(folder, family, change):
    states = {tower.name: change(used(tower.name)) for tower in FAMILIES[family].towers}
    return write_pipeline_folder(folder, family, states)


def tensors(folder):
    """Folder of a tower and key -> tensor, of all towers."""
    files = {path.parent.name: SafetensorsFile(path) for path in folder.glob("*/model.safetensors")}
    return {(name, key): file.read(key) for name, file in files.items() for key in file.tensors}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape)
        assert found[key].tobytes() == array.tobytes(), key


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A source, what it is converted to, and what that is exported to. Read only."""
    folder = tmp_path_factory.mktemp("sdxl")
    source = write_source(folder / "source", "sdxl", mixed)
    return source, convert(source, folder / "converted"), export(folder / "converted", folder / "exported")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """A file of SD 3 without T5, and without a projection of CLIP-L; converted, and exported. Read only."""
    folder = tmp_path_factory.mktemp("sd3")
    prefixes = {"clip_l": "text_encoders.clip_l.transformer.", "clip_g": "text_encoders.clip_g.transformer."}
    save_file(
        {k: a for name, prefix in prefixes.items() for k, a in below(prefix, model(name)).items()}, folder / "file"
    )
    configs = {name: CONFIGS[name] for name in prefixes}
    converted = convert(folder / "file", folder / "converted", config=configs)
    return converted, export(converted, folder / "exported")


# --- the round trip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("sd15", "float16"),
        ("sd21", "float32"),
        ("sdxl", "bfloat16"),
        pytest.param("sdxl", "float16", marks=pytest.mark.slow),
        ("sdxl_refiner", "bfloat16"),
        ("sd3", "float16"),
        pytest.param("flux", "bfloat16", marks=pytest.mark.slow),
        ("flux", "mixed"),
    ],
)
def test_the_round_trip_gives_every_bit_and_the_family_back(tmp_path, family, change):
    source = write_source(tmp_path / "source", family, CHANGES[change])
    convert(source, tmp_path / "converted", family=family)
    exported = export(tmp_path / "converted", tmp_path / "exported")
    assert_same_bits(tensors(exported), tensors(source))
    # SD 1.5 and 2 are told apart by their widths, which those of tests are not.
    found = clip_jax.info(exported, family=family if family in ("sd15", "sd21") else None)
    assert found.family == clip_jax.info(source, family=family).family


def test_the_second_round_trip_gives_the_same_files(sdxl, tmp_path):
    _, _, exported = sdxl
    again = export(convert(exported, tmp_path / "converted"), tmp_path / "exported")
    first, second = digests(exported), digests(again)
    # The weights come from another place the second time.
    assert first.pop(MARK) != second.pop(MARK)
    assert second == first


def test_what_is_loaded_is_the_same(sdxl):
    _, converted, exported = sdxl
    found, expected = (clip_jax.load(folder) for folder in (exported, converted))
    assert (found.family, found.config) == (expected.family, expected.config)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    for tower, tokenizer in expected.tokenizers.items():
        prompts = ["a cat!", ""]
        np.testing.assert_array_equal(found.tokenizers[tower].encode(prompts), tokenizer.encode(prompts))


@pytest.mark.slow
def test_zeros_for_no_negative_prompt_are_kept(sdxl, tmp_path):
    source = write_source(tmp_path / "source", "sdxl", dict)
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    exported = export(convert(source, tmp_path / "converted"), tmp_path / "exported")
    assert [clip_jax.info(folder).family.zero_negative for folder in (sdxl[2], exported)] == [True, False]


def test_a_tower_that_was_left_out_stays_out(sd3):
    _, exported = sd3
    folders = {path.name for path in exported.iterdir() if path.is_dir()}
    assert folders == {"text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"}
    index = json.loads((exported / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    assert [tower.name for tower in clip_jax.info(exported).family.towers] == ["clip_l", "clip_g"]


def test_a_projection_that_stands_for_the_identity_is_written(sd3):
    """Files of SD 3 have none for CLIP-L, and diffusers knows no CLIP-L of SD 3 without."""
    converted, exported = sd3
    width = CONFIGS["clip_l"].hidden_size
    assert clip_jax.info(converted).towers["clip_l"].config.projection_dim is None
    found = {key: array for (folder, key), array in tensors(exported).items() if folder == "text_encoder"}
    assert_same_bits(found, {**model("clip_l"), "text_projection.weight": np.eye(width, dtype=np.float32)})
    config = json.loads((exported / "text_encoder" / "config.json").read_text())
    assert (config["architectures"], config["projection_dim"]) == (["CLIPTextModelWithProjection"], width)


def test_a_small_group_at_a_time_gives_the_same(sdxl, tmp_path, monkeypatch):
    _, converted, exported = sdxl
    monkeypatch.setattr(checkpoints, "_READ_BYTES", 100_000)
    assert digests(export(converted, tmp_path / "exported")) == digests(exported)


# --- the files


def test_the_safetensors_package_reads_the_file(sdxl):
    source, _, exported = sdxl
    for folder in ("text_encoder", "text_encoder_2"):
        expected = SafetensorsFile(source / folder / "model.safetensors")
        with safetensors.safe_open(exported / folder / "model.safetensors", framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == set(expected.tensors)
            for key in expected.tensors:
                np.testing.assert_array_equal(file.get_tensor(key), expected.read(key))


def test_every_tensor_is_aligned(tmp_path):
    """Else torch cannot view its bytes. Odd sizes, and every second tensor in half the precision."""
    config = dataclasses.replace(TINY, hidden_size=15, num_attention_heads=3, num_hidden_layers=1)
    dtypes = itertools.cycle([np.float16, np.float32])
    state = {name: array.astype(next(dtypes)) for name, array in hf_state(config).items()}
    source = write_text_encoder(tmp_path / "source", config.to_hf(), state)
    exported = export(convert(source, tmp_path / "converted", family="sd15"), tmp_path / "exported")

    data = (exported / "text_encoder" / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    sizes = {"F16": 2, "F32": 4}
    assert start % 8 == 0
    assert {entry["dtype"] for entry in entries} == sizes.keys()
    assert any(math.prod(entry["shape"]) % 2 for entry in entries if entry["dtype"] == "F16")
    assert [entry for entry in entries if entry["data_offsets"][0] % sizes[entry["dtype"]]] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_index_is_of_the_family(family):
    index = _INDEX[family]
    assert index["_class_name"] in FAMILIES[family].pipelines
    assert not index.keys() & {tower.folder for tower in FAMILIES[family].towers}


def test_the_index_and_the_configs_name_what_is_there(sdxl):
    _, _, exported = sdxl
    assert json.loads((exported / "model_index.json").read_text()) == {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizerFast"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizerFast"],
    }
    for folder, tower in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        config = json.loads((exported / folder / "config.json").read_text())
        assert clip_jax.ClipTextConfig.from_hf(config) == CONFIGS[tower]


def test_where_the_weights_come_from_is_kept(sdxl):
    _, converted, exported = sdxl
    kept = json.loads((exported / MARK).read_text())
    assert kept["provenance"] == clip_jax.info(converted).provenance
    assert kept["exported_by"] == checkpoints.versions()


# --- whole or not at all


def test_the_absolute_path_is_returned(sdxl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export(sdxl[1], "deep/out") == tmp_path / "deep" / "out"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_what_is_there_is_kept(sdxl, tmp_path):
    _, converted, _ = sdxl
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match="exists already"):
        export(converted, out)
    with pytest.raises(CheckpointError, match="not overwritten"):
        export(converted, out, overwrite=True)
    assert (out / "mine").read_text() == "keep"


def test_neither_a_source_nor_a_checkpoint_is_replaced(sdxl, tmp_path):
    source, converted, _ = sdxl
    for path in (source, converted):
        before = digests(path)
        with pytest.raises(CheckpointError, match="not overwritten"):
            export(converted, path, overwrite=True)
        assert digests(path) == before


def test_a_checkpoint_within_what_is_to_be_replaced_is_kept(sdxl, tmp_path):
    _, converted, _ = sdxl
    out = export(converted, tmp_path / "out")
    shutil.copytree(converted, out / "text_encoder" / "orbax")
    before = digests(tmp_path)
    with pytest.raises(CheckpointError, match="orbax lies in .*out, which is to be replaced"):
        export(out / "text_encoder" / "orbax", out, overwrite=True)
    assert digests(tmp_path) == before


def test_what_was_put_beside_an_export_is_kept(sdxl, tmp_path):
    _, converted, _ = sdxl
    out = export(converted, tmp_path / "out")
    (out / "unet").mkdir()
    (out / "unet" / "weights").write_text("weeks of training")
    before = digests(tmp_path)
    with pytest.raises(CheckpointError, match="an export beside which clip_jax did not write unet, so it is not over"):
        export(converted, out, overwrite=True)
    assert digests(tmp_path) == before


def test_an_earlier_export_is_replaced_if_asked(sdxl, tmp_path):
    _, converted, exported = sdxl
    export(converted, tmp_path / "out")
    (tmp_path / "out" / "text_encoder" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="exists already"):
        export(converted, tmp_path / "out")
    export(converted, tmp_path / "out", overwrite=True)
    assert digests(tmp_path / "out") == digests(exported)


def test_a_full_disk_leaves_nothing(sdxl, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(export_function.__globals__, "_write_safetensors", full)
    with pytest.raises(CheckpointError, match="cannot be written.*No space left"):
        export(sdxl[1], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused(sdxl, tmp_path):
    source, converted, _ = sdxl
    with pytest.raises(ClipJaxError, match="format must be 'hf', found 'gguf'"):
        export(converted, tmp_path / "out", format="gguf")
    for path in (source, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="not a folder written by `clip-jax convert`"):
            export(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_tensors_begin_at_multiples_of_8_bytes(tmp_path):
    for length in range(8):
        folder = tmp_path / str(length)
        write_component(folder, {}, {f"a/{'x' * length}/kernel": np.ones((2, 2), np.float32)})
        assert int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little") % 8 == 0


@pytest.mark.slow
def test_versions_of_a_folder_are_not_mixed(encoder, tmp_path, monkeypatch):
    encoder.save(tmp_path / "source")
    module = importlib.import_module("clip_jax.convert.export")  # not the function of that name
    read = module.read_tokenizer

    def replaced_first(*arguments):
        encoder.save(tmp_path / "source", overwrite=True)
        return read(*arguments)

    monkeypatch.setattr(module, "read_tokenizer", replaced_first)
    with pytest.raises(CheckpointError, match=r"source was replaced while it was read\. Try again\."):
        export(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
