"""`load_exported`: a folder of `TextEncoder.export` -> an encoder that runs the programs in it."""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np

from clip_jax.cache import CACHE_BYTES
from clip_jax.embed import Params, Skips
from clip_jax.encoder import TextEncoder
from clip_jax.errors import CheckpointError, ClipJaxError
from clip_jax.families import stored_family
from clip_jax.frozen import check_freezable, is_kernel
from clip_jax.models import intercepted
from clip_jax.params import checkpoint as ckpt
from clip_jax.params.staging import identity, unreplaced
from clip_jax.program import Programs, read_programs
from clip_jax.structs import TextEmbeddings, Tokens
from clip_jax.tokenizers import read_tokenizer
from clip_jax.tokenizers.files import expanded


class ExportedTextEncoder(TextEncoder):
    """A `TextEncoder` whose computation was exported; other layers and lengths than those of then are errors.

    T5's length is that of then by default, and so is `family.max_sequence_length`; `clip_skip` and `clip_skip_negative`
    have to be passed in each call.

    Attributes:
        programs: The computation.
    """

    programs: Programs

    _exported = True

    def _freeze(self, params: Params, dtype: np.dtype, tokens: Tokens, skips: Skips) -> None:
        check_freezable(params, dtype)
        kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if is_kernel(path)]
        if kept := {kernel.dtype.name for kernel in kernels} - {dtype.name}:  # to which they would be cast
            raise ClipJaxError(
                f"Exported programs are frozen where kernels have the dtype of the computation, {dtype.name}; found "
                f"{', '.join(sorted(kept))}. Leave it out, or load the folder with `clip_jax.load`."
            )
        super()._freeze(params, dtype, tokens, skips)

    def _compute(self, params: Params, dtype: np.dtype, tokens: Tokens, skips: Skips) -> TextEmbeddings:
        if intercepted():
            raise ClipJaxError(
                "Exported programs take no notice of nn.intercept_methods, and a LoRA would be lost: load the folder "
                "with `clip_jax.load`."
            )
        if dtype.name != self.programs.dtype:
            raise ClipJaxError(
                f"The programs were exported for {self.programs.dtype}, found {dtype.name}. Export again, or load "
                f"the folder with `clip_jax.load`."
            )
        exported = self.family.max_sequence_length
        length = tokens.max_sequence_length or exported
        if length != exported:
            raise ClipJaxError(
                f"The programs were exported for max_sequence_length={exported}, found {length}. Leave it out, or "
                f"export again."
            )
        (negative, positive), wanted = (tuple(skip or 0 for skip in pair) for pair in (self.programs.skips, skips))
        if wanted[1] == positive and (tokens.uncond is None or wanted[0] == negative):
            return self.programs(params, tokens)
        if tokens.uncond is None and wanted[1] == negative and not tokens.zero_uncond:
            # Negative prompts whose prompts are in the cache: only the program for both takes that layer.
            out = self.programs(params, dataclasses.replace(tokens, uncond=tokens.cond)).uncond
            assert out is not None
            return out
        raise ClipJaxError(
            f"The programs were exported for clip_skip={positive} and clip_skip_negative={negative}, found "
            f"{wanted[1]} and {wanted[0]}. Pass those, export again, or load the folder with `clip_jax.load`."
        )


def load_exported(
    path: str | os.PathLike[str], *, cache_bytes: int = CACHE_BYTES, progress: bool | None = None
) -> ExportedTextEncoder:
    """Loads a folder that `TextEncoder.export` wrote: params, tokenizers and compiled-for-anywhere programs.

    Nothing is traced, and no module of this package is run; XLA compiles the programs for the device at the first
    call, or takes them from its cache (`enable_compilation_cache`).

    Example:
        >>> clip_jax.load("random:sd15", dtype="bfloat16").export("exported")
        >>> clip_jax.load_exported("exported")("a cat").prompt_embeds.shape
        (2, 77, 768)

    Args:
        path: The folder.
        cache_bytes: How much memory embeddings of earlier prompts may take; 0 is no cache.
        progress: Whether to show progress bars; None means on a terminal.

    Raises:
        CheckpointError: Not such a folder, not whole, or not made for the platform of this process.
    """
    folder = expanded(path)
    if not ckpt.is_checkpoint(folder):
        raise CheckpointError(f"{folder} is not a folder written by `TextEncoder.export`.")
    before = identity(folder)
    metadata, programs = ckpt.read_metadata(folder), read_programs(folder)
    platform = jax.default_backend()
    names: tuple[str, ...] = {"gpu": ("cuda", "rocm")}.get(platform, (platform,))
    if not set(names) & set(programs.both.platforms):
        raise CheckpointError(
            f"{folder} was exported for {', '.join(programs.both.platforms)}, this process runs on {platform}. Export "
            f"it with {' or '.join(f'platforms={name!r}' for name in names)}."
        )
    configs = metadata.configs
    with unreplaced(folder, before):
        tokenizers = {t: read_tokenizer(config, ckpt.tokenizer_folder(folder, t)) for t, config in configs.items()}
        specs = ckpt.stored_specs(folder)
        params = ckpt.read_params(folder, specs, None, scheme=metadata.scheme, progress=progress)
    family = stored_family(metadata, folder)
    length = programs.lengths.get("t5", programs.max_sequence_length) or family.max_sequence_length
    encoder = ExportedTextEncoder(
        dataclasses.replace(family, max_sequence_length=length),
        params,
        tokenizers,
        dtype=programs.dtype,
        provenance=metadata.provenance,
        cache_bytes=cache_bytes,
    )
    encoder.programs = programs
    return encoder
