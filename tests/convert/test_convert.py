"""`convert`: the folder equals the source, says where it comes from, and is there whole or not at all."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import clip_jax
from clip_jax import CheckpointError, ClipJaxError, ClipTextConfig
from clip_jax.convert import convert
from clip_jax.params.checkpoint import versions
from tests.checkpoints import TINY, digests, hf_state, write_pipeline, write_shards, write_text_encoder


@pytest.fixture(scope="module")
def converted(tiny_sd15, tmp_path_factory) -> Path:
    """The small pipeline, converted. Read only."""
    return convert(tiny_sd15, tmp_path_factory.mktemp("converted") / "sd15", family="sd15")


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- what is written


def test_the_converted_model_is_the_source_bit_for_bit(converted, encoder):
    loaded = clip_jax.load(converted)
    assert (loaded.family, loaded.config) == (encoder.family, encoder.config)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, encoder.params)
    np.testing.assert_array_equal(loaded("a cat").prompt_embeds, encoder("a cat").prompt_embeds)


def test_the_absolute_path_is_returned(tiny_sd15, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert(tiny_sd15, "deep/out", family="sd15") == tmp_path / "deep" / "out"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("source_dtype", "dtype"),
    [
        (np.float32, "bfloat16"),
        (np.float16, "float32"),
        (ml_dtypes.bfloat16, "float16"),
        (ml_dtypes.bfloat16, None),
    ],
)
def test_params_are_stored_in_the_dtype_asked_for_or_else_that_of_the_source(tmp_path, source_dtype, dtype):
    state = {name: array.astype(source_dtype) for name, array in hf_state(TINY).items()}
    source = write_text_encoder(tmp_path / "source", TINY.to_hf(), state)
    convert(source, tmp_path / "out", family="sd15", dtype=dtype)

    dtype = dtype or np.dtype(source_dtype).name
    info = clip_jax.info(tmp_path / "out")
    assert info.towers["clip_l"].dtypes == (dtype,)
    assert info.provenance["towers"]["clip_l"]["dtypes"] == [np.dtype(source_dtype).name]
    embedding = clip_jax.load(tmp_path / "out", dtype=dtype).params["clip_l"]["text_model"]["embeddings"]
    np.testing.assert_array_equal(
        np.asarray(embedding["position_embedding"]["embedding"]),
        state["text_model.embeddings.position_embedding.weight"].astype(dtype),
        strict=True,
    )


def test_an_unknown_dtype_is_refused(tiny_sd15, tmp_path):
    with pytest.raises(ClipJaxError, match="dtype must be one of float32, bfloat16, float16, found 'int8'"):
        convert(tiny_sd15, tmp_path / "out", family="sd15", dtype="int8")
    assert digests(tmp_path) == {}


def test_provenance(tiny_sd15, converted):
    stored = json.loads((converted / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert stored["provenance"] == {
        "source": "sd15",
        "format": "diffusers folder, safetensors",
        "towers": {
            "clip_l": {
                "files": ["model.safetensors"],
                "names": "transformers",
                "sha256": {"model.safetensors": sha256(tiny_sd15 / "text_encoder" / "model.safetensors")},
                "dtypes": ["float32"],
                "ignored": [],
            }
        },
        "written_by": versions(),
    }
    assert stored["family"] == "sd15"
    assert clip_jax.load(converted).provenance == stored["provenance"]


def test_provenance_of_shards_has_every_file(tmp_path):
    source = write_shards(tmp_path / "source", TINY.to_hf(), hf_state(TINY))
    tower = clip_jax.info(convert(source, tmp_path / "out", family="sd15")).provenance["towers"]["clip_l"]
    assert tower["files"] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert tower["sha256"] == {name: sha256(source / name) for name in tower["files"]}


def test_no_folder_of_this_machine_is_written(tiny_sd15, tmp_path, monkeypatch):
    shutil.copytree(tiny_sd15, tmp_path / "confidential" / "model")
    monkeypatch.chdir(tmp_path / "confidential")
    out = convert("./model", tmp_path / "out", family="sd15")
    assert clip_jax.info(out).provenance["source"] == "model"
    for file in filter(Path.is_file, out.rglob("*")):
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_tokenizers_are_copied(tmp_path):
    source = write_pipeline(tmp_path / "source", pad_token="!")
    out = convert(source, tmp_path / "out", family="sd15")
    shutil.rmtree(source)
    assert clip_jax.load_tokenizers(out)["clip_l"].pad_token == "!"
    ids = clip_jax.load(out).tokenize("a cat", guidance=False).cond["clip_l"]
    assert ids.tolist() == [[49406, 320, 2368, 49407, *[0] * 73]]


# --- what is there already


def test_a_checkpoint_is_only_replaced_with_overwrite(tiny_sd15, tmp_path):
    low = convert(tiny_sd15, tmp_path / "out", family="sd15", dtype="bfloat16")
    before = digests(tmp_path)
    with pytest.raises(CheckpointError, match=r"out exists already\. .*overwrite=True \(--overwrite\)"):
        convert(tiny_sd15, low, family="sd15")
    assert digests(tmp_path) == before
    convert(tiny_sd15, low, family="sd15", overwrite=True)
    assert clip_jax.info(low).towers["clip_l"].dtypes == ("float32",)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_source_within_what_is_to_be_replaced_is_kept(tiny_sd15, tmp_path):
    out = convert(tiny_sd15, tmp_path / "out", family="sd15")
    shutil.copytree(tiny_sd15, out / "source")
    before = digests(tmp_path)
    with pytest.raises(CheckpointError, match="did not write source, so it is not overwritten. Move what is not of it"):
        convert(out / "source", out, family="sd15", overwrite=True)
    assert digests(tmp_path) == before


def test_a_source_of_links_into_what_is_to_be_replaced_is_kept(tiny_sd15, tmp_path):
    out = convert(tiny_sd15, tmp_path / "out", family="sd15")
    source = shutil.copytree(tiny_sd15, tmp_path / "source")
    weights = source / "text_encoder" / "model.safetensors"
    weights.rename(out / "state" / "weights")
    weights.symlink_to(out / "state" / "weights")
    before = digests(tmp_path)
    with pytest.raises(CheckpointError, match="model.safetensors lies in .*out, which is to be replaced"):
        convert(source, out, family="sd15", overwrite=True)
    assert digests(tmp_path) == before


def test_a_source_that_changes_meanwhile_is_told(tiny_sd15, tmp_path, monkeypatch):
    source = shutil.copytree(tiny_sd15, tmp_path / "source")
    weights = source / "text_encoder" / "model.safetensors"

    def changed(files, progress):
        os.utime(weights, ns=(0, 0))
        return dict.fromkeys(files, "")

    with monkeypatch.context() as patched:
        patched.setattr(
            sys.modules["clip_jax.convert.convert"], "_hash", changed
        )  # the package has a function so called
        with pytest.raises(CheckpointError, match="model.safetensors changed while it was converted. Try again."):
            convert(source, tmp_path / "out", family="sd15")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert(source, tmp_path / "out", family="sd15")


def test_paths_that_go_up_are_read_and_written(tiny_sd15, tmp_path, monkeypatch):
    (tmp_path / "deep" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "below")
    monkeypatch.chdir(tmp_path)
    assert convert(tiny_sd15, "link/../out", family="sd15") == tmp_path / "deep" / "out"  # as the system has it
    assert clip_jax.load("link/../../deep/out").family.name == "sd15"


def test_an_error_keeps_the_checkpoint_that_was_to_be_replaced(tmp_path):
    state = hf_state(TINY)
    state["text_model.encoder.layers.2.mlp.fc2.bias"][0] = 1e6
    source = write_text_encoder(tmp_path / "source", TINY.to_hf(), state)
    out = convert(source, tmp_path / "out", family="sd15")
    before = digests(tmp_path)
    with pytest.raises(CheckpointError, match=r"2\.mlp\.fc2\.bias holds values up to 1e\+06"):
        convert(source, out, family="sd15", dtype="float16", overwrite=True)
    assert digests(tmp_path) == before


def test_what_is_no_checkpoint_is_never_replaced(tiny_sd15, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = digests(tmp_path)
    with pytest.raises(CheckpointError, match="out is not a checkpoint written by clip_jax"):
        convert(tiny_sd15, tmp_path / "out", family="sd15", overwrite=True)
    assert digests(tmp_path) == before


def test_a_swap_that_fails_puts_the_old_checkpoint_back(tiny_sd15, tmp_path, monkeypatch):
    out = convert(tiny_sd15, tmp_path / "out", family="sd15", dtype="float16")
    before = digests(tmp_path)
    rename = Path.rename

    def fail_last(self, target):
        if self.name == "new":
            raise OSError("stale file handle")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_last)
    with pytest.raises(CheckpointError, match="cannot be written: stale file handle"):
        convert(tiny_sd15, out, family="sd15", overwrite=True)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("lock", [True, False])
def test_what_a_process_left_that_died_is_removed(tiny_sd15, tmp_path, lock):
    (tmp_path / ".out.clip-jax-deadbeef" / "new.partial_save" / "state").mkdir(parents=True)
    if lock:
        (tmp_path / ".out.clip-jax-deadbeef" / "lock").write_text("")
    convert(tiny_sd15, tmp_path / "out", family="sd15")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- from the Hub


MINI = ClipTextConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, hidden_act="quick_gelu"
)


@pytest.fixture
def repo(hub, tmp_path):
    """A pipeline as a repository, with weights that nobody needs; the same in a folder "local"."""
    local = write_pipeline(tmp_path / "local", MINI, pad_token="!")
    files = {path.relative_to(local).as_posix(): path.read_bytes() for path in local.glob("**/*.*")}
    hub.repos["owner/name"] = {"main": files | {"unet/diffusion_pytorch_model.safetensors": b"x"}}
    return hub


def test_a_hub_repo_is_loaded(repo, tmp_path):
    there, here = (clip_jax.load(source, family="sd15") for source in ("owner/name", tmp_path / "local"))
    np.testing.assert_array_equal(there("a cat").prompt_embeds, here("a cat").prompt_embeds)
    assert there.tokenizers["clip_l"].pad_token == "!"
    assert repo.downloads() == [
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]


@pytest.mark.slow
def test_a_hub_repo_is_converted_and_named_with_its_commit(repo, tmp_path):
    out = convert("owner/name", tmp_path / "out", family="sd15")
    assert clip_jax.info(out).provenance["source"] == f"owner/name@{repo.commit('owner/name')}"
    here = clip_jax.load(tmp_path / "local", family="sd15")
    jax.tree.map(np.testing.assert_array_equal, clip_jax.load(out).params, here.params)


@pytest.mark.slow
def test_options_reach_the_hub(repo, tmp_path):
    repo.repos["owner/name"]["v1"] = repo.repos["owner/name"]["main"] | {"README.md": b"first"}
    convert("owner/name", tmp_path / "out", family="sd15", revision="v1")
    commit = repo.commit("owner/name", "v1")
    assert clip_jax.info(tmp_path / "out").provenance["source"] == f"owner/name@{commit}"
    repo.requests.clear()
    assert clip_jax.info("owner/name", family="sd15", revision=commit, local_files_only=True).provenance
    assert repo.requests == []
    with pytest.raises(CheckpointError, match="has no revision 'v2'. Check the branch"):
        clip_jax.load("owner/name", family="sd15", revision="v2")


@pytest.mark.parametrize("call", [clip_jax.load, clip_jax.info, clip_jax.load_tokenizers, convert])
def test_the_token_and_the_place_for_downloads_reach_the_hub(repo, call, tmp_path):
    out = [tmp_path / "out"] if call is convert else []
    call("owner/name", *out, family="sd15", token="hf_secret", cache_dir=tmp_path / "cache")
    sent = zip(repo.requests, repo.tokens, strict=True)  # those for the repo: one a process is for something else
    assert {token for request, token in sent if "owner/name" in request} == {"Bearer hf_secret"}
    assert any((tmp_path / "cache").rglob("config.json"))


@pytest.mark.parametrize("call", [clip_jax.load, clip_jax.info, clip_jax.load_tokenizers])
def test_without_network_one_error_says_all_that_was_tried(repo, call):
    repo.stop()
    message = "^'owner/name' is not a local path; as a Hub repo: owner/name: the Hub cannot be reached"
    with pytest.raises(CheckpointError, match=message):
        call("owner/name", family="sd15")


def test_without_network_nothing_is_left_by_convert(repo, tmp_path):
    repo.stop()
    (tmp_path / "place").mkdir()
    with pytest.raises(CheckpointError, match="not a local path; as a Hub repo: .*cannot be reached"):
        convert("owner/name", tmp_path / "place" / "out")
    assert digests(tmp_path / "place") == {}
