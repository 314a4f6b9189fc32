"""Downloads by the real client: what is asked for, what ends in the cache, and what a failure says."""

import json
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clip_jax.convert.hub import Access, fetch, needed_files
from clip_jax.convert.source import WEIGHTS
from clip_jax.errors import CheckpointError

MODEL_INDEX = json.dumps(
    {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
).encode()
SHARDS = (
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
)
WEIGHT_MAP = {f"tensor{i}": shard.split("/")[1] for i, shard in enumerate(SHARDS)}
INDEX = json.dumps({"metadata": {}, "weight_map": WEIGHT_MAP}).encode()

# By content: what fetch must take, and what it must leave.
NEEDED = {
    "model_index.json": MODEL_INDEX,
    "text_encoder/config.json": b"{1}",
    "text_encoder/model.safetensors": b"weights" * 9999,
    "text_encoder_2/config.json": b"{2}",
    "text_encoder_2/model.safetensors.index.json": INDEX,
    SHARDS[0]: b"first" * 999,
    SHARDS[1]: b"second" * 999,
    "tokenizer/merges.txt": b"a b",
    "tokenizer/special_tokens_map.json": b"{3}",
    "tokenizer/tokenizer_config.json": b"{4}",
    "tokenizer/vocab.json": b"{5}",
    "tokenizer_2/added_tokens.json": b"{6}",
    "tokenizer_2/spiece.model": b"pieces",
    "tokenizer_2/tokenizer.json": b"{7}",
}
LEFT = {
    ".gitattributes": b"x",
    "README.md": b"x",
    "sd_xl_base_1.0.safetensors": b"x",
    "config.json": b"x",
    "text_encoder/flax_model.msgpack": b"x",
    "text_encoder/model.fp16.safetensors": b"x",
    "text_encoder/model.onnx": b"x",
    "text_encoder/pytorch_model.bin": b"x",
    "text_encoder_2/model.fp16.safetensors": b"x",
    "text_encoder_2/model.fp16-00001-of-00002.safetensors": b"x",
    "text_encoder/old/config.json": b"x",
    "tokenizer/README.md": b"x",
    "unet/config.json": b"x",
    "unet/diffusion_pytorch_model.safetensors": b"x",
    "vae/diffusion_pytorch_model.safetensors": b"x",
    "my_text_encoder/config.json": b"x",
    "text_encoders/clip_g.safetensors": b"x",  # as in the repos of SD 3.5, for other programs
    "text_encoders/t5xxl_fp16.safetensors": b"x",
    "text_encoder_onnx/model.onnx": b"x",
    "tokenizers/vocab.json": b"x",
}
REPO = "owner/pipe"


@pytest.fixture
def pipe(hub):
    """The hub, with a pipeline on it."""
    hub.repos[REPO] = {"main": NEEDED | LEFT}
    return hub


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_takes_what_is_needed_and_nothing_else(pipe):
    folder = fetch(REPO)

    assert content(folder) == NEEDED
    assert folder.name == pipe.commit(REPO)
    assert pipe.downloads() == sorted(NEEDED)


def test_what_is_in_the_cache_is_not_downloaded_again(pipe):
    folder = fetch(REPO)
    pipe.requests.clear()

    assert fetch(REPO) == folder
    assert pipe.requests
    assert pipe.downloads() == []


def test_a_repo_that_is_no_pipeline(hub):
    needed = {"config.json": b"{}", "model.safetensors": b"w", "vocab.json": b"{}", "merges.txt": b""}
    left = {
        "open_clip_model.safetensors": b"x",
        "pytorch_model.bin": b"x",
        "text_encoder/model.safetensors": b"x",
    }
    hub.repos["openai/clip"] = {"main": needed | left}

    folder = fetch("openai/clip")

    assert content(folder) == needed
    hub.stop()
    assert fetch("openai/clip") == folder


def test_one_folder_of_a_pipeline(pipe):
    """As `from_pretrained(repo, subfolder="text_encoder_2")` wants it: neither the pipeline's index nor tokenizers."""
    wanted = Access(folder="text_encoder_2")
    folder = fetch(REPO, wanted)

    expected = {name: file for name, file in NEEDED.items() if name.startswith("text_encoder_2/")}
    assert content(folder) == expected
    assert pipe.downloads() == sorted(expected)
    pipe.stop()
    assert fetch(REPO, wanted) == folder
    assert fetch(REPO, Access(folder="text_encoder_2", local_files_only=True)) == folder
    with pytest.raises(CheckpointError, match="is not whole in the cache"):
        fetch(REPO, Access(folder="text_encoder", local_files_only=True))


def test_a_folder_that_is_not_there(pipe):
    with pytest.raises(CheckpointError, match="expected a folder text_encoder_9, found .*text_encoder, text_encoder/"):
        fetch(REPO, Access(folder="text_encoder_9"))
    with pytest.raises(CheckpointError, match=r"owner/pipe/unet: expected model.safetensors .*diffusion_pytorch_model"):
        fetch(REPO, Access(folder="unet"))


def test_the_token_and_the_place_for_downloads_are_passed_on(pipe, tmp_path):
    folder = fetch(REPO, Access(folder="text_encoder", token="hf_secret", cache_dir=tmp_path / "elsewhere"))

    assert folder.is_relative_to(tmp_path / "elsewhere")
    assert set(pipe.tokens) == {"Bearer hf_secret"}
    pipe.tokens.clear()
    fetch(REPO, Access(folder="text_encoder", token=False))
    assert set(pipe.tokens) == {None}


def test_of_several_weights_the_best_is_taken():
    folder = {f"text_encoder/{name}" for name in WEIGHTS}
    for name in WEIGHTS:
        weights = [path for path in needed_files(REPO, {"model_index.json"} | folder) if path in folder]
        assert weights == [f"text_encoder/{name}"]
        folder.remove(f"text_encoder/{name}")


def test_without_the_hub_the_cache_is_used(pipe, caplog):
    folder = fetch(REPO)
    pipe.stop()

    assert fetch(REPO, Access(local_files_only=True)) == folder
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "clip_jax"):
        assert fetch(REPO) == folder
    assert "owner/pipe: the Hub cannot be reached" in caplog.text
    assert "Using the copy in the cache" in caplog.text


def test_local_files_only_asks_nothing(pipe):
    fetch(REPO)
    pipe.requests.clear()

    fetch(REPO, Access(local_files_only=True))

    assert pipe.requests == []


def test_offline_mode_uses_the_cache(pipe, monkeypatch):
    folder = fetch(REPO)
    pipe.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    assert fetch(REPO) == folder
    assert pipe.requests == []


def test_offline_mode_without_a_copy(pipe, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(CheckpointError, match=r"owner/pipe: .* offline mode is on. Unset HF_HUB_OFFLINE"):
        fetch(REPO)


def test_local_files_only_without_a_copy(pipe):
    with pytest.raises(CheckpointError, match=r"owner/pipe: is not in the cache. Fetch it once without"):
        fetch(REPO, Access(local_files_only=True))


def test_a_revision_is_pinned(pipe):
    old = NEEDED | {"tokenizer/vocab.json": b"old", "text_encoder/model.fp16.safetensors": b"half"}
    del old["text_encoder/model.safetensors"]
    pipe.repos[REPO]["v1"] = old
    for revision in ("v1", pipe.commit(REPO, "v1")):
        folder = fetch(REPO, Access(revision=revision))
        assert content(folder) == old
        assert folder.name == pipe.commit(REPO, "v1")
    new = fetch(REPO)
    pipe.stop()

    assert fetch(REPO, Access(revision="v1")) == folder
    assert fetch(REPO) == new != folder


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        (
            "owner/typo",
            "owner/typo: not found on the Hub. Check the spelling; if it is private, run `hf auth login`",
        ),
        ("a/b/c", "'a/b/c' is no repository id: expected owner/name"),
        ("owner/--x", "'owner/--x' is no repository id"),
    ],
)
def test_wrong_repo_ids(pipe, repo_id, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch(repo_id)
    assert caught.value.__cause__ is not None


def test_no_such_revision(pipe):
    fetch(REPO)  # a copy of another revision is no help

    with pytest.raises(CheckpointError, match=r"owner/pipe: has no revision 'v9'. Check the branch"):
        fetch(REPO, Access(revision="v9"))


def test_a_gated_repo(pipe):
    pipe.gated.add(REPO)

    with pytest.raises(CheckpointError, match=r"owner/pipe: is gated. Accept its terms .* `hf auth login`"):
        fetch(REPO)


def test_the_hub_is_down(pipe):
    pipe.stop()
    start = time.monotonic()

    with pytest.raises(CheckpointError, match=r"owner/pipe: the Hub cannot be reached. .*\(ConnectError: "):
        fetch(REPO)
    assert time.monotonic() - start < 5


def test_the_hub_does_not_answer(hub, monkeypatch):
    monkeypatch.setattr("clip_jax.convert.hub._TIMEOUT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")

        with pytest.raises(CheckpointError, match=r"owner/pipe: the Hub cannot be reached. .*\(ReadTimeout: "):
            fetch(REPO)


def test_the_hub_is_broken(pipe):
    pipe.status = 503

    with pytest.raises(CheckpointError, match=r"owner/pipe: the Hub answered with HTTP status 503. Try again"):
        fetch(REPO)


def test_what_answers_is_not_the_hub(pipe):
    pipe.status = 200

    with pytest.raises(CheckpointError, match=r"owner/pipe: the download failed. .*\(JSONDecodeError: "):
        fetch(REPO)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"model_index.json", "unet/config.json"},
            "owner/x: expected a folder text_encoder, found a pipeline",
        ),
        ({"model_index.json", "tokenizer/vocab.json"}, "owner/x: expected a folder text_encoder"),
        (
            {"model_index.json", "text_encoder/tf_model.h5"},
            "owner/x/text_encoder: .* found tf_model.h5. Name the file itself",
        ),
        ({"README.md"}, "owner/x: expected model.safetensors .* found no weights at all"),
        ({"clip_l.safetensors", "config.json"}, "owner/x: .* found clip_l.safetensors. Name the file itself"),
    ],
)
def test_repos_without_a_text_encoder_to_read(hub, files, message):
    hub.repos["owner/x"] = {"main": dict.fromkeys(files, b"{}")}

    with pytest.raises(CheckpointError, match=message):
        fetch("owner/x")
    assert hub.downloads() == []


def test_shards_that_the_repo_lacks(pipe):
    del pipe.repos[REPO]["main"][SHARDS[1]]

    with pytest.raises(CheckpointError, match=f"owner/pipe: expected 2 shards, .* 1 are missing: {SHARDS[1]}"):
        fetch(REPO)


def test_an_index_that_leads_elsewhere(pipe):
    index = {"weight_map": {"a": "../unet/diffusion_pytorch_model.safetensors"}}
    pipe.repos[REPO]["main"]["text_encoder_2/model.safetensors.index.json"] = json.dumps(index).encode()

    with pytest.raises(CheckpointError, match=r"expected plain names of weight files"):
        fetch(REPO)
    assert not [path for path in pipe.downloads() if path.startswith("unet")]


def test_an_interrupted_download_is_resumed(pipe, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    pipe.cuts["text_encoder/model.safetensors"] = 1

    assert content(fetch(REPO)) == NEEDED
    assert pipe.downloads().count("text_encoder/model.safetensors") == 2


@pytest.mark.parametrize("path", ["text_encoder/model.safetensors", SHARDS[1], "tokenizer/special_tokens_map.json"])
def test_a_download_that_breaks_off_leaves_nothing_wrong(pipe, monkeypatch, path):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    pipe.cuts[path] = 99

    with pytest.raises(CheckpointError, match=r"owner/pipe: the Hub cannot be reached. .*RemoteProtocolError"):
        fetch(REPO)
    with pytest.raises(CheckpointError, match="owner/pipe"):
        fetch(REPO, Access(local_files_only=True))
    pipe.cuts.clear()
    assert content(fetch(REPO)) == NEEDED


def remove(folder: Path, name: str) -> None:
    for path in [folder / name, *(folder / name).glob("*")]:
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("model_index.json", r"not whole in the cache\. .* missing \(model_index.json\)"),
        ("text_encoder/config.json", r"not whole in the cache\. .* missing \(text_encoder/config.json\)"),
        ("text_encoder/model.safetensors", r"owner/pipe/text_encoder: .* found no weights at all"),
        (
            "text_encoder_2",
            r"expected text_encoder_2 in the cache, found an incomplete download\. Fetch it again",
        ),
        (SHARDS[0], f"expected 2 shards, found that 1 are missing: {SHARDS[0]}. Fetch it again"),
        ("tokenizer_2", r"expected tokenizer_2 in the cache, found an incomplete download\. Fetch it again"),
        (
            "tokenizer/special_tokens_map.json",
            r"not whole in the cache\. .*tokenizer/special_tokens_map.json",
        ),
    ],
)
def test_a_copy_that_is_not_whole(pipe, gone, message):
    remove(fetch(REPO), gone)

    with pytest.raises(CheckpointError, match=message):
        fetch(REPO, Access(local_files_only=True))
    assert content(fetch(REPO)) == NEEDED
    remove(fetch(REPO), gone)
    pipe.stop()
    with pytest.raises(CheckpointError, match="owner/pipe: the Hub cannot be reached"):
        fetch(REPO)


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [(True, False, True), (None, False, False), (None, True, True), (False, True, False)],
)
def test_progress_bars(pipe, capsys, monkeypatch, progress, terminal, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)

    fetch(REPO, progress=progress)

    assert ("Fetching" in capsys.readouterr().err) == shown


def test_the_client_as_users_configure_it(pipe, tmp_path):
    """By environment variables, in a process of its own."""
    script = f"from clip_jax.convert.hub import fetch; print(fetch({REPO!r}))"
    environment = os.environ | {"HF_ENDPOINT": pipe.endpoint, "HF_HOME": str(tmp_path / "home")}

    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home")
    assert content(folder) == NEEDED
    assert done.stderr == ""
