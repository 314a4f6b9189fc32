"""T5Tokenizer, on a vocabulary written by hand; its parity with transformers is in tests/parity."""

import base64
import json
import re
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from tokenizers import normalizers

from clip_jax.errors import CheckpointError, ClipJaxError, PromptTooLongError
from clip_jax.tokenizers import ClipTokenizer, T5Tokenizer, TokenReport

# What SentencePiece compiles of the rules below: the real map of T5 (NFKC) has 240 KB.
#   ﬁ -> fi, Ａ -> A, ① and １ -> 1, ½ -> 1/2, … -> ..., e and U+0301 -> é, U+0001 and U+00AD -> nothing,
#   tab, LF, CR, U+00A0, U+200B and U+3000 -> space
CHARACTER_MAP = zlib.decompress(
    base64.b64decode(
        "eNod03nQT1UYB/Dn96MxDGPGX9XIMGaE8gqhiEpoQbKEStaxZmu16/dSyE52le2NRGUXsu97SYVIthCNkkr2z3VnPvN9zp075957"
        "znMid0Tkj+TKpApE7C6cjpQ6W11I5iVTNB35KkbkfTRieLWIXO6tKRVRgBm9aRCRJ3kudzoyr0Zk3xVR0NgUmbH3RNxr8rEH03G3"
        "NIwifPF6RGF5HwsOpKO4LEoxSnA/c+ZFzNwSUVr9ACXxysiiLA9Shm/MXUE+RDkqUZmH8dlRhao8gl+I6jzOY/idqMFTPMGT1OZp"
        "alKL56jDMzzL89SnLvVoSCNewFJEE5rSmBd5mVdoxku0oCXNsVzRhra0ojXt6UC7nHS0k515jY50ohvd6UJX3uBNemBZ4x168hZv"
        "04e+9MJ2xQDepR/9GcigpAHIZjBDeI/3GcZwhvIBoxjNCEYyjg8Zk+wzE5nEeCYwlWlMZgqfMJ2P+JhZzGYGM5N9Zy45fMrnzOcz"
        "tER8yVdJ3yR9xGKWsJBFLGcFS1nGKlbzNStZy7qkb1jDxsTmVKyXG9jKNjaj/WInu9jODvayj93sYT/f8y3f8SM/cYAfOMzPHOQQ"
        "v3CMIxzl5PZUnMhJxa/q4/zGGU5xmt85z1nOcTGTiovyAn9wib/5k7/4l/+4zD9c5RpX+J+b3OI6N+LOwcvKynJ0ypUt7wC07xSb"
        "5sVtaWKarA=="
    )
)

PAD, EOS, UNK, SPACE, A, CAT, DOG, S, FI, NE, ONE = range(11)
PIECES = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁cat", "▁dog", "s", "fi", "ne", "1"]
SCORES = [0.0, 0.0, 0.0, -2.0, -2.5, -3.0, -3.0, -4.0, -4.0, -4.0, -4.0]


def tokenizer_json(**changes):
    """As transformers 5 writes it, with a sentinel as the one added token of the text."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    special = [*enumerate(PIECES[:3]), (len(PIECES), "<extra_id_0>")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags} for index, token in special],
        "normalizer": json.loads(normalizers.Precompiled(CHARACTER_MAP).__getstate__()),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": None,
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": UNK,
            "vocab": list(map(list, zip(PIECES, SCORES, strict=True))),
            "byte_fallback": False,
        },
        **changes,
    }


def write_folder(folder, config=None, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(**changes)), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return T5Tokenizer.from_folder(write_folder(tmp_path_factory.mktemp("t5")))


# Ids


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("a cat", [A, CAT]),
        ("  a \n\t cats\u3000 ", [A, CAT, S]),
        ("A cat", [SPACE, UNK, CAT]),
        ("猫 a", [SPACE, UNK, A]),
        ("😀😀", [SPACE, UNK]),
        ("ﬁne ①", [SPACE, FI, NE, SPACE, ONE]),
        ("a\u00adcat", [A, UNK]),
        ("a</s>cat <extra_id_0>a", [A, EOS, CAT, len(PIECES), A]),
    ],
)
def test_ids_by_hand(t5, text, ids):
    assert t5.encode([text], max_length=8).tolist() == [[*ids, EOS] + [PAD] * (7 - len(ids))]


def test_special_tokens(t5):
    assert (t5.pad_token, t5.pad_token_id, t5.eos_token_id) == ("<pad>", 0, 1)
    assert (t5.model_max_length, t5.vocab_size) == (512, 12)
    assert not hasattr(t5, "bos_token_id")


def test_rows_are_contiguous_int32(t5):
    rows = t5.encode(["a cat", "", "a dog"])
    assert (rows.shape, rows.dtype) == ((3, 512), np.int32)
    assert rows.flags.c_contiguous
    assert t5.encode([]).shape == (0, 512)


# Prompts that do not fit


def test_truncation_keeps_a_final_eos(t5):
    with pytest.warns(UserWarning, match="dropped") as caught:
        rows = t5.encode(["a cat  dogs", "a"], max_length=3, overflow="truncate")
    assert rows.tolist() == [[A, CAT, EOS], [A, EOS, PAD]]
    assert str(caught[0].message) == (
        "Prompts of more than 3 tokens (EOS included):\n"
        "  prompt[0]: 5 tokens, 2 too many; does not fit: 'dogs'\n"
        "This text was dropped."
    )
    assert caught[0].filename == __file__


def test_prompts_that_do_not_fit_are_named(t5):
    with pytest.raises(PromptTooLongError, match=r"\n  long: 5 tokens, 1 too many; does not fit: 'ne'"):
        t5.encode(["a", "a ﬁne"], max_length=4, names=["short", "long"])
    t5.encode(["a cat"], max_length=3)


def test_the_shortest_row_holds_eos(t5):
    with pytest.warns(UserWarning, match="does not fit: 'a cat'"):
        assert t5.encode(["a cat", ""], max_length=1, overflow="truncate").tolist() == [[EOS], [EOS]]
    with pytest.raises(ClipJaxError, match=r"max_length must be a whole number, 1 \(EOS\) or more; got 0\."):
        t5.encode(["a"], max_length=0)


def test_inspect(t5):
    assert t5.inspect("a cats", max_length=3) == TokenReport(
        ids=(A, CAT, S, EOS), pieces=("▁a", "▁cat", "s", "</s>"), max_length=3, overflow_text="s"
    )


# Folders


def test_what_is_saved_is_read(t5, tmp_path):
    t5.save(tmp_path)
    again = T5Tokenizer.from_folder(tmp_path)
    assert json.loads(again._pipeline.to_str()) == json.loads(t5._pipeline.to_str())
    assert (again.model_max_length, again.pad_token) == (512, "<pad>")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "T5Tokenizer"


@pytest.mark.parametrize(
    ("config", "length"),
    [({"model_max_length": 77}, 77), ({"model_max_length": int(1e30)}, 512), ({}, 512), (None, 512)],
)
def test_default_length_is_that_of_the_folder(tmp_path, config, length):
    assert T5Tokenizer.from_folder(write_folder(tmp_path, config)).model_max_length == length


def test_only_the_character_map_and_the_vocabulary_count(t5, tmp_path):
    """An earlier version of transformers wrote other steps, and may have left its padding behind."""
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    write_folder(
        tmp_path,
        normalizer={"type": "Sequence", "normalizers": [strip, tokenizer_json()["normalizer"]]},
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    )
    again = T5Tokenizer.from_folder(tmp_path)
    assert json.loads(again._pipeline.to_str()) == json.loads(t5._pipeline.to_str())


def test_a_tokenizer_without_character_map(tmp_path):
    ours = T5Tokenizer.from_folder(write_folder(tmp_path, normalizer=None))
    assert ours.encode(["ﬁ a"], max_length=4).tolist() == [[SPACE, UNK, A, EOS]]


def test_rows_that_are_filled_on_the_left_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="padding_side is 'left', expected 'right'"):
        T5Tokenizer.from_folder(write_folder(tmp_path, {"padding_side": "left"}))


def test_no_tokenizer_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected spiece\.model or a tokenizer\.json .*tokenizer_2/ of FLUX"):
        T5Tokenizer.from_folder(tmp_path)


def test_the_tokenizer_of_clip_is_refused(tmp_path):
    ClipTokenizer.packaged().save(tmp_path)
    message = (
        r"No T5 tokenizer in .* a tokenizer\.json with a 'Unigram' model \(CLIP's has 'BPE'\); found: tokenizer\.json"
    )
    with pytest.raises(CheckpointError, match=message):
        T5Tokenizer.from_folder(tmp_path)
    assert T5Tokenizer.find(tmp_path) is None


@pytest.mark.parametrize("content", ["{}", '{"model": null}', '{"model": 3}', '{"model": {"vocab": {"a": 0}}}'])
def test_what_has_no_list_of_pieces_is_another_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    assert T5Tokenizer.find(tmp_path) is None


def test_spiece_model_counts_beside_the_tokenizer_of_clip(tmp_path, monkeypatch):
    """By itself: transformers would take the tokenizer.json, and the settings are those of CLIP."""
    ClipTokenizer.packaged().save(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"pieces")

    class Reader:
        @staticmethod
        def from_pretrained(folder):
            assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == {"spiece.model": b"pieces"}
            text = json.dumps(tokenizer_json())
            return types.SimpleNamespace(backend_tokenizer=types.SimpleNamespace(to_str=lambda: text))

    for name in ("google", "google.protobuf", "sentencepiece", "transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["google"].protobuf = sys.modules["google.protobuf"]
    sys.modules["transformers"].T5TokenizerFast = Reader
    assert T5Tokenizer.from_folder(tmp_path).encode(["a cat"], max_length=4).tolist() == [[A, CAT, EOS, PAD]]


def test_missing_special_tokens_are_named(tmp_path):
    write_folder(tmp_path, config={"pad_token": "[PAD]", "eos_token": {"content": "[END]"}})
    with pytest.raises(CheckpointError, match=r"no T5 tokenizer: \[PAD\], \[END\] missing in its 12 tokens"):
        T5Tokenizer.from_folder(tmp_path)


def test_a_damaged_vocabulary_is_an_error(tmp_path):
    write_folder(tmp_path, model={"type": "Unigram", "unk_id": 99, "vocab": [["<pad>", 0.0]]})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read \(.*\); fetch the file again"):
        T5Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({"pad_token": 5}, {}),
        ({"pad_token": ["x"]}, {}),
        (None, {"normalizer": [1]}),
        (None, {"normalizer": {"normalizers": ["a"]}}),
        (None, {"normalizer": {"normalizers": None}}),
    ],
)
def test_other_damage_is_an_error_too(tmp_path, config, changes):
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        T5Tokenizer.from_folder(write_folder(tmp_path, config, **changes))


@pytest.mark.parametrize("package", ["transformers", "sentencepiece", "google.protobuf"])
def test_packages_that_read_spiece_model_are_named(tmp_path, monkeypatch, package):
    (tmp_path / "spiece.model").write_bytes(b"")

    for name in ("google", "google.protobuf", "sentencepiece", "transformers"):
        module = None if name == package else types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        if name == "google.protobuf" and module:
            sys.modules["google"].protobuf = module
    with pytest.raises(CheckpointError, match=rf"{package}, .* `pip install transformers sentencepiece protobuf`"):
        T5Tokenizer.from_folder(tmp_path)
