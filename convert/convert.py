"""`convert`: a foreign checkpoint in, one of this package out, block by block."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import jax.typing

from clip_jax.convert.detect import folders_of
from clip_jax.convert.foreign import open_foreign
from clip_jax.convert.resolve import resolve
from clip_jax.errors import CheckpointError
from clip_jax.params.cast import float_dtype
from clip_jax.params.checkpoint import CheckpointMetadata, is_checkpoint, write_checkpoint
from clip_jax.params.staging import check_free
from clip_jax.progress import byte_bar
from clip_jax.tokenizers import check_vocabulary


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    family: str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    without: str | Iterable[str] = (),
    overwrite: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: bool | None = None,
) -> Path:
    """Converts a checkpoint to an Orbax folder that `clip_jax.load` reads, with its tokenizers.

    The weights go through memory a block of the model, or its embedding, at a time.

    Args:
        source: A diffusers folder, a text encoder's folder, or a Hub repo id.
        out: The folder to make. It appears whole or not at all.
        family: The family, where it cannot be told from the source.
        dtype: Of the stored params; None keeps those of the source.
        without: Towers to leave out, such as "t5" of SD 3.
        overwrite: Whether a checkpoint already at `out` may be replaced.
        revision: Branch, tag or commit of a Hub repo.
        local_files_only: Takes a Hub repo from the local cache, without asking the network.
        progress: Whether to show progress bars; None means on a terminal.

    Returns:
        `out`, absolute.

    Raises:
        CheckpointError: The source cannot be read whole, or `out` exists. What is on disk stays as it is.
    """
    if os.fspath(source).startswith("random:"):
        raise CheckpointError(f"{source} has nothing to convert; `clip_jax.load({source!r}).save(...)` writes it.")
    out = Path(os.path.abspath(out))
    check_free(out, overwrite)  # before the work, not after it
    without = {without} if isinstance(without, str) else set(without)
    found = resolve(
        source,
        revision=revision,
        local_files_only=local_files_only,
        skip=folders_of(without),
        progress=progress,
    )
    if is_checkpoint(found.path):
        raise CheckpointError(f"{found.path} is an Orbax folder; expected a checkpoint in a foreign layout.")
    checkpoint = open_foreign(found.path, family=family, without=without)
    tokenizers = {tower.name: checkpoint.tokenizer(tower.name) for tower in checkpoint.family.towers}
    for tower in checkpoint.family.towers:
        check_vocabulary(tokenizers[tower.name], tower.config, tower.name)
    provenance = {**checkpoint.provenance(), "source": found.name}
    files = [file for tower in checkpoint.towers.values() for file in tower.source.files]
    with byte_bar(sum(file.stat().st_size for file in files), "Hashing", progress) as bar:
        for name, opened in checkpoint.towers.items():
            provenance["towers"][name]["sha256"] = opened.source.sha256(bar.update)
    with byte_bar(checkpoint.nbytes, "Converting", progress) as bar:
        write_checkpoint(
            out,
            checkpoint.parts(None if dtype is None else float_dtype(dtype), bar.update),
            metadata=CheckpointMetadata(
                family=checkpoint.family.name,
                configs={name: tower.config for name, tower in checkpoint.towers.items()},
                provenance=provenance,
                zero_negative=checkpoint.family.zero_negative,
            ),
            tokenizers=tokenizers,
            overwrite=overwrite,
        )
    return out
