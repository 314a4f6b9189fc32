"""What lies beside weights: the config.json and the tokenizer of a folder, also where it is one of several sources."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import clip_jax
from clip_jax import FAMILIES, CheckpointError, ClipTextConfig, ConfigError
from clip_jax.tokenizers import ClipTokenizer, T5Tokenizer
from clip_jax.tokenizers.stand_in import stand_in_t5_tokenizer
from tests.checkpoints import (
    TINY,
    TINY_H,
    TINY_T5,
    hf_state,
    t5_state,
    write_family,
    write_pipeline,
    write_shards,
    write_text_encoder,
)
from tests.convert.published import G, L, clip, open_clip, stored
from tests.formats.files import write_safetensors
from tests.formats.model import CONFIGS, configs_of, model
from tests.formats.names import llama_cpp

# CLIP-L and a T5 that compute what no shape of theirs tells.
ODD_L = dataclasses.replace(ClipTextConfig.sd15(), hidden_act="gelu", layer_norm_eps=1e-6, eos_token_id=5)
ODD_T5 = dataclasses.replace(TINY_T5, relative_attention_max_distance=64, layer_norm_epsilon=1e-5)


def described(folder: Path, config: dict[str, object], name: str = "model.safetensors", **options) -> Path:
    """CLIP-L without its weights, and a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    stored(clip(*L, **options), "F16").write(folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def whole(config: ClipTextConfig) -> dict[str, object]:
    """The config.json of a whole CLIPModel."""
    return {"model_type": "clip", "projection_dim": 768, "text_config": config.to_hf(), "vision_config": {}}


def configs(source: object, **options: object) -> dict[str, object]:
    return {name: tower.config for name, tower in clip_jax.info(source, **options).towers.items()}


@pytest.fixture
def odd_t5(tmp_path) -> Path:
    return write_text_encoder(tmp_path / "t5", ODD_T5.to_hf(), t5_state(ODD_T5))


# --- config.json


@pytest.mark.parametrize("hf", [ODD_L.to_hf(), whole(ODD_L)], ids=["text model", "whole CLIPModel"])
def test_a_folder_in_a_list_is_read_by_its_config(tmp_path, odd_t5, hf):
    folder = described(tmp_path / "clip", hf, projection="vision_config" in hf)
    assert configs(folder, family="sd15") == {"clip_l": ODD_L}
    assert configs([folder, odd_t5]) == {"clip_l": ODD_L, "t5": ODD_T5}
    assert configs([odd_t5, folder]) == {"clip_l": ODD_L, "t5": ODD_T5}


def test_folders_in_a_list_compute_what_their_pipeline_does(tmp_path):
    """SD 3's CLIP-L has a projection there, for which the identity stands where nothing tells of it."""
    pipeline = write_family(tmp_path / "sd3", FAMILIES["sd3"])
    towers = FAMILIES["sd3"].towers
    listed = clip_jax.load(
        [pipeline / tower.folder for tower in towers],
        family="sd3",
        config={tower.name: pipeline / tower.folder / "config.json" for tower in towers},
        tokenizer={tower.name: pipeline / tower.tokenizer_folder for tower in towers},
    )
    alone = clip_jax.load(pipeline)
    assert listed.config == alone.config
    for name, array in vars(alone("a cat", max_sequence_length=8)).items():
        np.testing.assert_array_equal(getattr(listed("a cat", max_sequence_length=8), name), array)


def test_the_projection_that_a_given_config_has_is_never_made_up(tmp_path):
    sources = [write_safetensors(tmp_path / f"{name}.safetensors", model(name)) for name in ("clip_l", "clip_g")]
    given = configs_of("sd3")
    assert configs(sources, family="sd3", config=given)["clip_l"].projection_dim is None
    given["clip_l"] = dataclasses.replace(CONFIGS["clip_l"], projection_dim=16)
    with pytest.raises(CheckpointError, match=r"clip_l\.safetensors .* missing \(1\): text_projection\.weight"):
        clip_jax.info(sources, family="sd3", config=given)


@pytest.mark.parametrize("name", ["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"])
def test_a_file_of_a_usual_name_is_read_by_the_config_beside_it(tmp_path, name):
    described(tmp_path, ODD_L.to_hf(), name)
    assert configs(tmp_path / name) == {"clip_l": ODD_L}


def test_an_index_is_read_by_the_config_beside_it(tmp_path, odd_t5):
    folder = write_shards(tmp_path / "shards", ODD_T5.to_hf(), t5_state(ODD_T5))
    clip_l = described(tmp_path / "clip", ODD_L.to_hf())
    assert configs([folder / "model.safetensors.index.json", clip_l])["t5"] == ODD_T5


@pytest.mark.parametrize(
    ("hf", "blocks"), [(None, 23), ("text", 24), ("whole", 23)], ids=["no config", "text model", "whole CLIPModel"]
)
def test_a_file_keeps_the_blocks_that_its_folder_keeps(tmp_path, hf, blocks):
    config = dataclasses.replace(ClipTextConfig.sd21(), num_hidden_layers=24)
    stored(clip(1024, 24, projection=True), "F16").write(tmp_path / "model.safetensors")
    if hf:
        (tmp_path / "config.json").write_text(json.dumps(config.to_hf() if hf == "text" else whole(config)))
        assert configs(tmp_path, family="sd21")["clip_h"].num_hidden_layers == blocks
    assert configs(tmp_path / "model.safetensors")["clip_h"].num_hidden_layers == blocks


UNRELATED = {
    "a UNet's": {"_class_name": "UNet2DConditionModel", "sample_size": 64},
    "another width's": dataclasses.replace(TINY_H, hidden_act="gelu").to_hf(),
    "T5's": ODD_T5.to_hf(),
    "another language model's": {"model_type": "llama"},
}


@pytest.mark.parametrize("name", UNRELATED)
def test_a_config_of_another_model_beside_a_file_is_left_aside(tmp_path, name):
    described(tmp_path, UNRELATED[name])
    assert configs(tmp_path / "model.safetensors") == {"clip_l": ClipTextConfig.sd15()}


def test_a_file_of_another_name_is_not_read_by_the_config_beside_it(tmp_path):
    """A folder of many models has one config.json at most, and not of all."""
    described(tmp_path, ODD_L.to_hf(), "clip_l.safetensors")
    assert configs(tmp_path / "clip_l.safetensors") == {"clip_l": ClipTextConfig.sd15()}


def test_a_file_of_several_text_encoders_is_not_read_by_the_config_beside_it(tmp_path):
    both = stored(clip(*L), "F16", prefix="conditioner.embedders.0.transformer.")
    both |= stored(open_clip(*G, text_alone=False), "F16", prefix="conditioner.embedders.1.model.")
    both.write(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(ODD_L.to_hf()))
    assert configs(tmp_path / "model.safetensors")["clip_l"] == ClipTextConfig.sd15()


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_a_config_that_cannot_be_honoured_is_an_error_unless_another_is_given(tmp_path, odd_t5, file):
    folder = described(tmp_path / "clip", ODD_L.to_hf() | {"hidden_act": "relu"})
    with pytest.raises(ConfigError, match=r"config\.json: hidden_act must be one of .*, found 'relu'"):
        clip_jax.info([folder / file, odd_t5])
    assert configs([folder / file, odd_t5], config={"clip_l": ODD_L})["clip_l"] == ODD_L


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (ODD_T5.to_hf(), r"clip: its config and its weights are of two models; found the tensors of a CLIP text model"),
        (ClipTextConfig.sd21().to_hf(), r"clip does not match its architecture\. .*wrong shape"),
    ],
    ids=["kind", "width"],
)
def test_a_folder_whose_config_is_of_another_model_is_refused(tmp_path, odd_t5, hf, message):
    folder = described(tmp_path / "clip", hf)
    with pytest.raises(CheckpointError, match=message):
        clip_jax.info([folder, odd_t5])


def test_a_folder_with_a_config_holds_one_text_encoder(tmp_path, odd_t5):
    state = {
        f"{n}.{name}": array
        for n, part in enumerate((model("clip_l"), model("clip_g")))
        for name, array in part.items()
    }
    folder = write_text_encoder(tmp_path / "two", CONFIGS["clip_l"].to_hf(), state)
    with pytest.raises(CheckpointError, match=r"two: expected one text encoder, found clip at '0\.' and clip at '1\.'"):
        clip_jax.info([folder, odd_t5])


# --- classes


def test_the_pipeline_names_the_class_that_a_config_does_not(tmp_path):
    pipeline = write_family(tmp_path / "sdxl", FAMILIES["sdxl"])
    expected = configs(pipeline)
    path = pipeline / "text_encoder_2" / "config.json"
    hf = {name: value for name, value in json.loads(path.read_text()).items() if name != "architectures"}
    path.write_text(json.dumps(hf))
    assert configs(pipeline) == expected
    # The class that a config.json does name goes before.
    path.write_text(json.dumps(hf | {"architectures": ["CLIPTextModel"]}))
    with pytest.raises(CheckpointError, match=r"text_encoder_2: expected a CLIPTextModelWithProjection \(clip_g\)"):
        clip_jax.info(pipeline)


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_weights_tell_of_a_projection_where_no_class_is_named(tmp_path, odd_t5, file):
    hf = {**ClipTextConfig.sdxl_clip_g().to_hf(), "hidden_act": "quick_gelu", "architectures": None}
    stored(clip(*G, projection=True), "F16").write(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf))
    clip_l = described(tmp_path / "clip", ODD_L.to_hf())
    found = configs([tmp_path / file, clip_l], family="sdxl")["clip_g"]
    assert found == dataclasses.replace(ClipTextConfig.sdxl_clip_g(), hidden_act="quick_gelu")


# --- open_clip_config.json


@pytest.mark.parametrize(
    ("prefix", "activation"),
    [
        ("", "quick_gelu"),
        ("text.", "quick_gelu"),
        ("module.", "quick_gelu"),
        ("cond_stage_model.model.", "gelu"),
    ],
)
def test_a_config_of_open_clip_says_nothing_of_a_pipeline_beside_it(tmp_path, prefix, activation):
    stored(open_clip(1024, 24, text_alone=False), "F16", prefix=prefix).write(tmp_path / "v2-1.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"quick_gelu": True, "text_cfg": {"width": 1024, "heads": 16}}})
    )
    assert configs(tmp_path / "v2-1.safetensors")["clip_h"].hidden_act == activation


# --- shards


def test_an_index_may_list_what_no_shard_has_or_needs(tmp_path):
    """A tied embedding that was not written, a buffer of older versions, a tensor in another shard than listed."""
    t5 = write_shards(tmp_path / "t5", TINY_T5.to_hf(), t5_state(TINY_T5))
    clip_l = write_shards(tmp_path / "clip", TINY.to_hf(), hf_state(TINY))
    ids = "text_model.embeddings.position_ids"
    for folder, extra in ((t5, "encoder.embed_tokens.weight"), (clip_l, ids)):
        path = folder / "model.safetensors.index.json"
        first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
        places = json.loads(path.read_text())["weight_map"]
        moved = next(iter(places))
        path.write_text(json.dumps({"weight_map": {**places, extra: first, moved: second}}))
    stand_in_t5_tokenizer().save(t5)

    encoder = clip_jax.load([clip_l, t5], config={"clip_l": TINY})

    embedding = encoder.params["t5"]["shared"]["embedding"]
    np.testing.assert_array_equal(embedding, t5_state(TINY_T5)["shared.weight"])


def test_a_tensor_of_the_encoder_that_no_shard_has_is_an_error(tmp_path):
    state = hf_state(TINY)
    name = "text_model.encoder.layers.1.mlp.fc2.bias"
    folder = write_shards(tmp_path, TINY.to_hf(), {other: array for other, array in state.items() if other != name})
    path = folder / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": {**places, name: next(iter(places.values()))}}))
    with pytest.raises(CheckpointError, match=r"missing \(1\): text_model\.encoder\.layers\.1\.mlp\.fc2\.bias"):
        clip_jax.load(folder, family="sd15")


# --- tokenizers


@pytest.fixture
def flat(tmp_path) -> list[Path]:
    """A folder of bare files, CLIP-L and T5."""
    return [write_safetensors(tmp_path / f"{name}.safetensors", model(name)) for name in ("clip_l", "t5")]


def test_the_tokenizer_of_clip_beside_t5_is_none_of_t5(flat, tmp_path):
    ClipTokenizer.packaged().save(tmp_path)
    message = (
        r"No T5 tokenizer in .*: expected spiece\.model or a tokenizer\.json with a 'Unigram' model .*; found: "
        r"clip_l\.safetensors, t5\.safetensors, tokenizer\.json, tokenizer_config\.json\. Pass the folder"
    )
    with pytest.raises(CheckpointError, match=message):
        clip_jax.load(flat, config=configs_of("flux"))
    stand_in_t5_tokenizer().save(tmp_path / "t5")
    encoder = clip_jax.load(flat, config=configs_of("flux"), tokenizer={"t5": tmp_path / "t5"})
    assert isinstance(encoder.tokenizers["t5"], T5Tokenizer)


@pytest.mark.parametrize("files", [[], ["tokenizer_config.json"], ["vocab.json", "merges.txt"], ["tokenizer.json"]])
def test_the_tokenizer_in_a_gguf_is_used_beside_files_of_clip(flat, tmp_path, files):
    gguf = pytest.importorskip("gguf")
    stand_in_t5_tokenizer().save(tmp_path / "t5")
    whole = json.loads((tmp_path / "t5" / "tokenizer.json").read_text())
    pieces = whole["model"]["vocab"]
    special = {token["id"] for token in whole["added_tokens"]}
    writer = gguf.GGUFWriter(tmp_path / "t5.gguf", "t5encoder")
    for name, array in llama_cpp(model("t5")).items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.add_tokenizer_model("t5")
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_scores([score for _, score in pieces])
    writer.add_token_types([3 if index in special else 1 for index in range(len(pieces))])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ClipTokenizer.packaged().save(tmp_path / "clip")
    for name in files:
        source = tmp_path / "clip" / name
        (tmp_path / name).write_text(source.read_text() if source.exists() else "")

    tokenizers = clip_jax.load_tokenizers([flat[0], tmp_path / "t5.gguf"], config=configs_of("flux"))

    assert tokenizers["t5"].vocab_size == len(pieces)
    stand_in_t5_tokenizer().save(tmp_path)  # its own beside it goes before
    again = clip_jax.load_tokenizers([flat[0], tmp_path / "t5.gguf"], config=configs_of("flux"))
    assert again["t5"].vocab_size == stand_in_t5_tokenizer().vocab_size


# --- what cannot be read


@pytest.mark.parametrize("name", ["model_index.json", "text_encoder/config.json", "tokenizer/tokenizer.json"])
def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch, name):
    source = write_pipeline(tmp_path / "source")
    read_text = Path.read_text

    def forbidden(path: Path, **options: str) -> str:
        if path == source / name:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, **options)

    monkeypatch.setattr(Path, "read_text", forbidden)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read: Permission denied\. Check the path and its"):
        clip_jax.load(source, family="sd15")


@pytest.mark.parametrize(
    ("folder", "function", "named"),
    [
        ("", "iterdir", "source"),
        ("text_encoder", "iterdir", "text_encoder"),
        ("text_encoder", "exists", "config.json"),
        ("tokenizer", "exists", "tokenizer.json"),
    ],
)
def test_a_folder_that_may_not_be_looked_into_is_named(tmp_path, monkeypatch, folder, function, named):
    source = write_pipeline(tmp_path / "source")
    unpatched = getattr(Path, function)

    def forbidden(path: Path) -> object:
        if source / folder in (path, path.parent if function == "exists" else path):
            raise PermissionError(13, "Permission denied", str(path))
        return unpatched(path)

    monkeypatch.setattr(Path, function, forbidden)
    with pytest.raises(CheckpointError, match=rf"{named}: cannot be read: Permission denied\. Check the path"):
        clip_jax.load(source, family="sd15")


@pytest.mark.parametrize(
    ("name", "reason"), [("nowhere.json", "No such file or directory"), ("folder", "Is a directory")]
)
def test_a_config_that_cannot_be_read_is_named(flat, tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read: {reason}\. Check the path"):
        clip_jax.info(flat, config={"clip_l": tmp_path / name})


def test_the_users_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    source = write_pipeline(tmp_path / "source")
    ClipTokenizer.packaged("!").save(tmp_path / "other")
    encoder = clip_jax.load(
        source / "text_encoder" / "model.safetensors",
        config={"clip_l": "~/source/text_encoder/config.json"},
        tokenizer="~/other",
    )
    assert encoder.config["clip_l"] == TINY
    assert encoder.tokenizers["clip_l"].pad_token == "!"
    with pytest.raises(CheckpointError, match=r"~nobody-of-that-name/x: cannot be read: No such file"):
        clip_jax.info(source / "text_encoder" / "model.safetensors", config={"clip_l": "~nobody-of-that-name/x"})
