"""Embeddings that were computed before: bounded, thread-safe, one entry for each encoded prompt.

A prompt is known by its token ids and by what else decides its rows, not by the prompts beside it: a new prompt with
a known negative is encoded alone, and equal prompts of a batch are encoded once.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.embed import Params, Skips
from clip_jax.errors import ClipJaxError
from clip_jax.params.snapshot import Snapshot
from clip_jax.structs import TextEmbeddings, Tokens, is_traced

#: How much is held where nothing else is said: about five hundred prompts of SD 1.5 with their negatives, in float32.
CACHE_BYTES = 256 * 2**20

_MAX_CHARACTERS = 2**16  # of the prompts of a call that is known by them: they are held too, and not counted
_FEW = 16  # rows, or groups of rows, that one program joins


def check_cache_bytes(cache_bytes: int) -> None:
    """Refuses what is no size of a cache.

    Raises:
        ClipJaxError: It is none.
    """
    if type(cache_bytes) is not int or cache_bytes < 0:
        raise ClipJaxError(f"cache_bytes must be an int of 0 or more, found {cache_bytes!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheStats:
    """What a cache has done, and holds.

    Attributes:
        hits: Rows that were there: prompts, negative ones and zeros in their place included.
        misses: Rows that had to be encoded; none of a mesh, or of ids on a device, where rows are not looked for.
        entries: Rows and results of whole calls that are held.
        nbytes: Bytes that they take.
        max_bytes: Bytes that they may take.
    """

    hits: int
    misses: int
    entries: int
    nbytes: int
    max_bytes: int


class EmbeddingCache:
    """The least recently used entry goes first. All methods may be called from several threads."""

    def __init__(self, max_bytes: int) -> None:
        check_cache_bytes(max_bytes)
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, tuple[TextEmbeddings, int]] = OrderedDict()
        self._nbytes = self._hits = self._misses = 0
        self._params = Snapshot({})
        self._others: list[object] = []
        self._generation = 0

    def __reduce__(self) -> tuple[type[EmbeddingCache], tuple[int]]:
        return EmbeddingCache, (self.max_bytes,)  # a copy is empty

    def renew(self, params: Params, others: Iterable[object] = ()) -> int:
        """Forgets everything unless params and others are the very objects that they were at the last call.

        Args:
            params: Of which the arrays count.
            others: What else entries depend on beside their keys: architectures, tokenizers.

        Returns:
            A number for `get` and `put`, which is another one once something has been forgotten.
        """
        others = list(others)
        with self._lock:
            same = len(others) == len(self._others) and all(map(operator.is_, others, self._others))
            if not (same and self._params.is_of(params)):
                self._forget()
                self._params, self._others = Snapshot(params), others
            return self._generation

    def get(self, key: Hashable, generation: int) -> TextEmbeddings | None:
        """What is held under `key`, and was not computed for another state: rows, or the result of a whole call."""
        with self._lock:
            found = self._entries.get(key) if generation == self._generation else None
            if found is None:
                return None
            arrays = found[0].prompt_embeds, found[0].pooled_prompt_embeds, found[0].text_ids
            if any(array is not None and array.is_deleted() for array in arrays):  # donated by who was given them
                self._nbytes -= self._entries.pop(key)[1]
                return None
            self._entries.move_to_end(key)
            self._hits += len(found[0].prompt_embeds)
            return found[0]

    def put(self, key: Hashable, value: TextEmbeddings, generation: int) -> None:
        """Holds `value`, unless it is too large, or was computed before something was forgotten."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(value))
        if size > self.max_bytes or is_traced(value):
            return
        with self._lock:
            if generation != self._generation:
                return
            self._nbytes += size - self._entries.pop(key, (value, 0))[1]
            self._entries[key] = value, size
            while self._nbytes > self.max_bytes:
                self._nbytes -= self._entries.popitem(last=False)[1][1]

    def missed(self, rows: int) -> None:
        """Counts rows that had to be encoded."""
        with self._lock:
            self._misses += rows

    def clear(self) -> None:
        """Forgets everything, and starts counting anew."""
        with self._lock:
            self._forget()
            self._hits = self._misses = 0

    def stats(self) -> CacheStats:
        """What it has done, and holds."""
        with self._lock:
            return CacheStats(
                hits=self._hits,
                misses=self._misses,
                entries=len(self._entries),
                nbytes=self._nbytes,
                max_bytes=self.max_bytes,
            )

    def _forget(self) -> None:
        self._entries.clear()
        self._nbytes = 0
        self._generation += 1


def call_key(prompts: Sequence[object], *options: Hashable) -> Hashable | None:
    """What a whole call is known by; None where it is no call that could succeed, or its prompts are very long."""
    frozen = [
        tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else given for given in prompts
    ]
    texts = itertools.chain.from_iterable(given if isinstance(given, tuple) else (given,) for given in frozen)
    if sum(len(text) for text in texts if isinstance(text, str)) > _MAX_CHARACTERS:
        return None
    try:
        hash(key := (*frozen, *_settings(), *options, *map(type, options)))  # True equals 1, but is no number of layers
    except TypeError:
        return None
    return key


def _settings() -> tuple[Hashable, ...]:
    """Those of JAX that decide what is computed, and where."""
    config, mesh = jax.config, jax.sharding.get_abstract_mesh()
    return (
        config.jax_default_matmul_precision,
        config.jax_default_device,
        mesh,
        None if mesh.empty else _devices_of_mesh(),
    )


def _devices_of_mesh() -> Hashable:
    """The mesh of `jax.set_mesh`, with its devices: two of the same axes may be of others."""
    try:
        return jax.sharding.get_mesh()
    except ValueError:  # within a transformation it is not told: such rows are never found again
        return object()


def on_host(tokens: Tokens) -> bool:
    """Whether rows can be looked up: these are ids of numpy."""
    return all(isinstance(ids, np.ndarray) for ids in jax.tree.leaves(tokens))


def encode_cached(
    cache: EmbeddingCache,
    generation: int,
    tokens: Tokens,
    skips: Skips,
    run: Callable[[Tokens, Skips], TextEmbeddings],
) -> TextEmbeddings:
    """What `run(tokens, skips)` returns, of which only rows that are not held are computed, each once.

    If none is, and no two are equal, `run` is called once for all and its result returned as it is.

    Args:
        cache: Where rows are looked up, and put.
        generation: What `renew` has returned.
        tokens: Ids on the host, [B, L] for every tower.
        skips: Part of what a row is known by.
        run: Encodes ids; negative prompts and prompts, or prompts alone.
    """
    sides = [(skips[0], tokens.uncond), (skips[1], tokens.cond)]
    keys = [_keys(skip, side, tokens) for skip, side in sides if side is not None]
    order = [key for side in keys for key in side]
    rows = {key: found for key in dict.fromkeys(order) if (found := cache.get(key, generation)) is not None}
    missing = [list(dict.fromkeys(key for key in side if key not in rows)) for side in keys]
    negative = set(missing[0])
    missing[1:] = [[key for key in side if key not in negative] for side in missing[1:]]
    cache.missed(sum(map(len, missing)))
    whole = sum(map(len, missing)) == len(order)
    if whole:
        out = run(tokens, skips)
        encoded = out.cond if tokens.zero_uncond else out
        rows = dict(zip(order, _split(encoded), strict=True))
    for wanted in _batches(missing) if not whole else []:
        part, part_skips = _part(tokens, skips, keys, wanted)
        rows |= dict(zip((key for side in wanted for key in side), _split(run(part, part_skips)), strict=True))
    for side in missing:
        for key in side:
            cache.put(key, rows[key], generation)
    if whole:
        return out
    return _joined([rows[key] for key in order], zeros=tokens.zero_uncond, guidance=tokens.zero_uncond or len(keys) > 1)


def parts(tokens: Tokens, skips: Skips) -> list[tuple[Tokens, Skips]]:
    """What `encode_cached` may run for such ids: all, the prompts alone, or a negative that all of them have."""
    if tokens.uncond is None:
        return [(tokens, skips)]
    prompts = dataclasses.replace(tokens, uncond=None)
    negative = jax.tree.map(lambda ids: ids[:1], prompts)
    both = [(tokens, skips), (prompts, skips)]
    batch = len(jax.tree.leaves(prompts)[0])
    return both if batch == 1 else [*both, (negative, (None, skips[0]))]


def prepare(embeddings: TextEmbeddings, *, zeros: bool) -> None:
    """Compiles what takes rows out of such a result, and joins as many again; `zeros`: its unconditional ones are."""
    rows = _split(embeddings.cond if zeros else embeddings)
    jax.block_until_ready(_joined(rows, zeros=zeros, guidance=embeddings.guidance))


def _keys(skip: int | None, side: dict[str, np.ndarray | jax.Array], tokens: Tokens) -> list[Hashable]:
    """What each row of ids is known by."""
    towers = [np.ascontiguousarray(ids, np.int64) for _, ids in sorted(side.items())]
    known = (skip, tokens.max_sequence_length, *_settings())
    return [(*known, *(ids[row].tobytes() for ids in towers)) for row in range(len(towers[0]))]


def _batches(missing: Sequence[list[Hashable]]) -> list[list[list[Hashable]]]:
    """Which rows to encode together, by side: as many negative prompts as prompts fill one program."""
    if len(missing) == 2 and len(missing[0]) == len(missing[1]) > 0:
        return [list(missing)]
    empty: list[list[list[Hashable]]] = [[[] for _ in missing] for _ in missing]
    for number, side in enumerate(missing):
        empty[number][number] = side
    return [batch for batch in empty if any(batch)]


def _part(
    tokens: Tokens, skips: Skips, keys: Sequence[list[Hashable]], wanted: Sequence[list[Hashable]]
) -> tuple[Tokens, Skips]:
    """The ids of the wanted rows of each side; those of one side alone are prompts, whichever side it is."""
    ids = [side for side in (tokens.uncond, tokens.cond) if side is not None]
    places = [{key: row for row, key in enumerate(known)} for known in keys]
    parts = [
        (skip, {tower: np.asarray(rows)[[place[key] for key in some]] for tower, rows in side.items()})
        for skip, side, place, some in zip(skips[-len(ids) :], ids, places, wanted, strict=True)
        if some
    ]
    *uncond, (skip, cond) = parts
    part = dataclasses.replace(tokens, cond=cond, uncond=uncond[0][1] if uncond else None, zero_uncond=False)
    return part, (uncond[0][0] if uncond else None, skip)


def _split(embeddings: TextEmbeddings) -> list[TextEmbeddings]:
    """One result for each row, each [1, L, D]."""
    return [_row(embeddings, np.int32(row)) for row in range(len(embeddings.prompt_embeds))]


@jax.jit
def _row(embeddings: TextEmbeddings, row: jax.Array) -> TextEmbeddings:
    pooled = embeddings.pooled_prompt_embeds
    return TextEmbeddings(
        prompt_embeds=jax.lax.dynamic_slice_in_dim(embeddings.prompt_embeds, row, 1),
        pooled_prompt_embeds=None if pooled is None else jax.lax.dynamic_slice_in_dim(pooled, row, 1),
        text_ids=embeddings.text_ids,
        guidance=False,
    )


def _joined(rows: Sequence[TextEmbeddings], *, zeros: bool, guidance: bool) -> TextEmbeddings:
    """Rows one after the other, after as many rows of zeros if there are to be such."""
    # A few at a time: each number of rows is another program, and one that joins hundreds takes seconds to compile.
    while len(rows) > 1:
        rows = [_concatenated(rows[start : start + _FEW]) for start in range(0, len(rows), _FEW)]
    (whole,) = rows
    return dataclasses.replace(_after_zeros(whole) if zeros else whole, guidance=guidance)


@jax.jit
def _concatenated(parts: Sequence[TextEmbeddings]) -> TextEmbeddings:
    pooled = [part.pooled_prompt_embeds for part in parts if part.pooled_prompt_embeds is not None]
    return TextEmbeddings(
        prompt_embeds=jnp.concatenate([part.prompt_embeds for part in parts]),
        pooled_prompt_embeds=jnp.concatenate(pooled) if pooled else None,
        text_ids=parts[0].text_ids,
        guidance=False,
    )


@jax.jit
def _after_zeros(rows: TextEmbeddings) -> TextEmbeddings:
    return _concatenated([jax.tree.map(jnp.zeros_like, rows), rows])
