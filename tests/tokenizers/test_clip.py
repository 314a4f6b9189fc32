import hashlib
import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.errors import CheckpointError, ClipJaxError, PromptTooLongError
from clip_jax.tokenizers import ClipTokenizer, TokenReport
from clip_jax.tokenizers import clip as clip_module
from clip_jax.tokenizers.pipeline import packaged_vocabulary

BOS, EOS = 49406, 49407
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokens.json").read_text(encoding="ascii"))


@pytest.fixture(scope="module")
def clip():
    return ClipTokenizer.packaged()


@pytest.fixture(scope="module")
def clip_pad_0():
    return ClipTokenizer.packaged(pad_token="!")


def padded(ids, pad, length=77):
    return ids + [pad] * (length - len(ids))


# The vocabulary


def test_the_vocabulary_is_openai_clips():
    vocab, merges = packaged_vocabulary()
    assert len(vocab) == 49_408
    assert len(merges) == 48_894
    assert sorted(vocab.values()) == list(range(49_408))
    first_and_last = {"!": 0, "~": 93, "¡": 94, "Ā": 188, "Ń": 255, "!</w>": 256, "Ń</w>": 511}
    first_and_last |= {"in": 512, "jekyll</w>": 49_405, "<|startoftext|>": BOS, "<|endoftext|>": EOS}
    assert {token: vocab[token] for token in first_and_last} == first_and_last


def test_the_merges_are_the_text_of_the_merges_txt_on_the_hub():
    _, merges = packaged_vocabulary()
    text = "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]).encode()
    assert len(text) == 524_619
    assert hashlib.sha256(text).hexdigest() == "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"


def test_the_licence_of_the_vocabulary_ships_beside_it():
    data = Path(clip_module.__file__).parent / "data"
    text = (data / "LICENSE.openai-clip").read_text(encoding="utf-8")
    assert "MIT License\n\nCopyright (c) 2021 OpenAI\n" in text
    assert {path.name for path in data.iterdir()} == {"LICENSE.openai-clip", "clip_merges.txt.gz"}


def test_special_tokens(clip, clip_pad_0):
    assert (clip.bos_token_id, clip.eos_token_id, clip.model_max_length) == (BOS, EOS, 77)
    assert clip.vocab_size == 49_408
    assert (clip.pad_token, clip.pad_token_id) == ("<|endoftext|>", EOS)
    assert (clip_pad_0.pad_token, clip_pad_0.pad_token_id) == ("!", 0)


# Ids


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("A Photo OF\n a  cat ", [320, 1125, 539, 320, 2368]),
        ("A  CAFÉ, it's 12", [320, 15304, 267, 585, 568, 272, 273]),
        ("A  CAFE\u0301, it's 12", [320, 15304, 267, 585, 568, 272, 273]),
        ("100%", [272, 271, 271, 260]),
        ("a-b--c", [320, 268, 321, 2432, 322]),
        ("a_b__c", [320, 318, 321, 3838, 322]),
        ("İ", [328, 16384]),
        ("a\0b", [320, 444, 321]),
        ("x\u200by", [343, 9844, 344]),
        ("don’t", [847, 728, 503, 339]),
        ("&amp; &lt;", [261, 6259, 282, 261, 3333, 282]),
        ("a<|endoftext|>b", [320, EOS, 321]),
    ],
)
def test_ids_by_hand(clip, clip_pad_0, text, ids):
    expected = [BOS, *ids, EOS]
    assert clip.encode([text]).tolist() == [padded(expected, EOS)]
    assert clip_pad_0.encode([text]).tolist() == [padded(expected, 0)]


def test_the_pad_token_is_special_in_the_text_too(clip, clip_pad_0):
    assert clip.encode(["wow! !!"]).tolist() == [padded([BOS, 2781, 256, 748, EOS], EOS)]
    assert clip_pad_0.encode(["wow! !!"]).tolist() == [padded([BOS, 2781, 0, 0, 0, EOS], 0)]


def test_ids_equal_those_of_transformers(clip, clip_pad_0):
    cases = GOLDEN["cases"]
    assert len(cases) >= 300
    texts = [case["text"] for case in cases]
    plain = [padded(case["ids"], EOS) for case in cases]
    pad_0 = [padded(case.get("ids_pad_0", case["ids"]), 0) for case in cases]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        np.testing.assert_array_equal(clip.encode(texts, overflow="truncate"), plain)
        np.testing.assert_array_equal(clip_pad_0.encode(texts, overflow="truncate"), pad_0)


def test_rows_are_contiguous_int32(clip):
    rows = clip.encode(["a cat", "", "two dogs"], max_length=9)
    assert (rows.shape, rows.dtype) == ((3, 9), np.int32)
    assert rows.flags.c_contiguous


def test_no_prompts_make_no_rows(clip):
    rows = clip.encode([])
    assert (rows.shape, rows.dtype) == ((0, 77), np.int32)


def test_rows_do_not_depend_on_the_rest_of_the_batch(clip):
    texts = ["a cat", "", "a much longer prompt, with commas!"]
    np.testing.assert_array_equal(clip.encode(texts), np.concatenate([clip.encode([text]) for text in texts]))


def test_threads_share_a_tokenizer(clip):
    texts = ["a cat " * count for count in range(1, 9)]
    lengths = [2 * count + 2 for count in range(1, 9)]
    alone = [clip.encode([text], max_length=length).tolist() for text, length in zip(texts, lengths, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(
            lambda text, length: clip.encode([text], max_length=length).tolist(), texts * 20, lengths * 20
        )
        assert list(together) == alone * 20


# Prompts that do not fit


def test_a_prompt_that_just_fits_is_no_error(clip):
    row = clip.encode(["cat " * 75])[0]
    assert row.tolist() == [BOS] + [2368] * 75 + [EOS]


def test_all_prompts_that_do_not_fit_are_named(clip):
    prompts = ["a cat", "cat " * 75 + "Café  DOG", "x " * 76]
    with pytest.raises(PromptTooLongError) as raised:
        clip.encode(prompts)
    assert str(raised.value) == (
        "Prompts of more than 77 tokens (BOS and EOS included):\n"
        "  prompt[1]: 79 tokens, 2 too many; does not fit: 'Café  DOG'\n"
        "  prompt[2]: 78 tokens, 1 too many; does not fit: 'x '\n"
        'Shorten them, or pass overflow="truncate" (--overflow truncate) to drop the ends.'
    )


def test_names_replace_the_default_names(clip):
    with pytest.raises(PromptTooLongError, match=r"\n  negative\[0\]: 5 tokens, 1 too many"):
        clip.encode(["a", "a b c"], max_length=4, names=["prompt[0]", "negative[0]"])


def test_a_very_long_overflow_is_quoted_in_part(clip):
    with pytest.raises(PromptTooLongError, match="100002 tokens, 99925 too many") as raised:
        clip.encode(["1" * 100_000])
    assert f"does not fit: '{'1' * 300}' and 99625 more characters\n" in str(raised.value)


def test_truncate_keeps_the_start_and_warns(clip):
    with pytest.warns(UserWarning, match="prompt") as caught:
        row = clip.encode(["cat " * 80 + "<|endoftext|> dog"], overflow="truncate")[0]
    assert row.tolist() == [BOS] + [2368] * 75 + [EOS]
    assert len(caught) == 1
    assert str(caught[0].message) == (
        "Prompts of more than 77 tokens (BOS and EOS included):\n"
        "  prompt[0]: 84 tokens, 7 too many; does not fit: 'cat cat cat cat cat <|endoftext|> dog'\n"
        "This text was dropped."
    )
    assert caught[0].filename == __file__


def test_truncate_is_silent_where_all_fits(clip):
    clip.encode(["a cat"], overflow="truncate")  # warnings are errors in this suite


def test_the_shortest_row_holds_bos_and_eos(clip):
    with pytest.warns(UserWarning, match="does not fit: 'a cat'"):
        rows = clip.encode(["a cat", ""], max_length=2, overflow="truncate")
    assert rows.tolist() == [[BOS, EOS], [BOS, EOS]]


# fmt: off
WORDS = [
    "a", "CAT", "it's", "!", "!!", "<|endoftext|>", "cafe\u0301", "a\u0323\u0301", "\u0344", "İstanbul",
    "ẞ", "ΟΔΟΣ", "\u1112\u1161\u11ab", "猫咪", "１２", "👨\u200d👩\u200d👧", "\u0958", "\U0001d15e", "ﬁ",
    "\0",
]
# fmt: on
SPACES = [" ", "  ", "\n", "\u00a0", "\t \u3000"]


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(parts=st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(SPACES)), min_size=1, max_size=8))
def test_the_overflow_is_the_text_that_the_user_wrote(clip, clip_pad_0, pad_token, parts):
    """Offsets survive NFC, lower-casing and white-space collapse: both sides of the cut re-encode."""
    tokenizer = clip_pad_0 if pad_token == "!" else clip
    words = [word + space for word, space in parts]
    prompt = "".join(words)
    for kept in range(len(words)):
        start = "".join(words[:kept])
        length = len(tokenizer.inspect(start).ids)
        report = tokenizer.inspect(prompt, max_length=length)
        assert report.overflow_text == "".join(words[kept:])
        assert report.ids[: length - 1] == tokenizer.inspect(start).ids[:-1]
        assert report.ids[length - 1 :] == tokenizer.inspect(report.overflow_text).ids[1:]


def test_a_character_cut_in_two_tokens_does_not_fit(clip):
    report = clip.inspect("a 猫", max_length=4)
    assert report.pieces == ("<|startoftext|>", "a</w>", "ç", "Į", "«</w>", "<|endoftext|>")
    assert report.overflow_text == "猫"


# Reports


def test_inspect(clip):
    assert clip.inspect("A cat!") == TokenReport(
        ids=(BOS, 320, 2368, 256, EOS),
        pieces=("<|startoftext|>", "a</w>", "cat</w>", "!</w>", "<|endoftext|>"),
        max_length=77,
        overflow_text="",
    )
    assert clip.inspect("A Big CAT", max_length=4).overflow_text == "CAT"


# Arguments


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", b"cat"], r"prompt\[1\] must be a str, got bytes: b'cat'\."),
        ([None], r"prompt\[0\] must be a str, got NoneType: None\."),
        (["a", "b", 3], r"prompt\[2\] must be a str, got int: 3\."),
        ("a cat", r"prompts must be a sequence of str, got one str; pass \[prompt\]\."),
        (
            ["a", "ab\ud800c"],
            r"prompt\[1\] holds a lone surrogate, '\\ud800' at character 2, which has no UTF-8",
        ),
    ],
)
def test_prompts_that_are_not_text(clip, prompts, message):
    with pytest.raises(ClipJaxError, match=message):
        clip.encode(prompts)


def test_inspect_checks_its_prompt(clip):
    with pytest.raises(ClipJaxError, match=r"prompt\[0\] must be a str, got NoneType"):
        clip.inspect(None)


def test_an_unknown_overflow_lists_the_valid_ones(clip):
    with pytest.raises(ClipJaxError, match=r"overflow must be one of \['error', 'truncate'\], got 'chunk'\."):
        clip.encode(["a"], overflow="chunk")


@pytest.mark.parametrize("length", [1, 0, -5, 7.0, "77"])
def test_max_length_is_a_whole_number_with_room_for_bos_and_eos(clip, length):
    with pytest.raises(ClipJaxError, match=r"max_length must be a whole number, 2 \(BOS and EOS\) or more; got"):
        clip.encode(["a"], max_length=length)


def test_names_must_name_each_prompt(clip):
    with pytest.raises(ClipJaxError, match="names must name each prompt: got 1 names for 2 prompts"):
        clip.encode(["a", "b"], names=["x"])


def test_an_unknown_pad_token_is_named():
    with pytest.raises(CheckpointError, match=r"The pad_token '\[PAD\]' is not in the vocabulary of the packaged"):
        ClipTokenizer.packaged(pad_token="[PAD]")


# Imports

FORBIDDEN = ("jax", "flax", "torch", "transformers")
# The package's own __init__ is another room: a bare module stands in for it.
IMPORT = f"""
import sys, types
package = types.ModuleType("clip_jax")
package.__path__ = [{str(Path(clip_module.__file__).parents[1])!r}]
sys.modules["clip_jax"] = package
import clip_jax.tokenizers
clip_jax.tokenizers.ClipTokenizer.packaged().encode(["a cat"])
"""
REPORT = f"\nprint([name for name in {FORBIDDEN} if name in sys.modules])"


def imported_by(code):
    done = subprocess.run([sys.executable, "-c", code + REPORT], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_tokenizers_import_no_framework():
    assert imported_by(IMPORT) == "[]"


def test_the_import_check_can_fail():
    assert imported_by(IMPORT + "\nimport jax") == "['jax']"
