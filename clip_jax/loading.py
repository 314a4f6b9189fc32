"""`load`: any source -> `TextEncoder`. The one user of `convert/` at run time."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from clip_jax.config import ClipTextConfig
from clip_jax.convert.foreign import find_family, open_foreign
from clip_jax.convert.resolve import resolve
from clip_jax.encoder import TextEncoder
from clip_jax.errors import CheckpointError
from clip_jax.families import FAMILIES, Family
from clip_jax.params import checkpoint as ckpt
from clip_jax.params.cast import float_dtype
from clip_jax.params.random import random_tensor
from clip_jax.params.shapes import TensorSpec, param_shapes, unflatten
from clip_jax.progress import byte_bar
from clip_jax.tokenizers import ClipTokenizer

Specs = dict[str, dict[str, TensorSpec]]

_RANDOM = "random:"


class Source(Protocol):
    """A checkpoint of any kind, opened but not read."""

    @property
    def family(self) -> Family:
        """The family, around the checkpoint's own architectures."""

    @property
    def tokenizers(self) -> dict[str, ClipTokenizer]:
        """Tower name -> tokenizer."""

    def specs(self) -> Specs:
        """Tower name -> path -> shape and dtype as stored."""

    def provenance(self) -> dict[str, Any]:
        """Where the weights come from. JSON."""

    def read_params(self, dtype: np.dtype | None, *, progress: bool | None = None) -> dict[str, Any]:
        """Loads the params onto the default device; `dtype` None keeps that of the source."""


@dataclasses.dataclass(frozen=True)
class _Converted:
    """A folder written by `convert` or `TextEncoder.save`."""

    path: Path
    family: Family
    metadata: ckpt.CheckpointMetadata

    @property
    def tokenizers(self) -> dict[str, ClipTokenizer]:
        return {
            tower.name: ClipTokenizer.from_folder(ckpt.tokenizer_folder(self.path, tower.name))
            for tower in self.family.towers
        }

    def specs(self) -> Specs:
        return ckpt.read_specs(self.path, self.metadata.configs)

    def provenance(self) -> dict[str, Any]:
        return self.metadata.provenance

    def read_params(self, dtype: np.dtype | None, *, progress: bool | None = None) -> dict[str, Any]:
        return ckpt.read_params(self.path, self.specs(), dtype, progress=progress)


@dataclasses.dataclass(frozen=True)
class _Random:
    """The full-size architectures of a family with seeded random weights."""

    family: Family

    @property
    def tokenizers(self) -> dict[str, ClipTokenizer]:
        return {tower.name: ClipTokenizer.packaged(tower.pad_token) for tower in self.family.towers}

    def specs(self) -> Specs:
        return {
            tower.name: {
                p: TensorSpec(s, np.dtype(np.float32)) for p, s in param_shapes(tower.config).items()
            }
            for tower in self.family.towers
        }

    def provenance(self) -> dict[str, Any]:
        return {"source": f"{_RANDOM}{self.family.name}", "format": "seeded random weights"}

    def read_params(self, dtype: np.dtype | None, *, progress: bool | None = None) -> dict[str, Any]:
        specs = self.specs()
        params = {}
        total = sum(spec.nbytes for tree in specs.values() for spec in tree.values())
        with byte_bar(total, "Drawing random weights", progress) as bar:
            for name, tree in specs.items():
                leaves = {}
                for path, spec in tree.items():
                    array = random_tensor(f"{name}/{path}", spec.shape)
                    leaves[path] = jax.device_put(array.astype(dtype or spec.dtype))
                    bar.update(spec.nbytes)
                params[name] = unflatten(leaves)
        return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerInfo:
    """One text encoder of a source: its architecture, and the size of its parameters as stored."""

    config: ClipTextConfig
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a source holds, found out without reading its weights."""

    family: Family
    towers: dict[str, TowerInfo]
    provenance: dict[str, Any]


def load(
    source: str | os.PathLike[str],
    *,
    family: str | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    param_dtype: jax.typing.DTypeLike | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: bool | None = None,
) -> TextEncoder:
    """Loads a text encoder.

    Args:
        source: A folder written by `clip-jax convert`; a diffusers folder, or that of one text encoder; a Hub
            repo id, of which only the text encoders and tokenizers are downloaded; or "random:sd15", the
            full-size architecture with seeded random weights.
        family: "sd15", "sd21", ...; None finds out. A wrong one is an error.
        dtype: Of the computation and of the embeddings: float32, bfloat16 or float16.
        param_dtype: Of the parameters in memory; None means `dtype`.
        tokenizer: A tokenizer folder to use instead of the source's.
        revision: Branch, tag or commit of a Hub repo.
        local_files_only: Takes a Hub repo from the local cache, without asking the network.
        progress: Whether to show progress bars; None means on a terminal.

    Raises:
        CheckpointError: The source is not there, not whole, or of another model or family.
        ConfigError: Its `config.json` asks for something that cannot be honoured.
    """
    opened = _open(source, family, revision, local_files_only, progress)
    tokenizers = opened.tokenizers
    if tokenizer is not None:
        tokenizers = dict.fromkeys(tokenizers, ClipTokenizer.from_folder(Path(tokenizer)))
    for tower in opened.family.towers:
        _check_vocabulary(tokenizers[tower.name], tower.config.vocab_size, tower.name)
    if isinstance(opened, _Random):
        warnings.warn(
            f"{source} has random weights: the embeddings have the right shapes and no meaning.",
            UserWarning,
            stacklevel=2,
        )
    return TextEncoder(
        opened.family,
        opened.read_params(float_dtype(dtype if param_dtype is None else param_dtype), progress=progress),
        tokenizers,
        dtype=dtype,
        provenance=opened.provenance(),
    )


def info(
    source: str | os.PathLike[str],
    *,
    family: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: bool | None = None,
) -> ModelInfo:
    """Tells what a source holds, without reading its weights. Arguments and errors as in `load`."""
    opened = _open(source, family, revision, local_files_only, progress)
    towers = {}
    for name, tree in opened.specs().items():
        towers[name] = TowerInfo(
            config=opened.family.tower(name).config,
            parameters=sum(math.prod(spec.shape) for spec in tree.values()),
            nbytes=sum(spec.nbytes for spec in tree.values()),
            dtypes=tuple(sorted({spec.dtype.name for spec in tree.values()})),
        )
    return ModelInfo(family=opened.family, towers=towers, provenance=opened.provenance())


def load_tokenizers(
    source: str | os.PathLike[str],
    *,
    family: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: bool | None = None,
) -> dict[str, ClipTokenizer]:
    """Tower name -> tokenizer of a source. Arguments and errors as in `load`."""
    return _open(source, family, revision, local_files_only, progress).tokenizers


def _open(
    source: str | os.PathLike[str],
    family: str | None,
    revision: str | None,
    local_files_only: bool,
    progress: bool | None,
) -> Source:
    name = os.fspath(source)
    if family is not None:
        find_family(family)
    if name.startswith(_RANDOM):
        found = find_family(name.removeprefix(_RANDOM))
        _check_family(name, found.name, family)
        return _Random(found)
    path = resolve(source, revision=revision, local_files_only=local_files_only, progress=progress).path
    if not ckpt.is_checkpoint(path):
        return open_foreign(path, family=family)
    metadata = ckpt.read_metadata(path)
    _check_family(name, metadata.family, family)
    if metadata.family not in FAMILIES:
        raise CheckpointError(
            f"{path} is of family {metadata.family!r}, unknown to this clip_jax. Upgrade clip-jax-text."
        )
    return _Converted(path, FAMILIES[metadata.family].with_configs(metadata.configs), metadata)


def _check_family(source: str, found: str, wanted: str | None) -> None:
    if wanted is not None and wanted != found:
        raise CheckpointError(f"{source} is of family {found!r}; family={wanted!r} was asked for.")


def _check_vocabulary(tokenizer: ClipTokenizer, rows: int, tower: str) -> None:
    """Refuses ids beyond the embedding: jax would clamp them to its last row without a word."""
    if tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"The tokenizer of {tower} has {tokenizer.vocab_size} tokens, its embedding {rows} rows. "
            f"Expected no more tokens than rows; use the tokenizer that belongs to these weights."
        )
