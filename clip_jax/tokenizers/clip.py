"""CLIP's tokenizer: prompts to padded ids, on the host."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np
from tokenizers import Encoding

from clip_jax.errors import ClipJaxError, PromptTooLongError
from clip_jax.tokenizers.folder import read_folder
from clip_jax.tokenizers.pipeline import EOS, MAX_LENGTH, Recipe, build_pipeline, id_of, packaged_recipe

Overflow = Literal["error", "truncate"]

_MAX_QUOTE = 300  # characters of an overflow that a message quotes


@dataclass(frozen=True)
class TokenReport:
    """What a prompt becomes.

    Attributes:
        ids: all ids with BOS and EOS; neither padded nor truncated.
        pieces: the vocabulary string of each id.
        max_length: how many ids fit.
        overflow_text: the end of the prompt that does not fit, as the user wrote it; empty if all of it fits.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    max_length: int
    overflow_text: str


class ClipTokenizer:
    """CLIP's BPE: the ids of transformers 5 (tokenization_clip.py, `CLIPTokenizer`) on every string.

    Text is not cleaned with ftfy, as OpenAI CLIP and transformers 4's slow tokenizer do. The pad token is a
    special token: with pad `"!"`, each literal `!` in a prompt becomes the pad id. Immutable, and so safe to
    share between threads.

    Attributes:
        pad_token: token that fills the rows, `"<|endoftext|>"` or, for OpenCLIP text encoders, `"!"`.
        pad_token_id: its id.
        bos_token_id: id that starts each row.
        eos_token_id: id that ends each prompt.
        model_max_length: default length of a row.
        vocab_size: number of tokens, added ones included.
    """

    pad_token: str
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int
    model_max_length: int
    vocab_size: int

    def __init__(self, recipe: Recipe) -> None:
        """Builds a tokenizer; use `packaged` or `from_folder`."""
        self._pipeline = build_pipeline(recipe)
        self._special = {name: str(token) for name, token in recipe.special.items()}
        self.pad_token = self._special["pad_token"]
        self.pad_token_id = id_of(self._pipeline, self.pad_token)
        self.bos_token_id = id_of(self._pipeline, self._special["bos_token"])
        self.eos_token_id = id_of(self._pipeline, self._special["eos_token"])
        self.model_max_length = recipe.model_max_length
        self.vocab_size = self._pipeline.get_vocab_size()

    @classmethod
    def packaged(cls, pad_token: str = EOS, model_max_length: int = MAX_LENGTH) -> Self:
        """Returns the tokenizer of OpenAI CLIP, which OpenCLIP, Stable Diffusion and FLUX share.

        Args:
            pad_token: `"<|endoftext|>"` (SD 1.5, FLUX, first tokenizer of SDXL and SD3) or `"!"` (SD 2.1,
                second tokenizer of SDXL and SD3).
            model_max_length: default length of a row.

        Raises:
            CheckpointError: `pad_token` is not in the vocabulary.
        """
        return cls(packaged_recipe(pad_token, model_max_length))

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Reads a tokenizer folder: vocab.json and merges.txt, or tokenizer.json; see `folder.read_folder`.

        Raises:
            CheckpointError: files are missing, unreadable, or of another kind of tokenizer, or name a special
                token that the vocabulary does not have.
        """
        return cls(read_folder(Path(folder)))

    def encode(
        self,
        prompts: Sequence[str],
        *,
        max_length: int | None = None,
        overflow: Overflow = "error",
        names: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Encodes prompts as `BOS tokens EOS pad pad ...`.

        Equals `CLIPTokenizer(prompts, padding="max_length", max_length=L, truncation=True)` of transformers 5
        where the prompts fit, and with `overflow="truncate"` everywhere.

        Args:
            prompts: B texts; may be empty, and so may each text.
            max_length: length L of the rows, BOS and EOS included; default `model_max_length`.
            overflow: what to do with a prompt of more than L ids: `"error"`, or `"truncate"` to keep BOS, the
                first L - 2 tokens and EOS, with a `UserWarning`.
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
            found = "\n".join([f"Prompts of more than {limit} tokens (BOS and EOS included):", *too_long])
            if overflow == "error":
                raise PromptTooLongError(
                    f'{found}\nShorten them, or pass overflow="truncate" to drop the ends.'
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
        self._pipeline.save(str(folder / "tokenizer.json"))
        added = {
            index: token.__getstate__() for index, token in self._pipeline.get_added_tokens_decoder().items()
        }
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.model_max_length,
            **self._special,
            # With it readers pass over a special_tokens_map.json that an earlier save left in the folder.
            "added_tokens_decoder": added,
        }
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def _row_length(self, max_length: int | None) -> int:
        limit = self.model_max_length if max_length is None else max_length
        if not isinstance(limit, int) or limit < 2:
            raise ClipJaxError(f"max_length must be a whole number, 2 (BOS and EOS) or more; got {limit!r}.")
        return limit


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
