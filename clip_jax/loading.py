"""`load`: any source -> `TextEncoder`. The one user of `convert/` at run time."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from clip_jax.cache import CACHE_BYTES, check_cache_bytes
from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.convert.components import ConfigLike, read_configs
from clip_jax.convert.detect import family_called, folders_of
from clip_jax.convert.foreign import open_foreign
from clip_jax.convert.hub import Access
from clip_jax.convert.layouts import Projection, check_projection
from clip_jax.convert.resolve import SourceLike, resolve_all
from clip_jax.encoder import TextEncoder
from clip_jax.errors import CheckpointError, ClipJaxError
from clip_jax.families import Family, stored_family
from clip_jax.models import Attention, check_attention
from clip_jax.params import cast
from clip_jax.params import checkpoint as ckpt
from clip_jax.params.quantize import PLAIN, Scheme, scheme_called
from clip_jax.params.random import random_tensors
from clip_jax.params.shapes import TensorSpec, param_shapes, unflatten
from clip_jax.params.shard import (
    Placement,
    Rules,
    auto_axes,
    batch_sharding,
    idle_axes,
    param_shardings,
    placed_by,
    sharded_array,
)
from clip_jax.params.staging import identity, unreplaced
from clip_jax.progress import byte_bar
from clip_jax.tokenizers import ClipTokenizer, RowTokenizer, choose_tokenizers, read_tokenizer
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

    def read_params(
        self, dtype: np.dtype | None, *, scheme: Scheme, placement: Placement | None, progress: bool | None
    ) -> dict[str, Any]:
        """Loads the params; `dtype` None keeps that of the source, `placement` None is the default device."""


@dataclasses.dataclass(frozen=True)
class _Converted:
    """A folder written by `convert` or `TextEncoder.save`."""

    path: Path
    family: Family
    metadata: ckpt.CheckpointMetadata
    identity: bytes | None

    def tokenizer(self, tower: str) -> RowTokenizer:
        return read_tokenizer(self.family.tower(tower).config, ckpt.tokenizer_folder(self.path, tower))

    def specs(self) -> Specs:
        specs = ckpt.read_specs(self.path, self.metadata.configs, self.metadata.scheme)
        return {tower.name: specs[tower.name] for tower in self.family.towers}

    def provenance(self) -> dict[str, Any]:
        return self.metadata.provenance

    def read_params(
        self, dtype: np.dtype | None, *, scheme: Scheme, placement: Placement | None, progress: bool | None
    ) -> dict[str, Any]:
        stored = self.metadata.scheme
        if stored is not PLAIN and scheme not in (PLAIN, stored):
            raise CheckpointError(
                f"{self.path} is quantised to {stored.name}; quantize={scheme.name!r} was asked for. Load it as it is, "
                f"or quantise the checkpoint that it was made of."
            )
        scheme = scheme if stored is PLAIN else PLAIN
        with unreplaced(self.path, self.identity):
            specs = self.specs()
            return ckpt.read_params(self.path, specs, dtype, scheme=scheme, placement=placement, progress=progress)


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

    def read_params(
        self, dtype: np.dtype | None, *, scheme: Scheme, placement: Placement | None, progress: bool | None
    ) -> dict[str, Any]:
        specs = self.specs()
        params = {}
        total = sum(spec.nbytes for tree in specs.values() for spec in tree.values())
        with byte_bar(total, "Drawing random weights", progress) as bar:
            for name, tree in specs.items():
                leaves = {}
                for path, array in random_tensors(name, {path: spec.shape for path, spec in tree.items()}):
                    spec = tree[path]
                    array = array.astype(scheme.read_dtype(path, spec.dtype, dtype), copy=False)
                    leaves[path] = scheme.quantize(
                        path,
                        jax.device_put(array)
                        if placement is None
                        else sharded_array(spec.shape, placement(name, path, spec), array.__getitem__),
                    )
                    bar.update(spec.nbytes)
                params[name] = unflatten(leaves)
        return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerInfo:
    """One text encoder of a source: its architecture, and the size of its parameters as stored (int4 packed)."""

    config: TowerConfig
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a source holds, found out without reading its weights."""

    family: Family
    towers: dict[str, TowerInfo]
    quantize: str | None
    provenance: dict[str, Any]


def load(
    source: SourceLike,
    *,
    family: str | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    param_dtype: jax.typing.DTypeLike | None = None,
    quantize: str | None = None,
    without: str | Iterable[str] = (),
    config: Mapping[str, ConfigLike] | None = None,
    text_projection: Projection = "auto",
    tokenizer: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules | None = None,
    cache_bytes: int = CACHE_BYTES,
    attention: Attention = "xla",
    progress: bool | None = None,
) -> TextEncoder:
    """Loads the text encoders of a pipeline.

    Args:
        source: A folder written by `clip-jax convert`; a diffusers folder, or that of one text encoder; a file of
            weights in any format; a list of those, and of text encoders' folders, that make up a family; a Hub repo id,
            of which only the text encoders and tokenizers are downloaded; or "random:sd15", the full-size architecture
            with seeded random weights.
        family: "sd15", "sd21", ...; None finds out. A wrong one is an error.
        dtype: Of the computation and of the embeddings: float32, bfloat16 or float16.
        param_dtype: Of the parameters in memory; None means `dtype`.
        quantize: "int8" quantises kernels and the token embedding to int8, a tensor at a time as they are read, and
            multiplies in int8: one scale for each output, and one for each token's activations. "fp8" stores them as
            float8_e4m3fn, with scales as in int8; products are in it on CUDA devices, in `dtype` elsewhere. "int4"
            stores them in four bits, and computes in `dtype`. None takes them as they are, quantised or not.
        without: Towers to leave out: "t5" of SD 3, whose rows are zeros then.
        config: Tower name -> architecture, where a file of weights does not tell (a config, a dict, or the path of
            a `config.json`); goes before the `config.json` beside a file that is named as the source. A folder with
            such a file is read by that.
        text_projection: "auto" takes `text_projection` of a foreign checkpoint for what its name says; "as_is"
            takes it as [D, P], used as `x @ text_projection`, "transpose" as [P, D].
        tokenizer: A tokenizer folder to use instead of the source's, or tower name -> folder.
        revision: Branch, tag or commit of a Hub repo.
        local_files_only: Takes a Hub repo from the local cache, without asking the network.
        token: Of the Hub, for gated and private repos; None is that of `hf auth login` or `HF_TOKEN`.
        cache_dir: Where downloads are kept; None is the place of `huggingface_hub`.
        mesh: The devices to split the params over, each parameter being read straight to its parts; None means whole
            on the default device. Several processes that share a mesh call this alike.
        rules: Which axes of `mesh` the logical axes are split over (`clip_jax.params.shard`); None means
            `DEFAULT_RULES`.
        cache_bytes: How much memory embeddings of earlier prompts may take (`TextEncoder.cache`); 0 is no cache.
        attention: "cudnn" lets cuDNN compute attention on CUDA devices (`text_embeddings`), with a `dtype` of bfloat16
            or float16; elsewhere, where the params are moved to a CPU for example, it is computed as ever.
        progress: Whether to show progress bars; None means on a terminal.

    Raises:
        CheckpointError: The source is not there, not whole, of another model or family, or quantised otherwise.
        ConfigError: Its `config.json` asks for something that cannot be honoured.
        ClipJaxError: `rules` do not fit `mesh`; another `quantize` or dtype; "cudnn" for another dtype, or without a
            cuDNN. What does not depend on the source is looked at before it is looked for.
    """
    scheme = scheme_called(quantize)
    check_attention(attention, cast.float_dtype(dtype))
    check_cache_bytes(cache_bytes)
    _check_mesh(mesh, rules)
    kept = cast.float_dtype(dtype if param_dtype is None else param_dtype)
    access = Access(revision=revision, local_files_only=local_files_only, token=token, cache_dir=cache_dir)
    opened = _open(source, family, without, access, config, text_projection, progress)
    configs = {tower.name: tower.config for tower in opened.family.towers}
    placement, rows = _places(configs, mesh, rules)
    tokenizers = choose_tokenizers(configs, opened.tokenizer, tokenizer)
    if isinstance(opened, _Random):
        warnings.warn(
            f"{source} has random weights: the embeddings have the right shapes and no meaning.",
            UserWarning,
            stacklevel=2,
        )
    with auto_axes(rows):
        params = opened.read_params(kept, scheme=scheme, placement=placement, progress=progress)
    return TextEncoder(
        opened.family,
        params,
        tokenizers,
        dtype=dtype,
        provenance=opened.provenance(),
        batch_sharding=rows,
        cache_bytes=cache_bytes,
        attention=attention,
    )


def info(
    source: SourceLike,
    *,
    family: str | None = None,
    without: str | Iterable[str] = (),
    config: Mapping[str, ConfigLike] | None = None,
    text_projection: Projection = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> ModelInfo:
    """Tells what a source holds, without reading its weights (of a Hub repo they are downloaded all the same).

    Arguments and errors as in `load`.
    """
    access = Access(revision=revision, local_files_only=local_files_only, token=token, cache_dir=cache_dir)
    opened = _open(source, family, without, access, config, text_projection, progress)
    towers = {}
    for name, tree in opened.specs().items():
        towers[name] = TowerInfo(
            config=opened.family.tower(name).config,
            parameters=sum(map(math.prod, param_shapes(opened.family.tower(name).config).values())),
            nbytes=sum(spec.nbytes for spec in tree.values()),
            dtypes=tuple(sorted({spec.dtype.name for spec in tree.values()})),
        )
    return ModelInfo(
        family=opened.family,
        towers=towers,
        quantize=opened.metadata.scheme.name if isinstance(opened, _Converted) else None,
        provenance=opened.provenance(),
    )


def load_tokenizers(
    source: SourceLike,
    *,
    family: str | None = None,
    without: str | Iterable[str] = (),
    config: Mapping[str, ConfigLike] | None = None,
    text_projection: Projection = "auto",
    tokenizer: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> dict[str, RowTokenizer]:
    """Tower name -> tokenizer of a source, whose weights are looked for, and downloaded, but not read.

    They tell which family it is, and by that how it pads. Arguments and errors as in `load`.
    """
    access = Access(revision=revision, local_files_only=local_files_only, token=token, cache_dir=cache_dir)
    opened = _open(source, family, without, access, config, text_projection, progress)
    configs = {tower.name: tower.config for tower in opened.family.towers}
    return choose_tokenizers(configs, opened.tokenizer, tokenizer)


def _check_mesh(mesh: jax.sharding.Mesh | None, rules: Rules | None) -> None:
    if not isinstance(mesh, jax.sharding.Mesh | None):
        raise ClipJaxError(f"Expected mesh to be a jax.sharding.Mesh, found {type(mesh).__name__}.")
    if mesh is None and rules is not None:
        raise ClipJaxError("Rules say how to split params over a mesh: pass mesh= as well.")


def _places(
    configs: Mapping[str, TowerConfig], mesh: jax.sharding.Mesh | None, rules: Rules | None
) -> tuple[Placement | None, jax.sharding.NamedSharding | None]:
    """Where params and rows of ids go; None is the default device."""
    if mesh is None:
        return None, None
    rules = list(rules) if isinstance(rules, Iterator) else rules  # they are gone through several times
    shardings = param_shardings(configs, mesh, rules)
    if idle := idle_axes(shardings, rules):
        warnings.warn(
            f"No parameter of {', '.join(configs)} divides by the "
            f"{', '.join(f'{mesh.shape[axis]} of {axis!r}' for axis in idle)} of the mesh: each of these devices holds "
            f"a whole copy.",
            UserWarning,
            stacklevel=3,
        )
    return placed_by(shardings), batch_sharding(mesh, rules)


def _open(
    source: SourceLike,
    family: str | None,
    without: str | Iterable[str],
    access: Access,
    config: Mapping[str, ConfigLike] | None,
    text_projection: Projection,
    progress: bool | None,
) -> Source:
    without = {without} if isinstance(without, str) else set(without)
    configs = read_configs(config or {})
    check_projection(text_projection)
    if family is not None:
        family_called(family)
    if isinstance(source, str) and source.startswith(_RANDOM):
        found = family_called(source.removeprefix(_RANDOM))
        _check_family(source, found.name, family)
        if configs or text_projection != "auto":
            raise CheckpointError(f"{source} is of the full size; expected no config or text_projection beside it.")
        return _Random(found.without(without))
    access = dataclasses.replace(access, skip=folders_of(without))
    paths = [resolved.path for resolved in resolve_all(source, access, progress=progress)]
    if not any(map(ckpt.is_checkpoint, paths)):
        return open_foreign(
            paths,
            family=family,
            without=without,
            configs=configs,
            text_projection=text_projection,
        )
    if len(paths) > 1 or configs or text_projection != "auto":
        raise CheckpointError(
            f"{', '.join(map(str, paths))} is a converted checkpoint, which is complete and says what it is; expected "
            f"no other source, config or text_projection beside it."
        )
    return _open_converted(paths[0], family, without)


def _open_converted(path: Path, family: str | None, without: set[str]) -> _Converted:
    before = identity(path)
    metadata = ckpt.read_metadata(path)
    _check_family(str(path), metadata.family, family)
    return _Converted(path, stored_family(metadata, path, without), metadata, before)


def _check_family(source: str, found: str, wanted: str | None) -> None:
    if wanted is not None and wanted != found:
        raise CheckpointError(f"{source} is of family {found!r}; family={wanted!r} was asked for.")
