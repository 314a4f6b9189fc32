"""Foreign checkpoints through `load` and `convert`: the spellings that are read, and all that is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import clip_jax
from clip_jax import FAMILIES, CheckpointError, ClipTextConfig, ConfigError, Family
from clip_jax.convert import convert
from clip_jax.families import Tower
from clip_jax.params.shapes import flatten
from clip_jax.tokenizers import ClipTokenizer
from tests.checkpoints import (
    TINY,
    TINY_G,
    TINY_H,
    digests,
    hf_state,
    write_clip_model,
    write_pipeline,
    write_shards,
    write_text_encoder,
)
from tests.formats.files import write_safetensors

POSITION_IDS = {"text_model.embeddings.position_ids": np.arange(77)[None]}
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 5\n"


@pytest.fixture
def small_families(monkeypatch):
    """Adds families of the widths of TINY and TINY_H, so that these are told apart like the real ones."""
    for name, tower in {
        "small_l": Tower(name="clip_l", config=TINY),
        "small_h": Tower(name="clip_h", config=TINY_H, pad_token="!", without_last=True),
    }.items():
        family = Family(name=name, title=name, pipelines=frozenset({"StableDiffusionPipeline"}), towers=(tower,))
        monkeypatch.setitem(FAMILIES, name, family)


@pytest.fixture
def pipeline(tiny_sd15, tmp_path) -> Path:
    """A copy of a good diffusers folder, to spoil."""
    return Path(shutil.copytree(tiny_sd15, tmp_path / "source"))


def refused(source, message, error=CheckpointError, **options):
    """Both `load` and `convert` fail with `message`; neither changes or leaves anything beside the source."""
    place = source.parent
    before = digests(place)
    options = {"family": "sd15"} | options
    for call in (
        lambda: clip_jax.load(source, **options),
        lambda: convert(source, place / "out", **options),
    ):
        with pytest.raises(error, match=message):
            call()
        assert digests(place) == before


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def expected_params(state):
    """The parameters that a state dict stands for: the key table once more, by its rules."""
    leaves = {}
    for name, array in state.items():
        *module, kind = name.removeprefix("text_model.").split(".")
        if kind == "weight":
            kind = "scale" if "norm" in module[-1] else "embedding" if module[0] == "embeddings" else "kernel"
        leaves["/".join(["text_model", *module, kind])] = array.T if kind == "kernel" else array
    return leaves


def assert_params_equal(params, leaves):
    params = flatten(params)
    assert params.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(np.asarray(params[path]), leaf, strict=True)


# --- what is read


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_params_are_the_source_bit_for_bit(tmp_path, dtype):
    state = {name: array.astype(dtype) for name, array in hf_state(TINY).items()}
    write_text_encoder(tmp_path, TINY.to_hf(), state)

    same = clip_jax.load(tmp_path, family="sd15", dtype=np.dtype(dtype).name)
    single = clip_jax.load(tmp_path, family="sd15")

    assert clip_jax.info(tmp_path, family="sd15").towers["clip_l"].dtypes == (np.dtype(dtype).name,)
    assert_params_equal(same.params["clip_l"], expected_params(state))
    exact = {name: array.astype(np.float32) for name, array in state.items()}
    assert_params_equal(single.params["clip_l"], expected_params(exact))


def test_float64_is_kept_as_float32(tmp_path):
    state = {name: array.astype(np.float64) for name, array in hf_state(TINY).items()}
    source = write_text_encoder(tmp_path / "source", TINY.to_hf(), state)
    out = convert(source, tmp_path / "out", family="sd15")
    for path, options in ((source, {"family": "sd15"}), (out, {})):
        assert clip_jax.info(path, **options).towers["clip_l"].dtypes == ("float32",)
    assert_params_equal(clip_jax.load(out).params["clip_l"], expected_params(hf_state(TINY)))


SPELLINGS = {
    "pipeline without the prefix": lambda folder: write_pipeline(folder, TINY, hf_state(TINY, prefix="")),
    "pipeline without model_index.json": lambda folder: (
        (write_pipeline(folder) / "model_index.json").unlink() or folder
    ),
    "text encoder": lambda folder: write_text_encoder(folder, TINY.to_hf(), hf_state(TINY)),
    "shards": lambda folder: write_shards(folder, TINY.to_hf(), hf_state(TINY)),
    "shards without the prefix": lambda folder: write_shards(folder, TINY.to_hf(), hf_state(TINY, prefix="")),
    "position_ids": lambda folder: write_text_encoder(folder, TINY.to_hf(), hf_state(TINY) | POSITION_IDS),
    "whole CLIPModel": lambda folder: write_clip_model(folder, TINY, hf_state(TINY)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings_give_the_same_params_and_embeddings(encoder, tmp_path, spelling):
    loaded = clip_jax.load(SPELLINGS[spelling](tmp_path / "source"), family="sd15")

    assert loaded.config == encoder.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, encoder.params)
    np.testing.assert_array_equal(loaded("a cat").prompt_embeds, encoder("a cat").prompt_embeds)


def test_what_is_ignored_of_a_whole_clip_model_is_listed(tmp_path):
    source = write_clip_model(tmp_path / "clip", TINY, hf_state(TINY))
    ignored = [
        "logit_scale",
        "text_model.embeddings.position_ids",
        "text_projection.weight",
        "vision_model.embeddings.class_embedding",
        "vision_model.encoder.layers.0.mlp.fc1.weight",
        "visual_projection.weight",
    ]
    provenance = clip_jax.load(source, family="sd15").provenance
    assert provenance["towers"]["clip_l"]["ignored"] == ignored
    assert provenance["format"] == "text encoder folder, safetensors"
    out = convert(source, tmp_path / "out", family="sd15")
    assert clip_jax.info(out).provenance["towers"]["clip_l"]["ignored"] == ignored


def longer(config, blocks):
    return ClipTextConfig.from_hf(config.to_hf() | {"num_hidden_layers": blocks})


def test_the_last_block_of_a_whole_clip_model_is_left_out_where_the_tower_has_fewer(tmp_path, small_families):
    state = hf_state(longer(TINY_H, 3))
    loaded = clip_jax.load(write_clip_model(tmp_path / "clip", longer(TINY_H, 3), state))

    assert loaded.family.name == "small_h"
    assert loaded.config["clip_h"] == TINY_H
    ignored = loaded.provenance["towers"]["clip_h"]["ignored"]
    assert sum(name.startswith("text_model.encoder.layers.2.") for name in ignored) == 16
    used = {name: array for name, array in state.items() if name not in ignored}
    assert_params_equal(loaded.params["clip_h"], expected_params(used))


@pytest.mark.parametrize("whole", [True, False])
def test_blocks_are_left_out_of_no_other_tower(tmp_path, small_families, whole):
    config = longer(TINY, 4)
    if whole:
        source, options = write_clip_model(tmp_path / "clip", config, hf_state(config)), {}
    else:
        source = write_safetensors(tmp_path / "clip_l", hf_state(config))
        options = {"config": {"clip_l": config.to_hf()}}
    loaded = clip_jax.load(source, family="small_l", **options)
    assert loaded.config["clip_l"].num_hidden_layers == 4
    assert_params_equal(loaded.params["clip_l"], expected_params(hf_state(config)))


def test_of_two_blocks_more_none_is_left_out(tmp_path, small_families):
    config = longer(TINY_H, 4)
    loaded = clip_jax.load(write_clip_model(tmp_path / "clip", config, hf_state(config)), family="small_h")
    assert loaded.config["clip_h"].num_hidden_layers == 4


def test_a_plain_text_model_keeps_all_blocks_that_its_config_names(tmp_path, small_families):
    config = longer(TINY_H, 3)
    write_text_encoder(tmp_path / "text", config.to_hf(), hf_state(config))
    assert clip_jax.load(tmp_path / "text").config["clip_h"].num_hidden_layers == 3


def test_a_plain_text_model_with_a_block_more_than_its_config_is_refused(tmp_path, small_families):
    write_text_encoder(tmp_path / "text", TINY_H.to_hf(), hf_state(longer(TINY_H, 3)))
    refused(tmp_path / "text", r"not expected \(16\): text_model\.encoder\.layers\.2\.layer_norm1", family=None)


def test_a_whole_clip_model_that_lacks_a_block_of_its_config_is_refused(tmp_path, small_families):
    write_clip_model(tmp_path / "clip", longer(TINY_H, 2), hf_state(longer(TINY_H, 1)))
    refused(tmp_path / "clip", r"missing \(16\): text_model\.encoder\.layers\.1\.layer_norm1", family=None)


def test_the_width_tells_the_family(tiny_sd15, tiny_sd21, small_families):
    assert clip_jax.info(tiny_sd15).family.name == "small_l"
    assert clip_jax.info(tiny_sd21).family.name == "small_h"


def test_an_unknown_field_of_the_config_warns_once(pipeline, tmp_path):
    edit_json(pipeline / "text_encoder" / "config.json", flux_capacity=3, warp=True)
    for call in (
        lambda: clip_jax.load(pipeline, family="sd15"),
        lambda: convert(pipeline, tmp_path / "out", family="sd15"),
    ):
        with pytest.warns(UserWarning, match="unknown to clip_jax, .*: flux_capacity, warp") as caught:
            call()
        assert len(caught) == 1


# --- tokenizers


def test_the_pad_token_of_the_folder_wins(tmp_path):
    source = write_pipeline(tmp_path / "source", pad_token="!")
    assert clip_jax.load(source, family="sd15").tokenizers["clip_l"].pad_token == "!"


@pytest.mark.parametrize(("config", "pad"), [(TINY, "<|endoftext|>"), (TINY_H, "!")], ids=["l", "h"])
@pytest.mark.parametrize("empty", [True, False])
def test_without_a_tokenizer_the_packaged_one_pads_as_the_family_does(tmp_path, small_families, config, pad, empty):
    source = write_pipeline(tmp_path / "source", config)
    shutil.rmtree(source / "tokenizer")
    if empty:
        (source / "tokenizer").mkdir()
    (tokenizer,) = clip_jax.load_tokenizers(source).values()
    assert tokenizer.pad_token == pad
    assert tokenizer.vocab_size == 49408


def test_a_text_encoder_folder_with_tokenizer_files_uses_them(tmp_path):
    write_text_encoder(tmp_path, TINY.to_hf(), hf_state(TINY))
    ClipTokenizer.packaged("!").save(tmp_path)
    assert clip_jax.load_tokenizers(tmp_path, family="sd15")["clip_l"].pad_token == "!"


def test_another_tokenizer_takes_the_place_of_the_folders(pipeline, tmp_path):
    ClipTokenizer.packaged("!").save(tmp_path / "other")
    encoder = clip_jax.load(pipeline, family="sd15", tokenizer=tmp_path / "other")
    assert encoder.tokenize("", guidance=False).cond["clip_l"].tolist() == [[49406, 49407, *[0] * 75]]


def test_a_tokenizer_that_is_not_there_is_an_error(pipeline, tmp_path):
    with pytest.raises(CheckpointError, match=r"No tokenizer in .*nowhere: .*found: no such folder"):
        clip_jax.load(pipeline, family="sd15", tokenizer=tmp_path / "nowhere")


def test_more_tokens_than_rows_of_the_embedding_are_an_error(tmp_path):
    config = ClipTextConfig.from_hf(TINY.to_hf() | {"vocab_size": 49000})
    source = write_pipeline(tmp_path / "source", config)
    before = digests(tmp_path)
    with pytest.raises(CheckpointError, match="tokenizer of clip_l has 49408 tokens, its embedding 49000 rows"):
        clip_jax.load(source, family="sd15")
    assert digests(tmp_path) == before


def test_a_tokenizer_of_which_files_are_missing_is_an_error(pipeline):
    (pipeline / "tokenizer" / "tokenizer.json").unlink()
    refused(pipeline, r"No tokenizer in .*tokenizer: vocab.json and merges.txt missing")


def test_a_vocabulary_that_is_a_git_lfs_pointer_is_an_error(pipeline):
    (pipeline / "tokenizer" / "tokenizer.json").unlink()
    (pipeline / "tokenizer" / "vocab.json").write_text(LFS_POINTER)
    (pipeline / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    refused(pipeline, r"vocab\.json is a Git LFS pointer, not the file itself: run `git lfs pull`")


# --- folders


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere' does not exist. Expected a folder, a file of weights, a Hub repo id"),
        ("empty", "empty is an empty folder; expected a diffusers folder or a text encoder's folder"),
        (
            "file.safetensors",
            r"file\.safetensors: expected a file of weights .*found 4 bytes or more that begin with b'text'",
        ),
        (
            "notes",
            r"notes has neither model_index\.json nor text_encoder/ nor config\.json; .* a\.txt, b\.txt\.",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    for file in ("file.safetensors", "notes/a.txt", "notes/b.txt"):
        (tmp_path / file).write_text("text")
    refused(tmp_path / name, message)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, r"is a StableDiffusionPipeline without a text_encoder \(model_index\.json names none\)"),
        ({"text_encoder": [None, None]}, "is a StableDiffusionPipeline without a text_encoder"),
        ({"text_encoder": None}, "is a StableDiffusionPipeline without a text_encoder"),
        (
            {"text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_9": ["a", "b"]},
            r"source lacks the folders text_encoder_9, which its model_index\.json names",
        ),
    ],
    ids=["none", "nulls", "null", "lacking"],
)
def test_what_the_model_index_names_must_be_there(pipeline, entries, message):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (pipeline / "model_index.json").write_text(json.dumps(index | entries))
    refused(pipeline, message)


@pytest.mark.parametrize("name", ["AmusedPipeline", "StableDiffusionLatentUpscalePipeline", ["my_file", "MyPipeline"]])
def test_pipelines_that_may_take_something_else_are_not_taken_for_granted(pipeline, encoder, name):
    edit_json(pipeline / "model_index.json", _class_name=name)
    refused(
        pipeline, r"Pipeline.*, of which it is not known what it takes .* pass family= .*clip_jax.compat", family=None
    )
    np.testing.assert_array_equal(
        clip_jax.load(pipeline, family="sd15")("a cat").prompt_embeds, encoder("a cat").prompt_embeds
    )


@pytest.mark.parametrize(
    "name", ["FlaxStableDiffusionPipeline", "AnimateDiffPipeline", "LatentConsistencyModelPipeline"]
)
def test_pipelines_that_encode_as_others_do(pipeline, small_families, monkeypatch, name):
    edit_json(pipeline / "model_index.json", _class_name=name)
    alike = dataclasses.replace(FAMILIES["small_l"], pipelines=FAMILIES["sd15"].pipelines)
    monkeypatch.setitem(FAMILIES, "small_l", alike)
    assert clip_jax.info(pipeline).family == alike


@pytest.mark.slow
def test_of_a_whole_clip_the_family_knows_the_pad_token(tiny_sd21, tmp_path):
    """The tokenizer beside OpenCLIP's weights pads with another token than SD 2.x, which was trained on them."""
    source = write_clip_model(tmp_path / "clip", TINY_H, hf_state(TINY_H))
    ClipTokenizer.packaged("<|endoftext|>").save(source)
    ids = clip_jax.load(tiny_sd21, family="sd21").tokenize("a cat!").cond["clip_h"]
    np.testing.assert_array_equal(clip_jax.load(source, family="sd21").tokenize("a cat!").cond["clip_h"], ids)
    out = convert(source, tmp_path / "out", family="sd21")
    np.testing.assert_array_equal(clip_jax.load(out).tokenize("a cat!").cond["clip_h"], ids)

    alone = write_text_encoder(tmp_path / "alone", TINY_H.to_hf(), hf_state(TINY_H))  # a part of some pipeline
    ClipTokenizer.packaged("<|endoftext|>").save(alone)
    assert clip_jax.load(alone, family="sd21").tokenizers["clip_h"].pad_token == "<|endoftext|>"


def test_where_no_class_is_named_the_weights_tell_whether_it_projects(tmp_path):
    hf = {name: value for name, value in TINY_G.to_hf().items() if name != "architectures"}
    with_projection = write_text_encoder(tmp_path / "with", hf, hf_state(TINY_G))
    assert clip_jax.info(with_projection, family="sdxl_refiner").family.name == "sdxl_refiner"
    state = {name: array for name, array in hf_state(TINY_G).items() if name != "text_projection.weight"}
    without = write_text_encoder(tmp_path / "without", hf, state)
    with pytest.raises(CheckpointError, match="expected a CLIPTextModelWithProjection"):
        clip_jax.info(without, family="sdxl_refiner")


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("sd15", "is not of family sd15: expected text_encoder, found text_encoder, text_encoder_2"),
        (None, r"is of no known family \(sd15: expected text_encoder, found text_encoder, text_encoder_2; sd21: "),
    ],
)
def test_a_second_text_encoder_is_not_left_out_silently(pipeline, family, message):
    shutil.copytree(pipeline / "text_encoder", pipeline / "text_encoder_2")
    edit_json(pipeline / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    refused(pipeline, message, family=family)


def test_a_second_text_encoder_that_the_model_index_does_not_name_is_not_read(pipeline, encoder):
    shutil.copytree(pipeline / "text_encoder", pipeline / "text_encoder_2")
    edit_json(pipeline / "model_index.json", text_encoder_2=[None, None])
    assert clip_jax.info(pipeline, family="sd15").family == encoder.family


@pytest.mark.parametrize("file", ["model_index.json", "text_encoder/config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "json is not valid JSON .Expecting property name"),
        ("", "json is not valid JSON .Expecting value"),
        ("[1]", "json: expected a JSON object, found a list"),
        ("[" * 100_000, "json is not valid JSON .maximum recursion depth"),
        (LFS_POINTER, "json is a Git LFS pointer, not the file itself: run `git lfs pull`"),
        (b"\xff\xfe", "json: expected UTF-8 text, found 'utf-8' codec"),
    ],
    ids=["cut", "empty", "list", "deep", "lfs", "utf-16"],
)
def test_json_that_cannot_be_read_is_an_error_with_the_path(pipeline, file, content, message):
    (pipeline / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(pipeline, rf"{file.removesuffix('json')}{message}")


def test_without_a_config_the_message_says_to_copy_it(pipeline):
    (pipeline / "text_encoder" / "config.json").unlink()
    refused(pipeline, r"text_encoder has no config\.json; expected one beside the weights")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act must be one of quick_gelu, .*, found 'relu'"),
        ({"model_type": "t5"}, ".*[Tt]5"),
        ({"model_type": "bert"}, "Expected the config of a CLIP text model .*found model_type 'bert'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive int, found 0"),
        ({"hidden_size": "32"}, "hidden_size must be a positive int, found '32'"),
    ],
    ids=["activation", "t5", "bert", "zero", "text"],
)
def test_a_config_that_cannot_be_honoured_is_an_error_with_the_path(pipeline, changes, message):
    edit_json(pipeline / "text_encoder" / "config.json", **changes)
    refused(pipeline, rf"source/text_encoder/config\.json: {message}", ConfigError)


# --- families


@pytest.mark.parametrize(
    ("config", "family", "message"),
    [
        (
            TINY_H,
            "small_l",
            r"source is not of family small_l: .*expected width 32 \(clip_l\), found 48, that of clip_h",
        ),
        (TINY, "small_h", r"not of family small_h: .*expected width 48 \(clip_h\), found 32, that of clip_l"),
        (TINY_H, "sd15", r"is not of family sd15: .*found 48, that of clip_h"),
        (TINY, "sd99", "Unknown family 'sd99'; expected one of sd15, sd21"),
    ],
)
def test_a_wrong_family_is_refused(tmp_path, small_families, config, family, message):
    refused(write_pipeline(tmp_path / "source", config), message, family=family)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_one_text_encoder_is_no_family_of_two(tmp_path, family):
    source = write_text_encoder(tmp_path / "source", TINY.to_hf(), hf_state(TINY))
    refused(source, "expected text_encoder, text_encoder_2, found one text encoder", family=family)


def test_an_unknown_width_asks_for_the_family(pipeline):
    refused(pipeline, r"source (is|could be) of .*sd15.*sd21.* [Pp]ass family=", family=None)


# --- tensors


@pytest.mark.parametrize("whole", [False, True])
def test_all_faults_of_the_tensors_are_reported_at_once(tmp_path, whole):
    state = hf_state(TINY)
    del state["text_model.encoder.layers.1.mlp.fc1.bias"], state["text_model.final_layer_norm.weight"]
    state["text_model.encoder.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 16), np.float32)
    state["lora_up.weight"] = np.zeros(3, np.float32)
    if whole:
        write_clip_model(tmp_path / "source", TINY, state)
    else:
        write_text_encoder(tmp_path / "source", TINY.to_hf(), state)
    message = (
        r"source does not match its architecture\. "
        r"missing \(2\): .*\.encoder\.layers\.1\.mlp\.fc1\.bias, text_model\.final_layer_norm\.weight\. "
        r"not expected \(1\): lora_up\.weight\. "
        r"wrong shape \(1\): .*\.0\.self_attn\.q_proj\.weight has shape \(32, 16\), expected \(32, 32\)\."
    )
    refused(tmp_path / "source", message)


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 encoder"),
        ("down_blocks.0.resnets.0.conv1.weight", "a diffusers UNet"),
    ],
)
def test_the_tensors_of_another_model_are_refused_by_its_name(tmp_path, key, model):
    write_text_encoder(tmp_path / "source", TINY.to_hf(), {key: np.zeros(3, np.float32)})
    refused(tmp_path / "source", f"source: .*found the tensors of {model}")


def test_the_folder_of_a_unet_is_refused(tmp_path):
    config = {"_class_name": "UNet2DConditionModel", "sample_size": 64}
    source = write_text_encoder(tmp_path / "unet", config, {"conv_in.weight": np.zeros(3, np.float32)})
    refused(source, r"unet/config\.json: Expected the config of .*, found model_type None", ConfigError)


@pytest.mark.parametrize("shards", [False, True])
def test_a_file_that_is_cut_short_is_refused(tmp_path, shards):
    write = write_shards if shards else write_text_encoder
    source = write(tmp_path / "source", TINY.to_hf(), hf_state(TINY))
    file = max(source.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    refused(source, rf"{file.name}: is cut short: .* 1000 bytes are missing\. Download or copy it again")


def test_a_shard_that_is_missing_is_named(tmp_path):
    source = write_shards(tmp_path / "source", TINY.to_hf(), hf_state(TINY))
    (source / "model-00002-of-00002.safetensors").unlink()
    refused(source, r"2 shards beside it, found that 1 are missing: model-00002-of-00002\.safetensors")


def edit_header(file, name, **changes):
    """Changes what the header of a safetensors file says of one tensor, and nothing else."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header[name] |= changes
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


FC2 = "text_model.encoder.layers.2.mlp.fc2.weight"


@pytest.mark.parametrize(("dtype", "name"), [("I8", "int8"), ("U8", "uint8"), ("BOOL", "bool")])
def test_quantised_tensors_are_refused_with_their_dtype(tmp_path, dtype, name):
    state = hf_state(TINY)
    state[FC2] = state[FC2].astype(np.int8)
    source = write_text_encoder(tmp_path / "source", TINY.to_hf(), state)
    edit_header(source / "model.safetensors", FC2, dtype=dtype)
    refused(source, rf"source holds tensors of dtypes that are not read: .*found \(1\): {FC2} is {name}\.")


def test_a_header_that_lies_is_refused(pipeline):
    edit_header(pipeline / "text_encoder" / "model.safetensors", FC2, shape=[64, 64])
    refused(pipeline, rf"model\.safetensors: is damaged: expected 16384 bytes for tensor '{FC2}'.* found 8192")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS_POINTER.encode(), "a Git LFS pointer to the real file. Run `git lfs pull`"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5, most likely TensorFlow's weights"),
        (b"", "an empty one. Download or copy it again"),
    ],
    ids=["lfs", "tensorflow", "empty"],
)
def test_weights_in_another_format_are_refused(pipeline, content, message):
    (pipeline / "text_encoder" / "model.safetensors").write_bytes(content)
    refused(pipeline, rf"text_encoder/model\.safetensors: expected a file of weights, found {message}")


def test_without_weights_the_message_says_what_was_expected(pipeline):
    (pipeline / "text_encoder" / "model.safetensors").rename(pipeline / "text_encoder" / "tf_model.h5")
    refused(pipeline, r"text_encoder: expected model\.safetensors .* found tf_model\.h5\. Name the file itself")


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(np.float32, -1e5), (np.float32, np.inf), (ml_dtypes.bfloat16, 1e5), (ml_dtypes.bfloat16, np.nan)],
)
def test_float16_that_cannot_hold_a_value_names_the_tensor(tmp_path, value, dtype):
    state = {name: array.astype(dtype) for name, array in hf_state(TINY).items()}
    state[FC2][3, 4] = value
    source = write_text_encoder(tmp_path / "source", TINY.to_hf(), state)
    message = rf"{FC2} holds values up to (100000|99840|inf|nan), float16 ends at 65504\. Use bfloat16 or float32"
    refused(source, message, dtype="float16")


def test_an_orbax_folder_is_not_converted_again(tiny_sd15, tmp_path):
    source = convert(tiny_sd15, tmp_path / "source", family="sd15")
    before = digests(tmp_path)
    with pytest.raises(CheckpointError, match="source is an Orbax folder; expected .* a foreign layout"):
        convert(source, tmp_path / "out")
    assert digests(tmp_path) == before
