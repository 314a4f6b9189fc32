"""A checkpoint in a foreign layout, opened: which family it is, and where every parameter comes from.

Read so far: a diffusers pipeline folder (`text_encoder/`, `tokenizer/`, `model_index.json`, ...), a folder with
one text encoder as `save_pretrained` writes it, and a whole `CLIPModel`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.convert.components import Component, read_components
from clip_jax.convert.detect import find_family, folders_of
from clip_jax.convert.hf_keys import KeyMap, map_keys, to_flax
from clip_jax.convert.source import TensorSource, open_folder
from clip_jax.errors import CheckpointError
from clip_jax.families import Family, Tower
from clip_jax.params.cast import cast, param_dtype
from clip_jax.params.shapes import TensorSpec, layer_groups, param_shapes, unflatten
from clip_jax.progress import byte_bar
from clip_jax.tokenizers import ClipTokenizer, RowTokenizer, read_tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "spiece.model")


@dataclasses.dataclass(frozen=True)
class ForeignTower:
    """One text encoder of a foreign checkpoint.

    Attributes:
        config: Its architecture.
        source: Its tensors.
        map: Where its parameters are among them.
        tokenizer_folder: Where its tokenizer should be.
        pad_token: Of its tokenizer, if there is none.
    """

    config: TowerConfig
    source: TensorSource
    map: KeyMap
    tokenizer_folder: Path
    pad_token: str

    def specs(self) -> dict[str, TensorSpec]:
        """Path -> shape and dtype, in the order of the tree."""
        shapes = param_shapes(self.config)
        return {p: TensorSpec(shapes[p], self.source.tensors[key].dtype) for p, (key, _) in self.map.keys.items()}

    def read(self, path: str, dtype: np.dtype | None) -> np.ndarray:
        """One parameter for a tower in `dtype` (None keeps that of the source); it may be a view of the file."""
        key, transposed = self.map.keys[path]
        array = to_flax(self.source.read(key), transposed)
        return np.ascontiguousarray(cast(array, array.dtype if dtype is None else param_dtype(path, dtype), key))

    def check_twins(self) -> None:
        """Compares tensors of which the source has two copies.

        Raises:
            CheckpointError: They differ, so that there is no telling which one is meant.
        """
        for key, other in self.map.twins:
            if not np.array_equal(self.source.read(key), self.source.read(other)):
                raise CheckpointError(
                    f"{self.source.files[0].parent}: {key} and {other} are the same parameter, and differ. "
                    f"Save the model again with one of them."
                )

    def tokenizer(self) -> RowTokenizer:
        """The tokenizer of its folder; for CLIP, the packaged one where there is none."""
        if any((self.tokenizer_folder / name).is_file() for name in _TOKENIZER_FILES):
            return read_tokenizer(self.config, self.tokenizer_folder)
        if isinstance(self.config, ClipTextConfig):
            return ClipTokenizer.packaged(self.pad_token, self.config.max_position_embeddings)
        return read_tokenizer(self.config, self.tokenizer_folder)  # says what is missing


@dataclasses.dataclass(frozen=True)
class ForeignCheckpoint:
    """A foreign checkpoint, opened but not read.

    Attributes:
        path: The folder.
        layout: What it was recognised as, for people.
        family: The family, around the checkpoint's own architectures.
        towers: Tower name -> tower.
    """

    path: Path
    layout: str
    family: Family
    towers: dict[str, ForeignTower]

    @property
    def nbytes(self) -> int:
        """Bytes of the params, as they are stored."""
        return sum(spec.nbytes for tree in self.specs().values() for spec in tree.values())

    def tokenizer(self, tower: str) -> RowTokenizer:
        """The tokenizer of a tower."""
        return self.towers[tower].tokenizer()

    def specs(self) -> dict[str, dict[str, TensorSpec]]:
        """Tower name -> path -> shape and dtype."""
        return {name: tower.specs() for name, tower in self.towers.items()}

    def read_params(self, dtype: np.dtype | None, *, progress: bool | None = None) -> dict[str, Any]:
        """Loads the params onto the default device, tensor by tensor.

        Raises:
            CheckpointError: float16 cannot hold a value, or two copies of a tensor differ.
        """
        leaves: dict[str, dict[str, jax.Array]] = {name: {} for name in self.towers}
        with byte_bar(self.nbytes, "Loading", progress) as bar:
            for part in self.parts(dtype, bar.update):
                for name, arrays in part.items():
                    # Copies: on a CPU, device_put would take an aligned view of the file as it is.
                    leaves[name] |= {path: jnp.array(array) for path, array in arrays.items()}
        return {name: unflatten(tree) for name, tree in leaves.items()}

    def parts(
        self, dtype: np.dtype | None, update: Callable[[int], object]
    ) -> Iterator[dict[str, dict[str, np.ndarray]]]:
        """Tower name -> path -> array, one block of the model in memory at a time.

        Args:
            dtype: To cast to; None keeps that of the source.
            update: Called with the number of source bytes that are done since its last call.

        Raises:
            CheckpointError: float16 cannot hold a value, or two copies of a tensor differ.
        """
        for name, tower in self.towers.items():
            tower.check_twins()
            specs = tower.specs()
            for group in layer_groups(specs):
                yield {name: {path: tower.read(path, dtype) for path in group}}
                update(sum(specs[path].nbytes for path in group))

    def provenance(self) -> dict[str, Any]:
        """Where the weights come from, without reading them. JSON."""
        return {
            "source": self.path.resolve().name,
            "format": f"{self.layout}, safetensors",
            "towers": {
                name: {
                    "files": [file.name for file in tower.source.files],
                    "dtypes": sorted({spec.dtype.name for spec in tower.specs().values()}),
                    "ignored": tower.map.ignored,
                }
                for name, tower in self.towers.items()
            },
        }


def open_foreign(path: Path, *, family: str | None = None, without: Iterable[str] = ()) -> ForeignCheckpoint:
    """Opens a folder in a foreign layout, finds out its family, and pairs parameters with tensors.

    Args:
        path: A diffusers pipeline folder, or the folder of one text encoder.
        family: Its family, where it cannot be told or is to be made sure of.
        without: Towers to leave out.

    Raises:
        CheckpointError: Not such a folder, of another model or family, or its tensors are not those of its
            architecture.
        ConfigError: A `config.json` that cannot be honoured.
    """
    without = set(without)
    found = read_components(path, skip=folders_of(without))
    matched = find_family(path, found, family)
    absent = {t.name for t in matched.towers if t.optional and not ({"", t.folder} & found.components.keys())}
    matched = matched.without(without | absent)
    if matched.zero_negative_key in found.index:
        zeros = found.index[matched.zero_negative_key]
        if not isinstance(zeros, bool):
            raise CheckpointError(
                f"{path}/model_index.json: {matched.zero_negative_key} must be true or false, found {zeros!r}."
            )
        matched = dataclasses.replace(matched, zero_negative=zeros)
    towers = {}
    for tower in matched.towers:
        alone = tower.folder not in found.components
        component = found.components["" if alone else tower.folder]
        towers[tower.name] = _open_tower(tower, component, path if alone else path / tower.tokenizer_folder)
    return ForeignCheckpoint(
        path=path,
        layout="text encoder folder" if "" in found.components else "diffusers folder",
        family=matched.with_configs({name: tower.config for name, tower in towers.items()}),
        towers=towers,
    )


def _open_tower(tower: Tower, component: Component, tokenizer_folder: Path) -> ForeignTower:
    config, source_blocks = component.config, None
    if isinstance(config, ClipTextConfig) and isinstance(tower.config, ClipTextConfig):
        source_blocks = config.num_hidden_layers
        if component.whole:
            # A whole CLIPModel keeps the blocks that a diffusion model leaves out (SD 2: the last of 24).
            blocks = min(source_blocks, tower.config.num_hidden_layers)
            config = dataclasses.replace(config, num_hidden_layers=blocks)
        if tower.config.projection_dim is None:
            config = dataclasses.replace(config, projection_dim=None)
    source = open_folder(component.folder)
    key_map = map_keys(source.tensors, config, str(component.folder), source_blocks=source_blocks)
    return ForeignTower(config, source, key_map, tokenizer_folder, tower.pad_token)
