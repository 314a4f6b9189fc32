"""`convert`: a foreign checkpoint in, one of this package out, block by block."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.typing

from clip_jax.convert.components import ConfigLike, read_configs
from clip_jax.convert.detect import folders_of
from clip_jax.convert.foreign import ForeignCheckpoint, open_foreign
from clip_jax.convert.hub import Access
from clip_jax.convert.layouts import Projection
from clip_jax.convert.resolve import SourceLike, resolve_all
from clip_jax.convert.source import sha256
from clip_jax.convert.verify import verify_tower
from clip_jax.errors import CheckpointError, ClipJaxError
from clip_jax.params.cast import float_dtype
from clip_jax.params.checkpoint import (
    CheckpointMetadata,
    is_checkpoint,
    read_params,
    read_specs,
    write_checkpoint,
)
from clip_jax.params.quantize import PLAIN, scheme_called
from clip_jax.params.staging import check_apart, check_free, path_of
from clip_jax.progress import byte_bar
from clip_jax.tokenizers import RowTokenizer, choose_tokenizers


def convert(
    source: SourceLike,
    out: str | os.PathLike[str],
    *,
    family: str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    without: str | Iterable[str] = (),
    config: Mapping[str, ConfigLike] | None = None,
    text_projection: Projection = "auto",
    tokenizer: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    quantize: str | None = None,
    verify: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Path:
    """Converts a checkpoint to an Orbax folder that `clip_jax.load` reads, with its tokenizers.

    The weights go through memory a block of the model, or its embedding, at a time.

    Args:
        source: A diffusers folder, a text encoder's folder, a file of weights, a Hub repo id, or a list of files and
            text encoders' folders that make up a family.
        out: The folder to make. It appears whole or not at all.
        family: The family, where it cannot be told from the source.
        dtype: Of the stored params; None keeps those of the source, and is bfloat16 where it is quantised (fp8, GGUF).
        without: Towers to leave out, such as "t5" of SD 3.
        config: Tower name -> architecture, where a file of weights does not tell (a config, a dict, or the path of
            a `config.json`); goes before the `config.json` beside a file that is named as the source. A folder with
            such a file is read by that.
        text_projection: "auto" takes `text_projection` for what its name says; "as_is" takes it as [D, P], used as
            `x @ text_projection`, "transpose" as [P, D].
        tokenizer: A tokenizer folder to take instead of the source's, or tower name -> folder. A file of T5 needs
            it unless there is a tokenizer beside it, or in it (GGUF).
        quantize: "int8", "fp8" or "int4": writes quantised params (`clip_jax.load` tells what they are).
        verify: Whether to compare what the source computes with what the new checkpoint does (`verify.py`). The
            largest error goes into the metadata.
        overwrite: Whether a checkpoint already at `out` may be replaced.
        revision: Branch, tag or commit of a Hub repo.
        local_files_only: Takes a Hub repo from the local cache, without asking the network.
        token: Of the Hub, for gated and private repos; None is that of `hf auth login` or `HF_TOKEN`.
        cache_dir: Where downloads are kept; None is the place of `huggingface_hub`.
        progress: Whether to show progress bars; None means on a terminal.

    Returns:
        `out`, absolute.

    Raises:
        CheckpointError: The source cannot be read whole, or `out` exists. What is on disk stays as it is.
        ClipJaxError: Another `quantize`, or `verify` with it.
    """
    scheme = scheme_called(quantize)
    if verify and scheme is not PLAIN:
        raise ClipJaxError(
            f"verify does not go with quantize: it takes for an error what float32 does not explain, and {quantize} "
            f"rounds more by design. Verify a conversion without quantize: its weights are read the same way."
        )
    if isinstance(source, str) and source.startswith("random:"):
        raise CheckpointError(f"{source} has nothing to convert; `clip_jax.load({source!r}).save(...)` writes it.")
    out = path_of(out)
    check_free(out, overwrite)  # before the work, not after it
    without = {without} if isinstance(without, str) else set(without)
    access = Access(
        revision=revision,
        local_files_only=local_files_only,
        token=token,
        cache_dir=cache_dir,
        skip=folders_of(without),
    )
    found = resolve_all(source, access, progress=progress)
    check_apart(out, [one.path for one in found])
    for one in found:
        if is_checkpoint(one.path):
            raise CheckpointError(f"{one.path} is an Orbax folder; expected a checkpoint in a foreign layout.")
    checkpoint = open_foreign(
        [one.path for one in found],
        family=family,
        without=without,
        configs=read_configs(config or {}),
        text_projection=text_projection,
    )
    files = [file for source in checkpoint.sources for file in source.files]
    check_apart(out, files)
    before = {file: _stamp(file) for file in files}
    configs = {name: tower.config for name, tower in checkpoint.towers.items()}
    tokenizers = choose_tokenizers(configs, checkpoint.tokenizer, tokenizer)
    hashes = _hash(files, progress)
    provenance = {**checkpoint.provenance(), "source": ", ".join(one.name for one in found)}
    for name, tower in checkpoint.towers.items():
        provenance["towers"][name]["sha256"] = {file.name: hashes[file] for file in tower.source.files}

    def check(folder: Path) -> dict[str, Any]:
        if changed := [str(file) for file in files if _stamp(file) != before[file]]:
            raise CheckpointError(f"{', '.join(changed)} changed while it was converted. Try again.")
        return _verify(folder, checkpoint, tokenizers) if verify else {}

    with byte_bar(checkpoint.nbytes, "Converting", progress) as bar:
        write_checkpoint(
            out,
            checkpoint.parts(None if dtype is None else float_dtype(dtype), bar.update, scheme),
            metadata=CheckpointMetadata(
                family=checkpoint.family.name,
                configs=configs,
                provenance=provenance,
                zero_negative=checkpoint.family.zero_negative,
                scheme=scheme,
            ),
            tokenizers=tokenizers,
            overwrite=overwrite,
            check=check,
        )
    return out


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What a file has another of once it is written anew; None where it is gone."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _verify(folder: Path, checkpoint: ForeignCheckpoint, tokenizers: Mapping[str, RowTokenizer]) -> dict[str, Any]:
    """Holds what was written to `folder` against its source, a tower at a time."""
    specs = read_specs(folder, {name: tower.config for name, tower in checkpoint.towers.items()})
    verified = {}
    for name, tower in checkpoint.towers.items():
        params = read_params(folder, specs, None, towers={name}, progress=False)[name]
        verified[name] = dataclasses.asdict(verify_tower(name, tower, params, tokenizers[name]))
    return {"verified": verified}


def _hash(files: Sequence[Path], progress: bool | None) -> dict[Path, str]:
    """File -> sha256, of every file of a source once."""
    with byte_bar(sum(file.stat().st_size for file in files), "Hashing", progress) as bar:
        return {file: sha256(file, bar.update) for file in files}
