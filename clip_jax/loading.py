"""`load`: any source -> `TextEncoder`. The one user of `convert/` at run time."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.convert.detect import family_called, folders_of
from clip_jax.convert.foreign import open_foreign
from clip_jax.convert.resolve import resolve
from clip_jax.encoder import TextEncoder
from clip_jax.errors import CheckpointError, ClipJaxError
from clip_jax.families import FAMILIES, Family
from clip_jax.params import cast
from clip_jax.params import checkpoint as ckpt
from clip_jax.params.random import random_tensor
from clip_jax.params.shapes import TensorSpec, param_shapes, unflatten
from clip_jax.progress import byte_bar
from clip_jax.tokenizers import ClipTokenizer, RowTokenizer, check_vocabulary, read_tokenizer
from clip_jax.tokenizers.stand_in import stand_in_t5_tokenizer

Specs = dict[str, dict[str, TensorSpec]]

_RANDOM = "random:"


class Source(Protocol):
    """A checkpoint of any kind, opened but not read."""

    @property
    def family(self) -> Family:
        """The family, around the checkpoint's own architectures."""

    def tokenizer(self, tower: str) -> RowTokenizer:
        """The tokenizer of a tower."""

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

    def tokenizer(self, tower: str) -> RowTokenizer:
        return read_tokenizer(self.family.tower(tower).config, ckpt.tokenizer_folder(self.path, tower))

    def specs(self) -> Specs:
        specs = ckpt.read_specs(self.path, self.metadata.configs)
        return {tower.name: specs[tower.name] for tower in self.family.towers}

    def provenance(self) -> dict[str, Any]:
        return self.metadata.provenance

    def read_params(self, dtype: np.dtype | None, *, progress: bool | None = None) -> dict[str, Any]:
        return ckpt.read_params(self.path, self.specs(), dtype, progress=progress)


@dataclasses.dataclass(frozen=True)
class _Random:
    """The full-size architectures of a family with seeded random weights."""

    family: Family

    def tokenizer(self, tower: str) -> RowTokenizer:
        found = self.family.tower(tower)
        if isinstance(found.config, ClipTextConfig):
            return ClipTokenizer.packaged(found.pad_token, found.config.max_position_embeddings)
        return stand_in_t5_tokenizer()

    def specs(self) -> Specs:
        return {
            tower.name: {p: TensorSpec(s, np.dtype(np.float32)) for p, s in param_shapes(tower.config).items()}
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
                    leaves[path] = jax.device_put(array.astype(cast.param_dtype(path, dtype or spec.dtype)))
                    bar.update(spec.nbytes)
                params[name] = unflatten(leaves)
        return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerInfo:
    """One text encoder of a source: its architecture, and the size of its parameters as stored."""

    config: TowerConfig
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
    without: str | Iterable[str] = (),
    tokenizer: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: bool | None = None,
) -> TextEncoder:
    """Loads the text encoders of a pipeline.

    Args:
        source: A folder written by `clip-jax convert`; a diffusers folder, or that of one text encoder; a Hub
            repo id, of which only the text encoders and tokenizers are downloaded; or "random:sd15", the
            full-size architecture with seeded random weights.
        family: "sd15", "sd21", ...; None finds out. A wrong one is an error.
        dtype: Of the computation and of the embeddings: float32, bfloat16 or float16.
        param_dtype: Of the parameters in memory; None means `dtype`.
        without: Towers to leave out: "t5" of SD 3, whose rows are zeros then.
        tokenizer: A tokenizer folder to use instead of the source's, or tower name -> folder.
        revision: Branch, tag or commit of a Hub repo.
        local_files_only: Takes a Hub repo from the local cache, without asking the network.
        progress: Whether to show progress bars; None means on a terminal.

    Raises:
        CheckpointError: The source is not there, not whole, or of another model or family.
        ConfigError: Its `config.json` asks for something that cannot be honoured.
    """
    names = {without} if isinstance(without, str) else set(without)
    opened = _open(source, family, names, revision, local_files_only, progress)
    tokenizers = _tokenizers(opened, tokenizer)
    if isinstance(opened, _Random):
        warnings.warn(
            f"{source} has random weights: the embeddings have the right shapes and no meaning.",
            UserWarning,
            stacklevel=2,
        )
    return TextEncoder(
        opened.family,
        opened.read_params(cast.float_dtype(dtype if param_dtype is None else param_dtype), progress=progress),
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
    """Tells what a source holds, without reading its weights (of a Hub repo they are downloaded all the same).

    Arguments and errors as in `load`.
    """
    opened = _open(source, family, set(), revision, local_files_only, progress)
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
) -> dict[str, RowTokenizer]:
    """Tower name -> tokenizer of a source. Arguments and errors as in `load`."""
    return _tokenizers(_open(source, family, set(), revision, local_files_only, progress), None)


def _open(
    source: str | os.PathLike[str],
    family: str | None,
    without: set[str],
    revision: str | None,
    local_files_only: bool,
    progress: bool | None,
) -> Source:
    name = os.fspath(source)
    if family is not None:
        family_called(family)
    if name.startswith(_RANDOM):
        found = family_called(name.removeprefix(_RANDOM))
        _check_family(name, found.name, family)
        return _Random(found.without(without))
    path = resolve(
        source,
        revision=revision,
        local_files_only=local_files_only,
        skip=folders_of(without),
        progress=progress,
    ).path
    if not ckpt.is_checkpoint(path):
        return open_foreign(path, family=family, without=without)
    metadata = ckpt.read_metadata(path)
    _check_family(name, metadata.family, family)
    if metadata.family not in FAMILIES:
        raise CheckpointError(
            f"{path} is of family {metadata.family!r}, unknown to this clip_jax. Upgrade clip-jax-text."
        )
    whole = dataclasses.replace(FAMILIES[metadata.family], zero_negative=metadata.zero_negative)
    absent = {tower.name for tower in whole.towers} - metadata.configs.keys()
    return _Converted(path, whole.without(without | absent).with_configs(metadata.configs), metadata)


def _tokenizers(
    opened: Source, given: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None
) -> dict[str, RowTokenizer]:
    """Tower name -> its tokenizer, or the one of the folder that was given for it."""
    names = [tower.name for tower in opened.family.towers]
    if given is None:
        folders: Mapping[str, str | os.PathLike[str]] = {}
    elif isinstance(given, Mapping):
        folders = given
    elif len(names) == 1:
        folders = {names[0]: given}
    else:
        raise ClipJaxError(f"{opened.family.name} has the towers {', '.join(names)}; pass tokenizer={{tower: folder}}.")
    unknown = folders.keys() - set(names)
    if unknown:
        raise ClipJaxError(f"tokenizer names {', '.join(sorted(unknown))}; the towers are {', '.join(names)}.")
    tokenizers = {}
    for tower in opened.family.towers:
        folder = folders.get(tower.name)
        tokenizer = opened.tokenizer(tower.name) if folder is None else read_tokenizer(tower.config, Path(folder))
        check_vocabulary(tokenizer, tower.config, tower.name)
        tokenizers[tower.name] = tokenizer
    return tokenizers


def _check_family(source: str, found: str, wanted: str | None) -> None:
    if wanted is not None and wanted != found:
        raise CheckpointError(f"{source} is of family {found!r}; family={wanted!r} was asked for.")
