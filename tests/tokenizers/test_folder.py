import functools
import json
import re

import pytest

from clip_jax.errors import CheckpointError
from clip_jax.tokenizers import ClipTokenizer
from clip_jax.tokenizers.pipeline import packaged_vocabulary

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TEXT = "a<|ENDOFTEXT|>! <Cat-Toy> <cat-toy>"


def token(content, **flags):
    """A token with flags, as transformers 4 writes it to special_tokens_map.json."""
    return {
        "content": content,
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
        **flags,
    }


@functools.cache
def vocab_and_merges():
    vocab, merges = packaged_vocabulary()
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    return json.dumps(vocab), "\n".join(lines)


def write(folder, **files):
    """Writes a tokenizer folder of the packaged vocabulary; `files` adds or replaces JSON files by stem."""
    vocab, merges = vocab_and_merges()
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    for stem, value in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def ids(tokenizer, text=TEXT):
    return list(tokenizer.inspect(text).ids)


# What is read


def test_vocab_and_merges_alone_make_the_packaged_tokenizer(tmp_path):
    tokenizer = ClipTokenizer.from_folder(write(tmp_path))
    assert (tokenizer.pad_token, tokenizer.model_max_length) == (EOS, 77)
    assert ids(tokenizer) == ids(ClipTokenizer.packaged())


def test_the_special_tokens_map_wins_over_the_config(tmp_path):
    """Stable Diffusion 2.1: the two files disagree on the pad token."""
    config = {"pad_token": EOS, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    special = {"bos_token": token(BOS), "eos_token": token(EOS), "unk_token": token(EOS), "pad_token": "!"}
    folder = write(tmp_path, tokenizer_config=config, special_tokens_map=special)
    tokenizer = ClipTokenizer.from_folder(folder)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("!", 0)


@pytest.mark.parametrize("pad", ["!", token("!"), {"content": "!"}])
def test_a_pad_token_is_text_or_an_object(tmp_path, pad):
    tokenizer = ClipTokenizer.from_folder(write(tmp_path, special_tokens_map={"pad_token": pad}))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("!", 0)


def test_an_added_tokens_decoder_wins_over_the_special_tokens_map(tmp_path):
    """Transformers 5 does not open special_tokens_map.json then."""
    config = {"pad_token": EOS, "added_tokens_decoder": {"49407": token(EOS, special=True)}}
    folder = write(tmp_path, tokenizer_config=config, special_tokens_map={"pad_token": "!"})
    assert ClipTokenizer.from_folder(folder).pad_token == EOS


def test_flags_of_special_tokens_count(tmp_path):
    """A `normalized` special token matches the lower-cased text."""
    special = {"eos_token": token(EOS), "pad_token": "!"}
    tokenizer = ClipTokenizer.from_folder(write(tmp_path, special_tokens_map=special))
    assert ids(tokenizer, "a<|ENDOFTEXT|>") != [49406, 320, 49407, 49407]  # unk_token, plain text, comes last

    special["unk_token"] = token(EOS)
    tokenizer = ClipTokenizer.from_folder(write(tmp_path, special_tokens_map=special))
    assert ids(tokenizer, "a<|ENDOFTEXT|>") == [49406, 320, 49407, 49407]


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<Cat-Toy>": 49408, "<two>": 49409}},
        {"tokenizer_config": {"added_tokens_decoder": {"49409": token("<two>"), "49408": token("<Cat-Toy>")}}},
    ],
)
def test_added_tokens_follow_the_vocabulary(tmp_path, files):
    tokenizer = ClipTokenizer.from_folder(write(tmp_path, **files))
    assert ids(tokenizer, "a <Cat-Toy> <cat-toy> <two>") == [49406, 320, 49408, 49408, 49409, 49407]
    assert tokenizer.vocab_size == 49_410


@pytest.mark.parametrize("files", [{}, {"added_tokens": {"<Cat-Toy>": 49408}}])
def test_an_extra_special_token_matches_as_written(tmp_path, files):
    config = {"additional_special_tokens": ["<Cat-Toy>"]}
    tokenizer = ClipTokenizer.from_folder(write(tmp_path, tokenizer_config=config, **files))
    assert ids(tokenizer, "<Cat-Toy>") == [49406, 49408, 49407]
    assert 49408 not in ids(tokenizer, "<cat-toy>")


def test_extra_special_tokens_of_the_map_alone(tmp_path):
    """As transformers reads them: an added token is then not special, and those of the config go before."""
    special = {"additional_special_tokens": ["<Cat-Toy>"]}
    write(tmp_path, special_tokens_map=special, added_tokens={"<Cat-Toy>": 49408})
    assert ids(ClipTokenizer.from_folder(tmp_path), "<cat-toy>") == [49406, 49408, 49407]
    write(tmp_path, special_tokens_map=special, added_tokens={}, tokenizer_config={"additional_special_tokens": []})
    assert ClipTokenizer.from_folder(tmp_path).vocab_size == 49_408


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, 77),
        ({"model_max_length": None}, 77),
        ({"model_max_length": int(1e30)}, 77),
        ({"model_max_length": 1e30}, 77),
        ({"model_max_length": 248}, 248),
        ({"max_len": 64}, 64),
    ],
)
def test_model_max_length(tmp_path, config, length):
    tokenizer = ClipTokenizer.from_folder(write(tmp_path, tokenizer_config=config))
    assert tokenizer.model_max_length == length
    assert tokenizer.encode(["a"]).shape == (1, length)


@pytest.mark.parametrize("name", ["padding_side", "truncation_side"])
def test_rows_that_are_filled_or_cut_on_the_left_are_refused(tmp_path, name):
    ClipTokenizer.from_folder(write(tmp_path, tokenizer_config={name: "right"}))
    write(tmp_path, tokenizer_config={name: "left"})
    with pytest.raises(CheckpointError, match=f"{name} is 'left', expected 'right'"):
        ClipTokenizer.from_folder(tmp_path)


def test_tokenizer_json_wins_over_vocab_and_merges(tmp_path):
    ClipTokenizer.packaged("!").save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("this is not read", encoding="utf-8")
    tokenizer = ClipTokenizer.from_folder(tmp_path)
    assert tokenizer.pad_token == EOS  # tokenizer.json names none
    assert ids(tokenizer) == ids(ClipTokenizer.packaged("!"))  # but it lists "!" as special


def test_an_early_tokenizer_json_is_read(tmp_path):
    """Merges as text, and a model without its type."""
    ClipTokenizer.packaged().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    del whole["model"]["type"]
    whole["model"]["merges"] = [" ".join(merge) for merge in whole["model"]["merges"]]
    path.write_text(json.dumps(whole), encoding="utf-8")
    assert ids(ClipTokenizer.from_folder(tmp_path)) == ids(ClipTokenizer.packaged())


# Saving


@pytest.mark.parametrize("pad", [EOS, "!"])
def test_save_and_read_back(tmp_path, pad):
    folder = tmp_path / "deep" / "tokenizer"
    tokenizer = ClipTokenizer.packaged(pad, model_max_length=64)
    tokenizer.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    again = ClipTokenizer.from_folder(folder)
    assert (again.pad_token, again.pad_token_id, again.model_max_length) == (pad, tokenizer.pad_token_id, 64)
    assert ids(again) == ids(tokenizer)


def test_save_over_a_folder_with_another_pad_token(tmp_path):
    write(tmp_path, special_tokens_map={"pad_token": "!"}, added_tokens={"<Cat-Toy>": 49408})
    ClipTokenizer.packaged().save(tmp_path)
    tokenizer = ClipTokenizer.from_folder(tmp_path)
    assert tokenizer.pad_token == EOS
    assert ids(tokenizer) == ids(ClipTokenizer.packaged())


def test_added_tokens_and_their_flags_survive_a_save(tmp_path):
    special = {"eos_token": token(EOS), "unk_token": token(EOS), "pad_token": "!"}
    first = ClipTokenizer.from_folder(write(tmp_path, special_tokens_map=special, added_tokens={"<Cat-Toy>": 49408}))
    first.save(tmp_path / "again")
    assert ids(ClipTokenizer.from_folder(tmp_path / "again")) == ids(first)


# Errors


def test_no_tokenizer_files(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").touch()
    message = (
        r"vocab\.json and merges\.txt missing, and no tokenizer\.json\. Expected .* of a CLIP tokenizer; "
        r"found: config\.json, model\.safetensors\. Pass the folder of a CLIP tokenizer"
    )
    with pytest.raises(CheckpointError, match=message):
        ClipTokenizer.from_folder(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="found: no such folder"):
        ClipTokenizer.from_folder(tmp_path / "tokenizer")


def test_no_merges(tmp_path):
    (write(tmp_path) / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r": merges\.txt missing, and no tokenizer\.json\."):
        ClipTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("stem", ["vocab", "tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens"])
def test_invalid_json_names_its_file(tmp_path, stem):
    (write(tmp_path) / f"{stem}.json").write_text('{"a": ', encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{stem}\.json is not valid JSON \(Expecting value: line 1"):
        ClipTokenizer.from_folder(tmp_path)


def test_json_that_is_no_object(tmp_path):
    with pytest.raises(CheckpointError, match=r"vocab\.json: expected a JSON object, found a list"):
        ClipTokenizer.from_folder(write(tmp_path, vocab=[1, 2]))


def test_text_that_is_not_utf8(tmp_path):
    (write(tmp_path) / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"merges\.txt: expected UTF-8 text, found"):
        ClipTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_a_git_lfs_pointer_is_recognised(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1059962\n"
    (write(tmp_path) / name).write_text(pointer, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer, not the file itself: run `git lfs"):
        ClipTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["pad_token", "bos_token", "eos_token", "unk_token"])
def test_a_special_token_outside_the_vocabulary_is_named(tmp_path, name):
    """Transformers 5 would give it a new id, beyond the text encoder's embedding."""
    folder = write(tmp_path, special_tokens_map={name: "[PAD]"})
    with pytest.raises(CheckpointError, match=rf"The {name} '\[PAD\]' is not in the vocabulary .*49408 tokens"):
        ClipTokenizer.from_folder(folder)


def test_a_pad_token_may_be_an_added_token(tmp_path):
    folder = write(tmp_path, special_tokens_map={"pad_token": "[PAD]"}, added_tokens={"[PAD]": 49408})
    assert ClipTokenizer.from_folder(folder).pad_token_id == 49408


@pytest.mark.parametrize("files", [("tokenizer_config",), ("special_tokens_map",)])
def test_a_null_pad_token_is_an_error(tmp_path, files):
    folder = write(tmp_path, **{stem: {"pad_token": None} for stem in files})
    with pytest.raises(CheckpointError, match=r"sets pad_token to null\. Expected a token of the vocabulary"):
        ClipTokenizer.from_folder(folder)


@pytest.mark.parametrize("pad", [3, {"lstrip": False}])
def test_a_token_of_another_kind(tmp_path, pad):
    folder = write(tmp_path, special_tokens_map={"pad_token": pad})
    with pytest.raises(CheckpointError, match="expected a token as text or as an object with 'content', found"):
        ClipTokenizer.from_folder(folder)


def test_an_added_token_with_a_gap(tmp_path):
    """Transformers 5 would silently renumber it."""
    folder = write(tmp_path, added_tokens={"<Cat-Toy>": 49409})
    message = r"'<Cat-Toy>' of .* is declared as id 49409, but would become id 49408\. Expected added ids to follow"
    with pytest.raises(CheckpointError, match=message):
        ClipTokenizer.from_folder(folder)


@pytest.mark.parametrize("length", [1, "77", 77.5])
def test_a_model_max_length_of_another_kind(tmp_path, length):
    folder = write(tmp_path, tokenizer_config={"model_max_length": length})
    with pytest.raises(CheckpointError, match="model_max_length must be a whole number of 2 or more, found"):
        ClipTokenizer.from_folder(folder)


def test_a_t5_folder(tmp_path):
    (tmp_path / "spiece.model").touch()
    with pytest.raises(CheckpointError, match=r"holds spiece\.model, a SentencePiece tokenizer \(T5's\)"):
        ClipTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ({"type": "Unigram", "vocab": [["<pad>", 0.0]]}, "type 'Unigram' with end_of_word_suffix None"),
        (
            {"type": "BPE", "vocab": {"a": 0}, "merges": [], "end_of_word_suffix": ""},
            "type 'BPE' with end_of_word_suffix ''",
        ),
    ],
)
def test_a_tokenizer_json_of_another_model(tmp_path, model, found):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"is no CLIP tokenizer: found a model of {found}, expected 'BPE'"):
        ClipTokenizer.from_folder(tmp_path)


def test_a_vocabulary_without_word_ends(tmp_path):
    folder = write(tmp_path, vocab={"a": 0, "b": 1, "ab": 2})
    with pytest.raises(CheckpointError, match="has no token that ends in '</w>': it is no CLIP vocabulary"):
        ClipTokenizer.from_folder(folder)


def test_merges_of_another_vocabulary(tmp_path):
    (write(tmp_path) / "merges.txt").write_text("#version: 0.2\n☃ ☃\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"vocabulary and the merges of .* do not belong together: .*☃"):
        ClipTokenizer.from_folder(tmp_path)


def tokenizer_json(**model):
    vocab, _ = packaged_vocabulary()
    return {"model": {"type": "BPE", "vocab": vocab, "merges": [], "end_of_word_suffix": "</w>", **model}}


DAMAGED = {
    "a list of declared tokens": {"tokenizer_config": {"added_tokens_decoder": [1]}},
    "an id that is no number": {"tokenizer_config": {"added_tokens_decoder": {"x": token("<toy>")}}},
    "a flag that is none": {"tokenizer_config": {"added_tokens_decoder": {"49408": token("<toy>") | {"lstrip": "x"}}}},
    "a number of further tokens": {"tokenizer_config": {"extra_special_tokens": 5}},
    "an added token without an id": {"tokenizer": {**tokenizer_json(), "added_tokens": [{"content": "<toy>"}]}},
    "an added token that is text": {"tokenizer": {**tokenizer_json(), "added_tokens": ["<toy>"]}},
    "an added token of nothing": {"added_tokens": {"": 49408}},
    "a model that is a list": {"tokenizer": {"model": [1]}},
    "no vocabulary": {"tokenizer": tokenizer_json(vocab=None)},
    "a vocabulary that is a list": {"tokenizer": tokenizer_json(vocab=["a</w>"])},
    "ids that are text": {"tokenizer": tokenizer_json(vocab={"a</w>": "7"})},
    "an id beyond int32": {"tokenizer": tokenizer_json(vocab={**packaged_vocabulary()[0], "cat</w>": 2**31})},
    "no merges": {"tokenizer": tokenizer_json(merges=None)},
    "merges of numbers": {"tokenizer": tokenizer_json(merges=[5])},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_a_checkpoint_error(tmp_path, name):
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        ClipTokenizer.from_folder(write(tmp_path, **DAMAGED[name]))


def test_merges_of_another_form(tmp_path):
    (write(tmp_path) / "merges.txt").write_text("#version: 0.2\na b c\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"merges\.txt: each merge must have two symbols"):
        ClipTokenizer.from_folder(tmp_path)
