"""ClipTokenizer against transformers 5's CLIPTokenizer."""

import functools
import json
import random
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers
from transformers import AutoTokenizer, CLIPTokenizer

from clip_jax.tokenizers import ClipTokenizer
from clip_jax.tokenizers.pipeline import packaged_vocabulary

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
PADS = [EOS, "!"]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokens.json").read_text(encoding="ascii"))
PIECES = [case["text"] for case in GOLDEN["cases"] if len(case["text"]) < 40]


def token(content, **flags):
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


def write_folder(folder, **files):
    """Writes vocab.json and merges.txt of the packaged vocabulary, and further JSON files by stem."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = vocab_and_merges()
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    for stem, value in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("reference"))
    return {pad: CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77) for pad in PADS}


@pytest.fixture(scope="module")
def ours():
    return {pad: ClipTokenizer.packaged(pad) for pad in PADS}


def reference_ids(reference, prompts, length=77):
    encoded = reference(prompts, padding="max_length", max_length=length, truncation=True)
    return np.asarray(encoded.input_ids, dtype=np.int32)


def our_ids(tokenizer, prompts, length=77):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return tokenizer.encode(prompts, max_length=length, overflow="truncate")


def generated_prompts():
    """3,000 prompts: pieces of the golden texts, and random characters of all planes."""
    rng = random.Random(1)
    prompts = []
    for _ in range(1500):
        pieces = rng.choices(PIECES, k=rng.randint(1, 8))
        prompts.append("".join(piece + rng.choice(["", " ", "!", "\n"]) for piece in pieces))
    for _ in range(1500):
        top = rng.choice([0x80, 0x250, 0x3000, 0xD800, 0x20000, 0x110000])
        characters = (chr(rng.randrange(top)) for _ in range(rng.randint(1, 30)))
        prompts.append("".join(c for c in characters if unicodedata.category(c) != "Cs"))
    return prompts


@pytest.mark.parametrize("pad", PADS)
def test_generated_prompts(references, ours, pad):
    prompts = generated_prompts()
    np.testing.assert_array_equal(our_ids(ours[pad], prompts), reference_ids(references[pad], prompts))


@pytest.mark.parametrize("pad", PADS)
@settings(max_examples=400, deadline=None, derandomize=True)
@given(parts=st.lists(st.text() | st.sampled_from(PIECES), max_size=6), length=st.integers(2, 90))
def test_any_prompt(references, ours, pad, parts, length):
    prompts = ["".join(parts)]
    np.testing.assert_array_equal(our_ids(ours[pad], prompts, length), reference_ids(references[pad], prompts, length))


@pytest.mark.parametrize("pad", PADS)
def test_very_long_prompts(references, ours, pad):
    prompts = [text * (50_000 // len(text)) for text in ("a", "a Cat! ", "１", "!", " ", "<|endoftext|>", "猫")]
    np.testing.assert_array_equal(our_ids(ours[pad], prompts), reference_ids(references[pad], prompts))
    for prompt in prompts:
        assert list(ours[pad].inspect(prompt).ids) == references[pad](prompt, truncation=False).input_ids


def test_the_comparison_catches_a_wrong_normaliser(references):
    """Without lower-casing the generated prompts must not agree."""
    wrong = ClipTokenizer.packaged()
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")]
    wrong._pipeline.normalizer = normalizers.Sequence(steps)
    prompts = generated_prompts()
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        np.testing.assert_array_equal(our_ids(wrong, prompts), reference_ids(references[EOS], prompts))


def test_the_golden_ids_are_those_of_transformers(references):
    assert GOLDEN["versions"]["transformers"].split(".")[0] == transformers.__version__.split(".")[0]
    for case in GOLDEN["cases"]:
        assert case["ids"] == references[EOS](case["text"], max_length=77, truncation=True).input_ids
        pad_0 = references["!"](case["text"], max_length=77, truncation=True).input_ids
        assert case.get("ids_pad_0", case["ids"]) == pad_0


# Folders

SPECIAL_4X = {"bos_token": token(BOS), "eos_token": token(EOS), "unk_token": token(EOS), "pad_token": EOS}
CONFIG_4X = {
    "add_prefix_space": False,
    "bos_token": token(BOS, __type="AddedToken"),
    "eos_token": token(EOS, __type="AddedToken"),
    "unk_token": token(EOS, __type="AddedToken"),
    "pad_token": EOS,
    "model_max_length": 77,
    "tokenizer_class": "CLIPTokenizer",
}
ADDED = {"<Cat-Toy>": 49408, "<two>": 49409}
DECODER = {"49406": token(BOS, special=True), "49407": token(EOS, special=True), "49408": token("<Cat-Toy>")}
FOLDERS = {
    "bare": {},
    "sd15": {"tokenizer_config": CONFIG_4X, "special_tokens_map": SPECIAL_4X},
    "sd21": {"tokenizer_config": CONFIG_4X, "special_tokens_map": {**SPECIAL_4X, "pad_token": "!"}},
    "config only": {"tokenizer_config": {**CONFIG_4X, "pad_token": "!"}},
    "map only": {"special_tokens_map": {**SPECIAL_4X, "unk_token": EOS}},
    "map with plain eos": {"special_tokens_map": {**SPECIAL_4X, "eos_token": EOS}},
    "map with bare objects": {"special_tokens_map": {"eos_token": {"content": EOS}, "pad_token": {"content": "!"}}},
    "map with pad object": {"special_tokens_map": {**SPECIAL_4X, "pad_token": token("!", lstrip=True)}},
    "decoder": {"tokenizer_config": {"pad_token": EOS, "added_tokens_decoder": DECODER}},
    "decoder and map": {
        "tokenizer_config": {**CONFIG_4X, "added_tokens_decoder": DECODER},
        "special_tokens_map": {"pad_token": "!"},
        "added_tokens": {"<not read>": 49408},
    },
    "added tokens": {"added_tokens": ADDED, "special_tokens_map": SPECIAL_4X},
    "added specials": {"added_tokens": {BOS: 49406, EOS: 49407, **ADDED}},
    "added extra special": {
        "added_tokens": ADDED,
        "tokenizer_config": {"additional_special_tokens": ["<Cat-Toy>"]},
    },
    "added extra special of the map": {
        "added_tokens": ADDED,
        "special_tokens_map": {**SPECIAL_4X, "additional_special_tokens": ["<Cat-Toy>"]},
    },
    "extra special of both": {
        "tokenizer_config": {"additional_special_tokens": []},
        "special_tokens_map": {**SPECIAL_4X, "additional_special_tokens": ["<Cat-Toy>"]},
    },
    "extra special": {"special_tokens_map": {**SPECIAL_4X, "additional_special_tokens": ["<Cat-Toy>", "<x>"]}},
}
FOLDER_TEXTS = [
    *(
        "a<|endoftext|>b",
        "a<|ENDOFTEXT|>b <|StartOfText|>!",
        "wow !! ! a cat!",
        "A <Cat-Toy> <cat-toy><two>, <x>",
    ),
    *("", "<not read> a photo of a cat", "! <|endoftext|> !"),
]


def assert_same_tokenizer(tokenizer, reference):
    # Before any call: transformers stores padding and truncation in its pipeline when it is called.
    assert json.loads(tokenizer._pipeline.to_str()) == json.loads(reference.backend_tokenizer.to_str())
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (reference.pad_token, reference.pad_token_id)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        reference.bos_token_id,
        reference.eos_token_id,
    )
    np.testing.assert_array_equal(our_ids(tokenizer, FOLDER_TEXTS), reference_ids(reference, FOLDER_TEXTS))


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_vocab_and_merges(tmp_path, name):
    folder = write_folder(tmp_path, **FOLDERS[name])
    assert_same_tokenizer(ClipTokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("name", ["bare", "sd15", "sd21", "decoder", "added tokens", "extra special"])
def test_folders_that_transformers_5_saved(tmp_path, name):
    reference = CLIPTokenizer.from_pretrained(write_folder(tmp_path / "old", **FOLDERS[name]))
    reference.save_pretrained(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    tokenizer = ClipTokenizer.from_folder(tmp_path / "new")
    assert_same_tokenizer(tokenizer, CLIPTokenizer.from_pretrained(tmp_path / "new"))


def test_tokenizer_json_beside_other_files(tmp_path):
    """tokenizer.json gives vocabulary, merges and added tokens, not the normaliser and not the pad token."""
    write_folder(tmp_path, **FOLDERS["sd21"])
    ClipTokenizer.packaged().save(tmp_path / "saved")
    whole = json.loads((tmp_path / "saved" / "tokenizer.json").read_text(encoding="utf-8"))
    whole["normalizer"] = None
    whole["model"]["merges"] = whole["model"]["merges"][:100]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    tokenizer = ClipTokenizer.from_folder(tmp_path)
    assert tokenizer.pad_token == "!"
    assert_same_tokenizer(tokenizer, CLIPTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("loader", [CLIPTokenizer, AutoTokenizer])
@pytest.mark.parametrize("name", ["bare", "sd21", "added tokens"])
def test_transformers_reads_what_we_save(tmp_path, loader, name):
    tokenizer = ClipTokenizer.from_folder(write_folder(tmp_path / "old", **FOLDERS[name]))
    tokenizer.save(tmp_path / "new")
    reference = loader.from_pretrained(tmp_path / "new")
    assert isinstance(reference, CLIPTokenizer)
    assert reference.model_max_length == 77
    assert_same_tokenizer(tokenizer, reference)
