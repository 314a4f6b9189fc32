"""CLIP's BPE as a pipeline of the `tokenizers` library, and the vocabulary that ships with this package."""

import functools
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from clip_jax.errors import CheckpointError
from clip_jax.tokenizers.rows import id_of

END_OF_WORD = "</w>"
BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
MAX_LENGTH = 77

# OpenAI CLIP's pattern (simple_tokenizer.py, `SimpleTokenizer.pat`): contractions, words, digits, the rest.
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Recipe:
    """What a CLIP tokenizer is made of.

    Attributes:
        source: where it comes from, for error messages.
        vocab: token -> id.
        merges: BPE merges, best first.
        special: `bos_token`, `eos_token`, `unk_token` and `pad_token` -> the token, text or with flags.
        added: id -> token beyond the BPE (textual inversion tokens, or specials with flags of their own).
        extra_special: further special tokens, without a declared id.
        model_max_length: ids per prompt, BOS and EOS included.
    """

    source: str
    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    special: Mapping[str, str | AddedToken]
    added: Mapping[int, AddedToken]
    extra_special: Sequence[str | AddedToken] = ()
    model_max_length: int = MAX_LENGTH


@functools.cache
def packaged_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns (vocab, merges) of OpenAI CLIP: 49,408 ids and 48,894 merges. Shared: do not modify.

    The ids follow from the merges (OpenAI CLIP simple_tokenizer.py, `SimpleTokenizer.__init__`): 256 byte
    symbols, the same with `</w>`, one id per merge, BOS, EOS.
    """
    data = resources.files("clip_jax.tokenizers").joinpath("data", "clip_merges.txt.gz").read_bytes()
    _header, *lines = gzip.decompress(data).decode("utf-8").splitlines()
    merges = [(left, right) for left, right in map(str.split, lines)]
    # GPT-2's order puts the printable bytes before those it maps to U+0100 and up: the order of code points.
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        *symbols,
        *(symbol + END_OF_WORD for symbol in symbols),
        *(left + right for left, right in merges),
        BOS,
        EOS,
    ]
    return {token: index for index, token in enumerate(tokens)}, merges


def packaged_recipe(pad_token: str, model_max_length: int) -> Recipe:
    """Returns the recipe of the tokenizer that Stable Diffusion and FLUX share, but for the pad token."""
    vocab, merges = packaged_vocabulary()
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad_token}
    source = "the packaged CLIP vocabulary"
    return Recipe(source, vocab, merges, special, added={}, model_max_length=model_max_length)


def build_pipeline(recipe: Recipe) -> Tokenizer:
    """Builds the pipeline of transformers 5 (tokenization_clip.py, `CLIPTokenizer`) from a recipe.

    Text is cut at special tokens, then NFC, runs of white space to one space, lower case; then split by
    CLIP's pattern and again by GPT-2's (which `ByteLevel` applies), BPE, and BOS and EOS around it.

    Raises:
        CheckpointError: a special token is not in the vocabulary, the merges do not belong to the vocabulary,
            or an added token cannot have its declared id.
    """
    _check_special_tokens(recipe)
    try:
        bpe = models.BPE(
            vocab=recipe.vocab,
            merges=recipe.merges,
            unk_token=str(recipe.special["unk_token"]),
            continuing_subword_prefix="",
            end_of_word_suffix=END_OF_WORD,
            fuse_unk=False,
        )
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"The vocabulary and the merges of {recipe.source} do not belong together: {error}. "
            "Expected both from one CLIP tokenizer; fetch the tokenizer folder again."
        ) from error
    pipeline = Tokenizer(bpe)
    pipeline.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    pipeline.decoder = decoders.ByteLevel()
    pipeline.add_tokens(_tokens_to_add(recipe))
    for index, token in recipe.added.items():
        found = pipeline.token_to_id(token.content)
        if found != index:
            raise CheckpointError(
                f"The added token {token.content!r} of {recipe.source} is declared as id {index}, but would "
                f"become id {found}. Expected added ids to follow the {len(recipe.vocab)} of the vocabulary "
                "without a gap; correct them in the tokenizer's files."
            )
    bos, eos = (str(recipe.special[name]) for name in ("bos_token", "eos_token"))
    pipeline.post_processor = processors.RobertaProcessing(
        (eos, id_of(pipeline, eos)), (bos, id_of(pipeline, bos)), trim_offsets=False, add_prefix_space=False
    )
    return pipeline


def _check_special_tokens(recipe: Recipe) -> None:
    known = recipe.vocab.keys() | {token.content for token in recipe.added.values()}
    for name, token in recipe.special.items():
        if str(token) not in known:
            raise CheckpointError(
                f"The {name} {str(token)!r} is not in the vocabulary of {recipe.source} "
                f"({len(recipe.vocab)} tokens): its id would lie beyond the text encoder's embedding. "
                f'CLIP text encoders pad with {EOS!r} or with "!"; name a token that the vocabulary has.'
            )


def _tokens_to_add(recipe: Recipe) -> list[AddedToken]:
    """Tokens that match in the text as a whole, in transformers 5's order (`TokenizersBackend.__init__`).

    A token may be queued as text and again with flags. The later one's flags count, as with tokenizers 0.23;
    0.22 would keep the first one's.
    """
    queue: list[str | AddedToken] = [token for _, token in sorted(recipe.added.items())]
    added = {str(token) for token in queue}
    for token in (*recipe.special.values(), *recipe.extra_special):
        if str(token) not in added and token not in queue:
            queue.append(token)
    by_content = {str(token): token for token in queue}
    special = {str(token) for token in recipe.special.values()}
    return [
        AddedToken(token, special=True) if isinstance(token, str) else _with_special(token, special)
        for token in by_content.values()
    ]


def _with_special(token: AddedToken, special: set[str]) -> AddedToken:
    state = token.__getstate__()
    return AddedToken(**{**state, "special": state["special"] or state["content"] in special})
