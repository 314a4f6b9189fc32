"""T5's tokenizer: prompts to padded ids, on the host."""

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Self

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from clip_jax.errors import CheckpointError
from clip_jax.tokenizers.files import (
    check_sides,
    exists,
    listing,
    model_max_length,
    read_optional_json,
    telling_damage,
    token_content,
)
from clip_jax.tokenizers.rows import RowTokenizer

MAX_LENGTH = 512

SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_ADVICE = (
    "Pass the folder of a T5 tokenizer (tokenizer_2/ of FLUX, tokenizer_3/ of SD3): "
    'tokenizer={"t5": folder} (--tokenizer t5=FOLDER).'
)


class T5Tokenizer(RowTokenizer):
    """T5's Unigram: the ids of transformers 5 (tokenization_t5.py, `T5Tokenizer`) on every string.

    Case counts; white space of any kind and length separates words. There is no BOS, and a character outside
    the vocabulary becomes the unknown token. Immutable, and so safe to share between threads.

    Attributes:
        pad_token: token that fills the rows, `"<pad>"`.
        pad_token_id: its id, 0 in every T5.
        eos_token_id: id of `"</s>"`, which ends each prompt: 1 in every T5.
        model_max_length: default length of a row, 512 if the folder names none. Diffusion pipelines take
            another: the pad tokens are attended to, so that the length changes every row of the output.
        vocab_size: number of tokens, added ones included: 32,100, less than the embedding has rows.
    """

    _frame: ClassVar[str] = "EOS"
    _class_name: ClassVar[str] = "T5Tokenizer"

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Reads a tokenizer folder: tokenizer.json, or else spiece.model.

        Only tokenizer.json can be read without further packages: transformers and sentencepiece read
        spiece.model, once; `save` then writes a tokenizer.json.

        Raises:
            CheckpointError: files are missing, unreadable, or of another kind of tokenizer, or a package that
                reads spiece.model is missing.
        """
        found = cls.find(folder)
        if found is None:
            raise CheckpointError(
                f"No T5 tokenizer in {folder}: expected spiece.model or a tokenizer.json with a 'Unigram' model "
                f"(CLIP's has 'BPE'); found: {listing(Path(folder))}. {_ADVICE}"
            )
        return found

    @classmethod
    def find(cls, folder: Path) -> Self | None:
        """As `from_folder`; None where there is no T5 tokenizer, though perhaps another one."""
        folder = Path(folder)
        source = folder / "tokenizer.json"
        whole = read_optional_json(source)
        others = bool(whole) and not _is_unigram(whole)  # CLIP's, and then the settings are so, too
        if others or not whole:
            source = folder / "spiece.model"
            if not exists(source):
                return None
            whole = _convert_sentencepiece(folder, alone=others)
        with telling_damage(folder):
            settings = {} if others else read_optional_json(folder / "tokenizer_config.json")
            check_sides(settings, folder / "tokenizer_config.json")
            special = {name: token_content(settings.get(name)) or token for name, token in SPECIAL.items()}
            length = model_max_length(settings, folder / "tokenizer_config.json", MAX_LENGTH)
            return cls(build_pipeline(whole, special, source), special, length)


def _is_unigram(whole: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is of T5's kind, whose vocabulary is a list of tokens and scores."""
    model = whole.get("model")
    return isinstance(model, dict) and isinstance(model.get("vocab"), list)


def _convert_sentencepiece(folder: Path, *, alone: bool) -> dict[str, Any]:
    """The tokenizer.json that transformers makes of spiece.model; `alone`, without what lies beside it."""
    try:
        import google.protobuf  # noqa: F401  with this and the next, transformers reads spiece.model
        import sentencepiece  # noqa: F401
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"{folder} has spiece.model and no tokenizer.json of T5, and {error.name}, which reads it, is not "
            "installed. Run `pip install transformers sentencepiece protobuf`, or put a tokenizer.json in "
            "the folder: all T5 v1.1 encoders have the same one (FLUX's is in tokenizer_2/)."
        ) from error
    with tempfile.TemporaryDirectory() as place:
        if alone:
            (Path(place) / "spiece.model").symlink_to((folder / "spiece.model").resolve())
        tokenizer = transformers.T5TokenizerFast.from_pretrained(place if alone else folder)
    return json.loads(tokenizer.backend_tokenizer.to_str())


def build_pipeline(whole: dict[str, Any], special: dict[str, str], source: Path | str) -> Tokenizer:
    """Builds the pipeline of transformers 5, which takes from a tokenizer.json only some parts.

    Those are the vocabulary, the added tokens and SentencePiece's character map; files that earlier versions
    wrote split words in other ways, and may hold a truncation and a padding.

    Raises:
        CheckpointError: damaged, or without one of the special tokens.
    """
    model = whole["model"]
    parts = {"truncation": None, "padding": None, "pre_tokenizer": None, "post_processor": None}
    whole = {**whole, **parts, "normalizer": _character_map(whole.get("normalizer"))}
    try:
        pipeline = Tokenizer.from_str(json.dumps(whole))
        # Again, as transformers builds it: `from_str` reads some scores wrong in the last bit.
        pipeline.model = models.Unigram(list(map(tuple, model["vocab"])), model.get("unk_id"), False)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{source} cannot be read ({error}); fetch the file again.") from error
    missing = [token for token in special.values() if pipeline.token_to_id(token) is None]
    if missing:
        raise CheckpointError(
            f"{source} is no T5 tokenizer: {', '.join(missing)} missing in its {pipeline.get_vocab_size()} "
            f"tokens. {_ADVICE}"
        )
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    pipeline.decoder = decoders.Metaspace(prepend_scheme="always")
    eos = special["eos_token"]
    pipeline.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, pipeline.token_to_id(eos))]
    )
    return pipeline


def _character_map(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """The `Precompiled` step of a normaliser, which is one step or a sequence of steps."""
    steps = (normalizer or {}).get("normalizers", [normalizer])
    return next((step for step in steps if step and step.get("type") == "Precompiled"), None)
