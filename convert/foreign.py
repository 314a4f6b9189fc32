"""A checkpoint in a foreign layout, opened: which family it is, and where every parameter comes from.

A source is a diffusers pipeline folder (`text_encoder/`, `tokenizer/`, `model_index.json`, ...), a folder with one
text encoder as `save_pretrained` writes it, a whole `CLIPModel`, a file of weights with one or more text encoders in
it, or several of these files and of the folders of one text encoder.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.convert.components import is_component_folder, read_beside, read_components
from clip_jax.convert.detect import find_family, find_family_of, folders_of
from clip_jax.convert.infer import infer_config, name_towers, with_open_clip_config
from clip_jax.convert.layouts import Encoder, Projection, check_projection, find_encoders, one_encoder, what_else
from clip_jax.convert.layouts.fp8 import is_scale
from clip_jax.convert.source import TensorSource, open_source
from clip_jax.convert.tower import ForeignTower, open_tower
from clip_jax.errors import CheckpointError
from clip_jax.families import Family
from clip_jax.params.quantize import PLAIN, Scheme, split
from clip_jax.params.shapes import TensorSpec, layer_groups, unflatten
from clip_jax.params.shard import Placement
from clip_jax.progress import byte_bar
from clip_jax.tokenizers import RowTokenizer
from clip_jax.tokenizers.files import exists

# Of the names in OpenCLIP's own files, trained in parallel or compiled; a pipeline has its text encoders below others.
_OPEN_CLIP_PREFIX = re.compile(r"((module|_orig_mod)\.)*(text\.)?")


@dataclasses.dataclass(frozen=True)
class ForeignCheckpoint:
    """A foreign checkpoint, opened but not read.

    Attributes:
        name: What to call it.
        layout: What it was recognised as, for people.
        family: The family, around the checkpoint's own architectures.
        towers: Tower name -> tower.
        ignored: Names in single files that are no part of a text encoder, by their beginnings, with counts.
    """

    name: str
    layout: str
    family: Family
    towers: dict[str, ForeignTower]
    ignored: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the params, as they are stored."""
        return sum(spec.nbytes for tree in self.specs().values() for spec in tree.values())

    @property
    def sources(self) -> list[TensorSource]:
        """The files behind the towers, each once."""
        return list({id(tower.source): tower.source for tower in self.towers.values()}.values())

    def tokenizer(self, tower: str) -> RowTokenizer:
        """The tokenizer of a tower."""
        return self.towers[tower].tokenizer()

    def specs(self) -> dict[str, dict[str, TensorSpec]]:
        """Tower name -> path -> shape and dtype."""
        return {name: tower.specs() for name, tower in self.towers.items()}

    def read_params(
        self,
        dtype: np.dtype | None,
        *,
        scheme: Scheme = PLAIN,
        placement: Placement | None = None,
        progress: bool | None = None,
    ) -> dict[str, Any]:
        """Loads the params, tensor by tensor.

        Args:
            dtype: To cast to; None keeps that of the source.
            scheme: To quantise by.
            placement: Where each parameter goes; None means the default device. Only the parts for devices of this
                process are read, and cast.
            progress: Whether to show a progress bar; None means on a terminal.

        Raises:
            CheckpointError: float16 cannot hold a value, or two copies of a tensor differ.
        """
        with byte_bar(self.nbytes, "Loading", progress) as bar:
            params = {}
            for name, tower in self.towers.items():
                places = placement and functools.partial(placement, name)
                params[name] = unflatten(tower.read_params(dtype, places, bar.update, scheme))
            return params

    def parts(
        self, dtype: np.dtype | None, update: Callable[[int], object], scheme: Scheme = PLAIN
    ) -> Iterator[dict[str, dict[str, np.ndarray | jax.Array]]]:
        """Tower name -> path -> array as it is stored, one block of the model in memory at a time.

        Args:
            dtype: To cast to; None keeps that of the source.
            update: Called with the number of source bytes that are done since its last call.
            scheme: To quantise by.

        Raises:
            CheckpointError: float16 cannot hold a value, or two copies of a tensor differ.
        """
        for name, tower in self.towers.items():
            tower.check_twins()
            specs = tower.specs()
            for group in layer_groups(specs):
                leaves = {path: scheme.quantize(path, tower.read(path, dtype, scheme)) for path in group}
                yield {name: split(leaves)}
                update(sum(specs[path].nbytes for path in group))

    def provenance(self) -> dict[str, Any]:
        """Where the weights come from, without reading them. JSON."""
        formats = ", ".join(dict.fromkeys(source.format for source in self.sources))
        return {
            "source": self.name,
            "format": f"{self.layout}, {formats}",
            **({"ignored": self.ignored} if self.ignored else {}),
            "towers": {name: _tower_provenance(tower) for name, tower in self.towers.items()},
        }


def _tower_provenance(tower: ForeignTower) -> dict[str, Any]:
    used = [tower.state[key] for key, _ in tower.map.keys.values()]
    return {
        "files": [file.name for file in tower.source.files],
        "names": f"{tower.encoder.layout}{f', below {tower.encoder.prefix!r}' if tower.encoder.prefix else ''}",
        "dtypes": sorted({tensor.stored or tensor.dtype.name for tensor in used}),
        "ignored": tower.map.ignored,
    }


def open_foreign(
    paths: Sequence[Path],
    *,
    family: str | None = None,
    without: Iterable[str] = (),
    configs: Mapping[str, TowerConfig] | None = None,
    text_projection: Projection = "auto",
) -> ForeignCheckpoint:
    """Opens a source in a foreign layout, finds out its family, and pairs parameters with tensors.

    Args:
        paths: A folder; or the files of weights, and the folders of one text encoder, that together make a family.
        family: Its family, where it cannot be told or is to be made sure of.
        without: Towers to leave out.
        configs: Tower name -> architecture, where a file of weights does not tell; goes before the `config.json`
            beside it, but not before those of a folder.
        text_projection: How the projection is stored, where its name says otherwise.

    Raises:
        CheckpointError: Nothing that can be read, of another model or family, or its tensors are not those of its
            architecture.
        ConfigError: A `config.json` that cannot be honoured.
    """
    check_projection(text_projection)
    if len(paths) == 1 and is_component_folder(paths[0]):
        if configs:
            raise CheckpointError(
                f"{paths[0]} is read by the config.json of each text encoder in it; expected no other config. Name the "
                f"file of weights itself to read it by another."
            )
        return _open_folder(paths[0], family, set(without), text_projection)
    return _open_files(paths, family, set(without), configs or {}, text_projection)


def _open_folder(path: Path, family: str | None, without: set[str], projection: Projection) -> ForeignCheckpoint:
    found = read_components(path, skip=folders_of(without))
    matched = find_family(path, found, family)
    absent = {t.name for t in matched.towers if t.optional and not ({"", t.folder} & found.components.keys())}
    matched = matched.without(without | absent)
    if found.index and matched.zero_negative_key is not None:
        zeros = found.index.get(matched.zero_negative_key, True)  # the pipelines' own default
        if not isinstance(zeros, bool):
            raise CheckpointError(
                f"{path}/model_index.json: {matched.zero_negative_key} must be true or false, found {zeros!r}."
            )
        matched = dataclasses.replace(matched, zero_negative=zeros)
    towers = {}
    for tower in matched.towers:
        alone = tower.folder not in found.components
        component = found.components["" if alone else tower.folder]
        source, where = open_source(component.folder), str(component.folder)
        encoder = one_encoder(source.state, where, projection, source.metadata)
        towers[tower.name] = open_tower(
            tower,
            encoder,
            component.config,
            source,
            tokenizer_folder=path if alone else path / tower.tokenizer_folder,
            where=where,
            projection=projection,
            whole=component.whole,
        )
    return ForeignCheckpoint(
        name=path.resolve().name,
        layout="text encoder folder" if "" in found.components else "diffusers folder",
        family=matched.with_configs({name: tower.config for name, tower in towers.items()}),
        towers=towers,
    )


class _Opened(NamedTuple):
    """One of several sources, and the text encoders in it."""

    path: Path
    source: TensorSource
    encoders: list[Encoder]


def _open_files(
    paths: Sequence[Path],
    family: str | None,
    without: set[str],
    configs: Mapping[str, TowerConfig],
    projection: Projection,
) -> ForeignCheckpoint:
    where = ", ".join(map(str, paths))
    owners: dict[Encoder, _Opened] = {}
    ignored: Counter[str] = Counter()
    for path in paths:
        opened = _open_file(path, projection)
        owners |= dict.fromkeys(opened.encoders, opened)
        ignored += _others(opened.source, opened.encoders)
    named = name_towers(owners, where, configs)
    named = {name: encoder for name, encoder in named.items() if name not in without}
    beside = {
        name: component
        for name, encoder in named.items()
        if name not in configs
        and len(owners[encoder].encoders) == 1
        and (component := read_beside(owners[encoder].path, encoder))
    }
    told = {**configs, **{name: component.config for name, component in beside.items()}}
    found = {name: told.get(name) or _inferred(encoder, owners[encoder].path) for name, encoder in named.items()}
    matched = find_family_of(where, found, [encoder.prefix for encoder in named.values()], family)
    matched = matched.without(without | {tower.name for tower in matched.towers} - named.keys())
    towers = {}
    for tower in matched.towers:
        encoder, config = named[tower.name], found[tower.name]
        path, source, _ = owners[encoder]
        if tower.identity_projection and tower.name not in told and isinstance(config, ClipTextConfig):
            # What such files carry is not the model's: diffusers puts the identity in its place
            # (single_file_utils.py, `create_diffusers_clip_model_from_ldm`), ComfyUI does without.
            config = dataclasses.replace(config, projection_dim=None)
        towers[tower.name] = open_tower(
            tower,
            encoder,
            config,
            source,
            tokenizer_folder=_tokenizer_folder(encoder, path),
            where=str(path),
            projection=projection,
            whole=tower.name not in beside or beside[tower.name].whole,
        )
    return ForeignCheckpoint(
        name=", ".join(path.name for path in paths),
        layout="single file" if len(paths) == 1 else f"{len(paths)} files",
        family=matched.with_configs({name: tower.config for name, tower in towers.items()}),
        towers=towers,
        ignored=dict(ignored),
    )


def _open_file(path: Path, projection: Projection) -> _Opened:
    """Opens a file of weights, or a folder; one with a `config.json` is that of one text encoder."""
    source, where = open_source(path), str(path)
    if path.is_dir() and exists(path / "config.json"):
        return _Opened(path, source, [one_encoder(source.state, where, projection, source.metadata)])
    found = find_encoders(source.state, where, projection, source.metadata)
    if not found:
        raise CheckpointError(f"{path}: expected CLIP's text encoder or T5's, found {what_else(source.state)}.")
    return _Opened(path, source, found)


def _inferred(encoder: Encoder, path: Path) -> TowerConfig:
    """The architecture of an encoder that nothing tells but its shapes and, beside OpenCLIP's own files, its config."""
    config = infer_config(encoder, str(path))
    if encoder.layout == "OpenCLIP" and _OPEN_CLIP_PREFIX.fullmatch(encoder.prefix):
        return with_open_clip_config(config, path if path.is_dir() else path.parent)
    return config


def _tokenizer_folder(encoder: Encoder, path: Path) -> Path | None:
    """Where a tokenizer may lie beside weights: CLIP's is in this package, and what lies beside a file may be T5's."""
    if path.is_dir():
        return path
    return path.parent if encoder.kind == "t5" else None


def _others(source: TensorSource, encoders: Sequence[Encoder]) -> Counter[str]:
    """Beginnings of the names in a file that are in none of its encoders -> how many there are of each."""
    used = {tensor.key for encoder in encoders for tensor in encoder.state.values()}
    others = (name for name in source.state if name not in used and not is_scale(name))
    return Counter("".join(name.partition(".")[:2]) for name in others)
