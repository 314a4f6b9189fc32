"""Prompts to padded rows of ids: what the tokenizers of all text encoders share."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
from tokenizers import Encoding, Tokenizer

from clip_jax.errors import ClipJaxError, PromptTooLongError

Overflow = Literal["error", "truncate"]

_MAX_QUOTE = 300  # characters of an overflow that a message quotes


@dataclass(frozen=True)
class TokenReport:
    """What a prompt becomes.

    Attributes:
        ids: all ids, those that frame the prompt included; neither padded nor truncated.
        pieces: the vocabulary string of each id.
        max_length: how many ids fit.
        overflow_text: the end of the prompt that does not fit, as the user wrote it; empty if all of it fits.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    max_length: int
    overflow_text: str


class RowTokenizer:
    """Prompts to rows of one length, each padded on the right; the pipeline ends each prompt with EOS.

    Attributes:
        pad_token: token that fills the rows.
        pad_token_id: its id.
        eos_token_id: id that ends each prompt.
        model_max_length: default length of a row.
        vocab_size: number of tokens, added ones included.
    """

    pad_token: str
    pad_token_id: int
    eos_token_id: int
    model_max_length: int
    vocab_size: int

    _frame: ClassVar[str]  # the tokens around a prompt, as messages call them
    _class_name: ClassVar[str]  # the tokenizer's class in transformers

    def __init__(self, pipeline: Tokenizer, special: Mapping[str, str], model_max_length: int) -> None:
        """Takes a pipeline that frames prompts, neither pads nor truncates; and role -> special token."""
        self._pipeline = pipeline
        self._special = dict(special)
        self.pad_token = special["pad_token"]
        self.pad_token_id = id_of(pipeline, self.pad_token)
        self.eos_token_id = id_of(pipeline, special["eos_token"])
        self.model_max_length = model_max_length
        self.vocab_size = pipeline.get_vocab_size()

    def encode(
        self,
        prompts: Sequence[str],
        *,
        max_length: int | None = None,
        overflow: Overflow = "error",
        names: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Encodes prompts as `tokens EOS pad pad ...`, after BOS where the encoder has one.

        Equals the call of transformers 5, `tokenizer(prompts, padding="max_length", max_length=L,
        truncation=True)`, where the prompts fit, and with `overflow="truncate"` everywhere.

        Args:
            prompts: B texts; may be empty, and so may each text.
            max_length: length L of the rows, BOS and EOS included; default `model_max_length`.
            overflow: what to do with a prompt of more than L ids: `"error"`, or `"truncate"` to keep the
                first L - 1 ids and EOS, with a `UserWarning`.
            names: B names for the prompts in messages; default `prompt[0]`, `prompt[1]`, ...

        Returns:
            int32 array [B, L], C-contiguous.

        Raises:
            PromptTooLongError: prompts do not fit and `overflow` is `"error"`; names all of them.
            ClipJaxError: an argument is not what it should be.
        """
        if overflow not in get_args(Overflow):
            raise ClipJaxError(f"overflow must be one of {list(get_args(Overflow))}, got {overflow!r}.")
        limit = self._row_length(max_length)
        labels = _checked_labels(prompts, names)

        encodings = self._pipeline.encode_batch(list(prompts))
        rows = np.full((len(encodings), limit), self.pad_token_id, dtype=np.int32)
        too_long = []
        for row, encoding, prompt, label in zip(rows, encodings, prompts, labels, strict=True):
            ids = encoding.ids
            if len(ids) > limit:
                too_long.append(_describe_overflow(label, prompt, encoding, limit))
                ids = [*ids[: limit - 1], self.eos_token_id]
            row[: len(ids)] = ids

        if too_long:
            found = "\n".join([f"Prompts of more than {limit} tokens ({self._frame} included):", *too_long])
            if overflow == "error":
                raise PromptTooLongError(
                    f'{found}\nShorten them, or pass overflow="truncate" (--overflow truncate) to drop the ends.'
                )
            warnings.warn(f"{found}\nThis text was dropped.", UserWarning, stacklevel=2)
        return rows

    def inspect(self, prompt: str, max_length: int | None = None) -> TokenReport:
        """Reports the tokens of one prompt, whether it fits or not.

        Raises:
            ClipJaxError: an argument is not what it should be.
        """
        limit = self._row_length(max_length)
        _checked_labels([prompt], None)
        encoding = self._pipeline.encode(prompt)
        return TokenReport(
            ids=tuple(encoding.ids),
            pieces=tuple(encoding.tokens),
            max_length=limit,
            overflow_text=_overflow_text(prompt, encoding, limit),
        )

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `from_folder` and transformers read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._pipeline.save(str(folder / "tokenizer.json"), pretty=False)  # half the size, to be read faster
        added = {index: token.__getstate__() for index, token in self._pipeline.get_added_tokens_decoder().items()}
        config = {
            "tokenizer_class": self._class_name,
            "model_max_length": self.model_max_length,
            **self._special,
            # With it readers pass over a special_tokens_map.json that an earlier save left in the folder.
            "added_tokens_decoder": added,
        }
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def _row_length(self, max_length: int | None) -> int:
        limit = self.model_max_length if max_length is None else max_length
        shortest = self._pipeline.num_special_tokens_to_add(is_pair=False)
        if not isinstance(limit, int) or limit < shortest:
            raise ClipJaxError(f"max_length must be a whole number, {shortest} ({self._frame}) or more; got {limit!r}.")
        return limit


def id_of(pipeline: Tokenizer, token: str) -> int:
    """Returns the id of a token that the pipeline is known to have."""
    index = pipeline.token_to_id(token)
    assert index is not None, token
    return index


def _checked_labels(prompts: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """Returns a label per prompt, after checking that each prompt is text that has an encoding."""
    if isinstance(prompts, str):
        raise ClipJaxError("prompts must be a sequence of str, got one str; pass [prompt].")
    if names is not None and len(names) != len(prompts):
        raise ClipJaxError(f"names must name each prompt: got {len(names)} names for {len(prompts)} prompts.")
    labels = [f"prompt[{index}]" for index in range(len(prompts))] if names is None else list(names)
    for label, prompt in zip(labels, prompts, strict=True):
        if not isinstance(prompt, str):
            raise ClipJaxError(f"{label} must be a str, got {type(prompt).__name__}: {prompt!r}.")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ClipJaxError(
                f"{label} holds a lone surrogate, {prompt[error.start]!r} at character {error.start}, which "
                "has no UTF-8 form. Remove it; text decoded with the wrong encoding often holds one."
            ) from error
    return labels


def _overflow_text(prompt: str, encoding: Encoding, limit: int) -> str:
    """The prompt from its first token that does not fit, by the token's offset into the original text."""
    if len(encoding.ids) <= limit:
        return ""
    first_dropped = limit - 1  # the row's last place is EOS's
    return prompt[encoding.offsets[first_dropped][0] :]


def _describe_overflow(label: str, prompt: str, encoding: Encoding, limit: int) -> str:
    count = len(encoding.ids)
    text = _overflow_text(prompt, encoding, limit)
    more = f" and {len(text) - _MAX_QUOTE} more characters" if len(text) > _MAX_QUOTE else ""
    return f"  {label}: {count} tokens, {count - limit} too many; does not fit: {text[:_MAX_QUOTE]!r}{more}"
