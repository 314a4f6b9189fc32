"""T5's tokenizer from a GGUF file gives the ids of the tokenizer.json that it was made from."""

import json

import numpy as np
import pytest

from clip_jax.convert.gguf_tokenizer import gguf_tokenizer
from clip_jax.errors import CheckpointError
from clip_jax.tokenizers import T5Tokenizer
from tests.tokenizers.test_t5 import CHARACTER_MAP, PIECES, SCORES, tokenizer_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)
KEYS = {
    "model": "t5",
    "tokens": [*PIECES, "<extra_id_0>", "[PAD12]", "[PAD13]"],
    "scores": np.array([*SCORES, 0, -10000, -10000], np.float32),
    "token_type": np.array([CONTROL, CONTROL, UNKNOWN, *[NORMAL] * 8, USER_DEFINED, UNUSED, UNUSED], np.int32),
    "precompiled_charsmap": np.frombuffer(CHARACTER_MAP, np.uint8),
    "unknown_token_id": 2,
}


def metadata(**changes):
    return {f"tokenizer.ggml.{key}": value for key, value in (KEYS | changes).items() if value is not None}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return T5Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "prompt",
    ["", "a cat", "a  cats </s> dog", "ﬁne ½ … １ é", "<extra_id_0> cat <unk>", "<pad>a", "[PAD12]", "1 </s>1", "日本"],
)
@pytest.mark.parametrize("signed", [True, False])
def test_the_ids_are_those_of_the_tokenizer_json(tmp_path, reference, prompt, signed):
    # llama.cpp writes the map as signed bytes.
    charsmap = np.frombuffer(CHARACTER_MAP, np.int8 if signed else np.uint8)
    tokenizer = gguf_tokenizer(metadata(precompiled_charsmap=charsmap), tmp_path)
    np.testing.assert_array_equal(tokenizer.encode([prompt]), reference.encode([prompt]), strict=True)


def test_unused_tokens_at_the_end_are_left_out(tmp_path, reference):
    tokenizer = gguf_tokenizer(metadata(), tmp_path)
    assert tokenizer.vocab_size == reference.vocab_size == 12
    # Negative control: as ordinary tokens they would be found in a prompt.
    kept = gguf_tokenizer(
        metadata(token_type=np.array([*KEYS["token_type"][:12], USER_DEFINED, USER_DEFINED])), tmp_path
    )
    assert kept.encode(["[PAD12]"])[0, 0] == 12
    assert tokenizer.encode(["[PAD12]"])[0, 0] != 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gpt2"}, "expected the tokenizer of a T5, found 'gpt2'. Pass the folder"),
        ({"model": None}, "expected the tokenizer of a T5, found None"),
        ({"scores": None}, "expected a text, a score and a type of every token"),
        ({"scores": KEYS["scores"][:-1]}, "expected a text, a score and a type of every token"),
        ({"scores": np.full(14, np.nan, np.float32)}, "expected a text, a score and a type of every token"),
        ({"tokens": [1, 2]}, "expected a text, a score and a type of every token"),
        ({"token_type": ["x"] * 14}, "expected a text, a score and a type of every token"),
        ({"tokens": ["x", *KEYS["tokens"][1:]]}, "is no T5 tokenizer: <pad> missing"),
        ({"unknown_token_id": 99}, "cannot be read"),
    ],
)
def test_damaged_tokenizers(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        gguf_tokenizer(metadata(**changes), tmp_path / "x")
