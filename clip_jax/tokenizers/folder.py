"""Reads the tokenizer folder of a CLIP checkpoint, with the precedence of transformers 5.

Source of the rules: transformers 5.23 tokenization_utils_base.py, `PreTrainedTokenizerBase._from_pretrained`,
and tokenization_utils_tokenizers.py, `TokenizersBackend.convert_to_native_format`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from clip_jax.errors import CheckpointError
from clip_jax.tokenizers.files import (
    check_sides,
    exists,
    listing,
    model_max_length,
    read_json,
    read_optional_json,
    read_text,
    token_content,
)
from clip_jax.tokenizers.pipeline import BOS, END_OF_WORD, EOS, MAX_LENGTH, Recipe

_DEFAULT_SPECIAL = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
_WANTED = "Expected vocab.json and merges.txt, or tokenizer.json, of a CLIP tokenizer"


def read_folder(folder: Path) -> Recipe:
    """Reads a tokenizer folder, as diffusers pipelines hold them and `save_pretrained` writes them.

    tokenizer.json wins over vocab.json and merges.txt; only its vocabulary, merges and added tokens count.
    If tokenizer_config.json has `added_tokens_decoder`, special and added tokens come from that file alone.
    Else special_tokens_map.json wins over it, and added_tokens.json and tokenizer.json's list add tokens. A
    special token that no file names is CLIPTokenizer's default (pad: `<|endoftext|>`).

    Raises:
        CheckpointError: files are missing, unreadable, or of another kind of tokenizer.
    """
    if exists(folder / "spiece.model"):
        raise CheckpointError(
            f"{folder} holds spiece.model, a SentencePiece tokenizer (T5's). {_WANTED}; pass the folder of "
            "the CLIP tokenizer (usually tokenizer/ or tokenizer_2/)."
        )
    whole_path = folder / "tokenizer.json"
    whole = read_json(whole_path) if exists(whole_path) else None
    if whole is not None:
        vocab, merges = _bpe_of_tokenizer_json(whole, whole_path)
    else:
        vocab, merges = _read_vocab_and_merges(folder)
    if not any(token.endswith(END_OF_WORD) for token in vocab):
        raise CheckpointError(
            f"The vocabulary in {folder} has no token that ends in {END_OF_WORD!r}: it is no CLIP vocabulary "
            f"(GPT-2's has none either). {_WANTED}."
        )
    if max(vocab.values()) >= 2**31:
        raise CheckpointError(f"The vocabulary in {folder} has an id of {max(vocab.values())}; fetch it again.")

    config_path = folder / "tokenizer_config.json"
    settings = read_optional_json(config_path)
    check_sides(settings, config_path)
    if "added_tokens_decoder" in settings:
        declared = settings["added_tokens_decoder"]
        added = {int(index): _added_token(token, config_path) for index, token in declared.items()}
        extra = _extra_special(settings, config_path)
    else:
        map_path = folder / "special_tokens_map.json"
        listed = {str(token) for token in _extra_special(settings, config_path)}
        settings |= {
            name: {**token, "special": True} if name in _DEFAULT_SPECIAL and isinstance(token, dict) else token
            for name, token in read_optional_json(map_path).items()
            if name != "additional_special_tokens" or name not in settings  # those of the config go before
        }
        extra = _extra_special(settings, map_path)
        # Those that the map alone calls special are normalised: transformers reads it too late for these flags.
        names = {token_content(settings.get(name)) for name in _DEFAULT_SPECIAL} | listed
        added = {
            index: AddedToken(token, normalized=token not in names, special=token in names)
            for token, index in read_optional_json(folder / "added_tokens.json").items()
        }
        added |= {token["id"]: _added_token(token, whole_path) for token in (whole or {}).get("added_tokens", [])}

    return Recipe(
        source=str(folder),
        vocab=vocab,
        merges=merges,
        special={name: _special_token(name, settings, folder) for name in _DEFAULT_SPECIAL},
        added=added,
        extra_special=extra,
        model_max_length=model_max_length(settings, config_path, MAX_LENGTH),
    )


def _bpe_of_tokenizer_json(whole: dict[str, Any], path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = whole.get("model") or {}
    kind = model.get("type", "BPE")  # early versions of tokenizers did not write it
    if kind != "BPE" or model.get("end_of_word_suffix") != END_OF_WORD:
        raise CheckpointError(
            f"{path} is no CLIP tokenizer: found a model of type {kind!r} with end_of_word_suffix "
            f"{model.get('end_of_word_suffix')!r}, expected 'BPE' with {END_OF_WORD!r}. "
            "Pass the folder of the CLIP tokenizer (T5's is 'Unigram', GPT-2's has no suffix)."
        )
    return model.get("vocab", {}), _pairs(model.get("merges", []), path)


def _read_vocab_and_merges(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    missing = [name for name in ("vocab.json", "merges.txt") if not exists(folder / name)]
    if missing:
        raise CheckpointError(
            f"No tokenizer in {folder}: {' and '.join(missing)} missing, and no tokenizer.json. {_WANTED}; "
            f"found: {listing(folder)}. Pass the folder of a CLIP tokenizer (tokenizer=, --tokenizer)."
        )
    path = folder / "merges.txt"
    lines = [line for line in read_text(path).splitlines() if line and not line.startswith("#version")]
    return read_json(folder / "vocab.json"), _pairs(lines, path)


def _pairs(merges: Iterable[str | Sequence[str]], path: Path) -> list[tuple[str, str]]:
    split = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    try:
        return [(left, right) for left, right in split]
    except ValueError as error:
        raise CheckpointError(f"{path}: each merge must have two symbols ({error}); fetch the file again.") from error


def _special_token(name: str, settings: dict[str, Any], folder: Path) -> str | AddedToken:
    token = settings.get(name, _DEFAULT_SPECIAL[name])
    if token is None:
        raise CheckpointError(
            f"The tokenizer in {folder} sets {name} to null. Expected a token of the vocabulary; set one in "
            "tokenizer_config.json, and in special_tokens_map.json if it has the key too, or remove the key to get "
            f"{_DEFAULT_SPECIAL[name]!r}."
        )
    return token if isinstance(token, str) else _added_token(token, folder)


def _extra_special(settings: dict[str, Any], path: Path) -> list[str | AddedToken]:
    tokens = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    values = tokens.values() if isinstance(tokens, dict) else tokens
    return [token if isinstance(token, str) else _added_token(token, path) for token in values]


def _added_token(token: Any, path: Path) -> AddedToken:
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise CheckpointError(
            f"{path}: expected a token as text or as an object with 'content', found {token!r}; correct it."
        )
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token})
