"""`TextEncoder`: prompts in, embeddings out. Tokenises on the host, then runs the one compiled program."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from clip_jax.buckets import batch_of, checked_sizes, cut_rows, of_every_length, padded, without_tails
from clip_jax.cache import CACHE_BYTES, EmbeddingCache, call_key, encode_cached, on_host, parts, prepare
from clip_jax.config import TowerConfig
from clip_jax.embed import Params, Skips, check_finite, check_tokens, embed, layers_taken, skips_of
from clip_jax.errors import ClipJaxError
from clip_jax.families import Family
from clip_jax.frozen import FREEZING, FrozenPrograms
from clip_jax.handover import Handover, pays, renewed
from clip_jax.models import Attention, intercepted
from clip_jax.params.cast import float_dtype
from clip_jax.params.checkpoint import CheckpointMetadata, write_checkpoint
from clip_jax.params.quantize import scheme_of, stored_parts
from clip_jax.params.shard import auto_axes, is_on, placed
from clip_jax.params.snapshot import settled
from clip_jax.params.staging import path_of
from clip_jax.program import PLATFORMS, export_programs
from clip_jax.structs import TextEmbeddings, Tokens, is_traced
from clip_jax.tokenize import tokenize
from clip_jax.tokenizers import Overflow, RowTokenizer


class TextEncoder:
    """The text side of a diffusion pipeline. Made by `clip_jax.load`.

    Example:
        >>> encoder = clip_jax.load("random:sd15")
        >>> out = encoder("a cat sitting on a windowsill", negative_prompt="blurry, low quality")
        >>> out.prompt_embeds.shape
        (2, 77, 768)

    Attributes:
        family: What the embeddings are made for, around the checkpoint's architectures.
        params: Plain nested dict with one entry per tower; quantised leaves are `qwix.QArray`s.
        tokenizers: Tower name -> tokenizer.
        dtype: Of the computation and of the embeddings.
        provenance: Where the weights come from. JSON.
        attention: "xla" or "cudnn", as `text_embeddings` takes it.
        batch_sharding: Where rows of token ids go if their number divides by the devices; None leaves that to jit.
        cache: Embeddings of prompts that were encoded before; None if there is none.
    """

    _exported = False  # what was exported takes ids of one length, and params as they are

    def __init__(
        self,
        family: Family,
        params: Params,
        tokenizers: Mapping[str, RowTokenizer],
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        provenance: dict[str, Any] | None = None,
        batch_sharding: jax.sharding.NamedSharding | None = None,
        cache_bytes: int = CACHE_BYTES,
        attention: Attention = "xla",
    ) -> None:
        self.family = family
        self.tokenizers = dict(tokenizers)
        self._dtype = float_dtype(dtype)
        self.attention = attention
        self.provenance = provenance or {}
        self.batch_sharding = batch_sharding
        self.cache = EmbeddingCache(cache_bytes) if cache_bytes else None
        self._frozen: FrozenPrograms | None = None
        self._handover: Handover | None = None
        self.params = params

    @property
    def params(self) -> Params:
        """Plain nested dict with one entry per tower. Others may be set; NumPy's arrays are copied to a device then."""
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        self._params = params = settled(params)
        self._handover, self._packs = None, not self._exported and pays(params)
        state = self._state(params, self.dtype)  # lets go of frozen programs
        if self.cache is not None:  # at once, for it would hold the old ones until the next call
            self.cache.renew(params, state)

    @property
    def dtype(self) -> np.dtype:
        """Of the computation and of the embeddings. Another may be set, as a name too."""
        return self._dtype

    @dtype.setter
    def dtype(self, dtype: jax.typing.DTypeLike) -> None:
        self._dtype = float_dtype(dtype)
        self.params = self._params  # renews what depends on it at once: a call may be running

    def __copy__(self) -> Self:
        copied = object.__new__(type(self))
        cache = self.cache and EmbeddingCache(self.cache.max_bytes)  # shared, each would forget what the other knows
        copied.__dict__ |= {**self.__dict__, "cache": cache, "_frozen": None, "_handover": None}
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__copy__().__dict__, "batch_sharding": None}  # pickled arrays arrive on one device

    @property
    def config(self) -> dict[str, TowerConfig]:
        """Tower name -> architecture."""
        return {tower.name: tower.config for tower in self.family.towers}

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        negative_prompt_3: str | Sequence[str] | None = None,
        guidance: bool | None = None,
        clip_skip: int | None = None,
        clip_skip_negative: int | None = None,
        max_sequence_length: int | None = None,
        overflow: Overflow = "error",
    ) -> TextEmbeddings:
        """Encodes a prompt, or a list of B, with its negatives.

        Args:
            prompt: One prompt or a list. "" is a prompt like any other.
            negative_prompt: One for all prompts, or a list with one each. None is "", or zeros where the family
                has it so (`Family.zero_negative`). Ignored without guidance, as in diffusers.
            prompt_2: For the second tower (SDXL, SD 3: bigG; FLUX: T5); None and "" stand for `prompt`.
            prompt_3: For the third tower (SD 3: T5); None and "" stand for `prompt`.
            negative_prompt_2: As `prompt_2`, for `negative_prompt`. Alone it does not keep SDXL from zeros: that
                goes by `negative_prompt`, as in diffusers.
            negative_prompt_3: As `prompt_3`, for `negative_prompt`.
            guidance: Whether the unconditional rows come first; None means the family's default.
            clip_skip: Layers to leave out at the end, for the prompts; 1 is one before the family's, as in diffusers.
            clip_skip_negative: The same for the negatives, which diffusers never skips.
            max_sequence_length: L of T5, at most 512; None means the family's default.
            overflow: What to do with a prompt that does not fit: "error", or "truncate", which warns with the
                text it cuts off.

        Returns:
            `prompt_embeds` [2B, L, D], unconditional rows first, or [B, L, D] without guidance; and what else
            the family has.

        Raises:
            PromptTooLongError: A prompt does not fit; tells what does not.
            ClipJaxError: Not a str, lists of different lengths, arguments that the family does not take, or
                float16 overflowed.
        """
        call, cache = None, self.cache  # once: another thread may exchange it meanwhile
        if cache is not None and overflow == "error" and not intercepted():
            # The same call as before: no tokens are needed to know what it returns.
            prompts = (prompt, negative_prompt, prompt_2, prompt_3, negative_prompt_2, negative_prompt_3)
            call = call_key(prompts, guidance, clip_skip, clip_skip_negative, max_sequence_length)
            params = self.params
            generation = cache.renew(params, self._state(params, self.dtype))
            if call is not None and (found := cache.get(call, generation)) is not None:
                return found
        tokens = self.tokenize(
            prompt,
            negative_prompt,
            prompt_2=prompt_2,
            prompt_3=prompt_3,
            negative_prompt_2=negative_prompt_2,
            negative_prompt_3=negative_prompt_3,
            guidance=guidance,
            max_sequence_length=max_sequence_length,
            overflow=overflow,
        )
        out = self.encode(tokens, clip_skip=clip_skip, clip_skip_negative=clip_skip_negative)
        if cache is not None and call is not None:
            cache.put(call, out, generation)
        return out

    def tokenize(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        negative_prompt_3: str | Sequence[str] | None = None,
        guidance: bool | None = None,
        max_sequence_length: int | None = None,
        overflow: Overflow = "error",
    ) -> Tokens:
        """Turns prompts into token ids, on the host: int32 [B, L] per tower. Arguments as in `__call__`."""
        return tokenize(
            self.family,
            self.tokenizers,
            (prompt, prompt_2, prompt_3),
            (negative_prompt, negative_prompt_2, negative_prompt_3),
            guidance=guidance,
            max_sequence_length=max_sequence_length,
            overflow=overflow,
        )

    @jax.transfer_guard_host_to_device("allow")  # ids come from there
    def encode(
        self,
        tokens: Tokens,
        *,
        clip_skip: int | None = None,
        clip_skip_negative: int | None = None,
    ) -> TextEmbeddings:
        """Runs the compiled program over token ids, less those whose rows are in the cache.

        The batch is padded to one of a few sizes, so that another number of prompts seldom means another
        compilation; rows of the padding are cut off again. Ids of a tower of which only the pooled row is used
        are cut after the end of the text, at one of a few lengths: attention is causal, so that the row stays
        the same. Ids on a device are not looked up in the cache, nor is any row where a mesh holds the params.

        Raises:
            ClipJaxError: Ids that the family does not take, no such layer to skip to, or float16 overflowed.
        """
        check_tokens(self.family, tokens)
        for tower in self.family.towers:  # also where nothing is to be computed
            layers_taken(self.family, tower, clip_skip_negative, clip_skip)
        skips = skips_of(tokens, (clip_skip_negative, clip_skip))
        params, dtype, cache = self.params, self.dtype, self.cache  # once: another thread may exchange them meanwhile
        run = functools.partial(self._run, params, dtype)
        if cache is None or self.batch_sharding is not None or intercepted() or not on_host(tokens):
            return run(tokens, skips)
        return encode_cached(cache, cache.renew(params, self._state(params, dtype)), tokens, skips, run)

    @jax.transfer_guard_host_to_device("allow")
    def warmup(
        self,
        batch_sizes: Iterable[int] = (1,),
        *,
        negative_prompt: str | None = None,
        guidance: bool | None = None,
        max_sequence_length: int | None = None,
        clip_skip: int | None = None,
        clip_skip_negative: int | None = None,
        freeze: bool = False,
    ) -> None:
        """Compiles, and runs once, the programs that calls with so many prompts need; the first of them is fast then.

        With guidance and a cache these are one for new prompts with new negatives, one for prompts whose negatives are
        known, and for several prompts one for a negative that all have (on a mesh the first alone); of FLUX each for
        all lengths of CLIP-L's ids. Where a few of several prompts are known, the others make a smaller batch: give its
        size as well.
        They are kept on disk where a compilation cache is on (`clip_jax.enable_compilation_cache`), but frozen ones.

        Frozen programs have the kernels in them, packed for products by oneDNN: faster on a CPU. Each keeps the kernels
        packed and as they were, and takes more memory than that while it is compiled. They serve calls that need them
        until `params` or `dtype` are exchanged; other calls go as before, and so does `text_embeddings`.

        Args:
            batch_sizes: Numbers of prompts.
            negative_prompt: As in a call: with None, families whose negatives are zeros then encode none (SDXL).
            guidance: As in a call, and so are the other options.
            max_sequence_length: L of T5.
            clip_skip: Layers to leave out for the prompts.
            clip_skip_negative: Layers to leave out for the negatives.
            freeze: Whether to compile the kernels in; float32 and bfloat16, on an x86-64 CPU, with jax 0.11 or newer.

        Raises:
            ClipJaxError: Not numbers of prompts, options that the family does not take, or nothing that can be frozen.
        """
        if freeze and intercepted():
            raise ClipJaxError("freeze is not for nn.intercept_methods: change the params instead, and freeze those.")
        params, dtype, skips = self.params, self.dtype, (clip_skip_negative, clip_skip)
        by_rows = self.cache is not None and self.batch_sharding is None  # as in `encode`
        for size in checked_sizes(batch_sizes):
            tokens = self.tokenize(
                [""] * size, negative_prompt, guidance=guidance, max_sequence_length=max_sequence_length
            )
            for part, part_skips in parts(tokens, skips) if by_rows else [(tokens, skips)]:
                if freeze:
                    self._freeze(params, dtype, part, part_skips)
                for ids in of_every_length(part, self.family) if not (self._exported or freeze) else [part]:
                    out = jax.block_until_ready(self._run(params, dtype, ids, part_skips))
                if by_rows:
                    prepare(out, zeros=tokens.zero_uncond)

    def _freeze(self, params: Params, dtype: np.dtype, tokens: Tokens, skips: Skips) -> None:
        tokens, skips = padded(tokens), skips_of(tokens, skips)
        with FREEZING:
            programs = self._frozen_programs(params, dtype) or FrozenPrograms(params, self.family, dtype)
            programs.add(lambda params, tokens: self._compute(params, dtype, tokens, skips), tokens, skips, dtype)
            self._frozen = programs

    def _frozen_programs(self, params: Params, dtype: np.dtype) -> FrozenPrograms | None:
        """Those with these params in them; others are let go of, unless they are newer than the call that asks."""
        programs = self._frozen
        if programs is None or programs.are_of(params, self.family, dtype):
            return programs
        self._frozen = None if params is self._params and dtype == self._dtype else programs
        return None

    def _run(self, params: Params, dtype: np.dtype, tokens: Tokens, skips: Skips) -> TextEmbeddings:
        """Encodes ids, in a bucket of batches; within a `jit` as they are."""
        skips = skips_of(tokens, skips)
        if is_traced(tokens):
            return self._compute(params, dtype, tokens, skips)
        batch, tokens = batch_of(tokens), padded(tokens)
        frozen = None if intercepted() or jax.config.jax_disable_jit else self._frozen_programs(params, dtype)
        with auto_axes(self.batch_sharding):
            if program := frozen and frozen.find(tokens, skips):  # with the tails: one for texts of any length
                out = program(tokens)
            else:
                ids = tokens if self._exported else without_tails(tokens, self.family)
                rows, packed = self.batch_sharding, self._handover_of(params, dtype)
                out = packed(ids, skips) if packed else self._compute(params, dtype, placed(ids, params, rows), skips)
            if batch_of(tokens) != batch:
                out = cut_rows(out, batch)
            if dtype == jnp.float16 and not is_traced(out):  # within a `jit` there is nothing to look at
                check_finite(out)
        return out

    def _handover_of(self, params: Params, dtype: np.dtype) -> Handover | None:
        """How params reach the program, where that is not as they are."""
        if not self._packs or self.batch_sharding is not None or intercepted() or jax.config.jax_disable_jit:
            return None
        self._handover = handover = renewed(self._handover, params, self.family, dtype, self.attention)
        return handover

    def _compute(self, params: Params, dtype: np.dtype, tokens: Tokens, skips: Skips) -> TextEmbeddings:
        return embed(params, tokens, self.family, dtype, skips, self.attention)

    def _state(self, params: Params, dtype: np.dtype) -> list[object]:
        """What embeddings depend on beside params, prompts and options."""
        frozen = self._frozen_programs(params, dtype)
        programs = frozen.programs if frozen else ()
        return [*self.tokenizers, *self.tokenizers.values(), self.family, dtype, self.attention, *programs]

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes params, architectures and tokenizers to a folder that `clip_jax.load` reads, quantised if they are.

        Raises:
            CheckpointError: The folder exists or cannot be written, or the params are not those of the architecture.
            ClipJaxError: The params are quantised in part.
        """
        self._save(path, overwrite)

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        max_sequence_length: int | None = None,
        clip_skip: int | None = None,
        clip_skip_negative: int | None = None,
        platforms: str | Sequence[str] = PLATFORMS,
        overwrite: bool = False,
    ) -> None:
        """Writes what `save` does, and beside it the computation as StableHLO, for `clip_jax.load_exported`.

        Programs are made by `jax.export`, one for prompts with negatives and one for prompts alone, for any number of
        them, with XLA's attention. They run without the modules of this package, in this version of JAX and, for half a
        year at least, in later ones (JAX' promise of compatibility). `clip_jax.load` reads the folder too.

        Args:
            path: The folder to make.
            max_sequence_length: L of T5, which is fixed; None means the family's default.
            clip_skip: Layers to leave out for the prompts; fixed, and to be passed in each call.
            clip_skip_negative: The same for the negatives.
            platforms: Where the programs are to run.
            overwrite: Whether a checkpoint that is there may be replaced.

        Raises:
            CheckpointError: The folder exists.
            ClipJaxError: Options that the family does not take, an unknown platform, interceptors, or params on a mesh.
        """
        if self.batch_sharding is not None and is_on(self.params, self.batch_sharding.mesh):
            raise ClipJaxError("Params on a mesh are not exported: programs would be made for it. Load without mesh=.")
        skips = (clip_skip_negative, clip_skip)
        example = self.tokenize("", guidance=True, max_sequence_length=max_sequence_length)
        programs = export_programs(self.params, example, self.family, self.dtype, skips, platforms)
        self._save(path, overwrite, extra=programs.write)

    def _save(self, path: str | os.PathLike[str], overwrite: bool, extra: Callable[[Path], None] | None = None) -> None:
        scheme = scheme_of(self.params)
        write_checkpoint(
            path_of(path),
            stored_parts(self.params, self.config, scheme),
            metadata=CheckpointMetadata(
                family=self.family.name,
                configs=self.config,
                provenance=self.provenance,
                zero_negative=self.family.zero_negative,
                scheme=scheme,
            ),
            tokenizers=self.tokenizers,
            extra=extra,
            overwrite=overwrite,
        )
