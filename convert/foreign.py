"""A checkpoint in a foreign layout, opened: which family it is, and where every parameter comes from.

Read so far: a diffusers pipeline folder (`text_encoder/`, `tokenizer/`, `model_index.json`), a folder with
one text encoder as `save_pretrained` writes it, and a whole `CLIPModel`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clip_jax.config import ClipTextConfig
from clip_jax.convert.hf_clip import map_keys, to_flax
from clip_jax.convert.source import TensorSource, open_folder
from clip_jax.errors import CheckpointError, ConfigError
from clip_jax.families import FAMILIES, Family, Tower
from clip_jax.params.cast import cast
from clip_jax.params.shapes import TensorSpec, layer_groups, param_shapes, unflatten
from clip_jax.progress import byte_bar
from clip_jax.tokenizers import ClipTokenizer

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class ForeignTower:
    """One text encoder of a foreign checkpoint.

    Attributes:
        config: Its architecture.
        source: Its tensors.
        keys: Parameter path -> (source key, whether to transpose).
        ignored: Source keys left aside by name.
        tokenizer: Of its folder, or the packaged one where it has none.
    """

    config: ClipTextConfig
    source: TensorSource
    keys: Mapping[str, tuple[str, bool]]
    ignored: list[str]
    tokenizer: ClipTokenizer

    def specs(self) -> dict[str, TensorSpec]:
        """Path -> shape and dtype, in the order of the tree."""
        shapes = param_shapes(self.config)
        return {p: TensorSpec(shapes[p], self.source.tensors[key].dtype) for p, (key, _) in self.keys.items()}

    def read(self, path: str, dtype: np.dtype | None) -> np.ndarray:
        """One parameter, in memory of its own, cast to `dtype` (None keeps that of the source)."""
        key, transposed = self.keys[path]
        array = to_flax(self.source.read(key), transposed)
        return np.array(cast(array, dtype or array.dtype, key), order="C")


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
    def tokenizers(self) -> dict[str, ClipTokenizer]:
        """Tower name -> tokenizer."""
        return {name: tower.tokenizer for name, tower in self.towers.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the params, as they are stored."""
        return sum(spec.nbytes for tree in self.specs().values() for spec in tree.values())

    def specs(self) -> dict[str, dict[str, TensorSpec]]:
        """Tower name -> path -> shape and dtype."""
        return {name: tower.specs() for name, tower in self.towers.items()}

    def read_params(self, dtype: np.dtype | None, *, progress: bool | None = None) -> dict[str, Any]:
        """Loads the params onto the default device, tensor by tensor.

        Raises:
            CheckpointError: float16 cannot hold a value.
        """
        leaves: dict[str, dict[str, jax.Array]] = {name: {} for name in self.towers}
        with byte_bar(self.nbytes, "Loading", progress) as bar:
            for part in self.parts(dtype, bar.update):
                for name, arrays in part.items():
                    leaves[name] |= {path: jax.device_put(array) for path, array in arrays.items()}
        return {name: unflatten(tree) for name, tree in leaves.items()}

    def parts(
        self, dtype: np.dtype | None, update: Callable[[int], object]
    ) -> Iterator[dict[str, dict[str, np.ndarray]]]:
        """Tower name -> path -> array, one block of the model in memory at a time.

        Args:
            dtype: To cast to; None keeps that of the source.
            update: Called with the number of source bytes that are done since its last call.

        Raises:
            CheckpointError: float16 cannot hold a value.
        """
        for name, tower in self.towers.items():
            specs = tower.specs()
            for group in layer_groups(specs):
                yield {name: {path: tower.read(path, dtype) for path in group}}
                update(sum(specs[path].nbytes for path in group))

    def provenance(self) -> dict[str, Any]:
        """Where the weights come from, without reading them. JSON."""
        return {
            "source": self.path.name,
            "format": f"{self.layout}, safetensors",
            "towers": {
                name: {
                    "files": [file.name for file in tower.source.files],
                    "dtypes": sorted({spec.dtype.name for spec in tower.specs().values()}),
                    "ignored": tower.ignored,
                }
                for name, tower in self.towers.items()
            },
        }


def open_foreign(path: Path, *, family: str | None = None) -> ForeignCheckpoint:
    """Opens a folder in a foreign layout, finds out its family, and pairs parameters with tensors.

    Args:
        path: A diffusers pipeline folder, or the folder of one text encoder.
        family: Its family, where it cannot be told or is to be made sure of.

    Raises:
        CheckpointError: Not such a folder, of another model or family, or its tensors are not those of its
            architecture.
        ConfigError: A `config.json` that cannot be honoured.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is a single file; expected a diffusers folder or a text encoder's folder."
        )
    if not any(path.iterdir()):
        raise CheckpointError(
            f"{path} is an empty folder; expected a diffusers folder or a text encoder's folder."
        )
    folders = _text_folders(path)
    components = {name: _read_component(folder) for name, folder in folders.items()}
    found = _find_family(path, family, components)
    towers = {}
    for tower in found.towers:
        alone = tower.folder not in components
        tokenizer_folder = path if alone else path / tower.tokenizer_folder
        towers[tower.name] = _open_tower(tower, components["" if alone else tower.folder], tokenizer_folder)
    return ForeignCheckpoint(
        path=path,
        layout="text encoder folder" if "" in components else "diffusers folder",
        family=found.with_configs({name: tower.config for name, tower in towers.items()}),
        towers=towers,
    )


@dataclasses.dataclass(frozen=True)
class _Component:
    """The folder of one text encoder, its architecture, and whether it is a whole CLIPModel."""

    folder: Path
    config: ClipTextConfig
    whole: bool


def _text_folders(path: Path) -> dict[str, Path]:
    """Folder name -> folder of every text encoder of a pipeline; "" -> `path` itself if it is no pipeline."""
    if (path / "model_index.json").is_file():
        index = _read_json(path / "model_index.json")
        # [null, null] stands for a component that the pipeline was saved without.
        names = [
            n
            for n, entry in index.items()
            if n.startswith("text_encoder") and entry not in (None, [None, None])
        ]
        if not names:
            raise CheckpointError(
                f"{path} is a {index.get('_class_name', 'pipeline')} without a text_encoder "
                f"(model_index.json names none). Expected a pipeline that is conditioned on text."
            )
        missing = [name for name in names if not (path / name).is_dir()]
        if missing:
            raise CheckpointError(
                f"{path} lacks the folders {', '.join(missing)}, which its model_index.json names."
            )
        return {name: path / name for name in names}
    names = [folder.name for folder in path.glob("text_encoder*") if folder.is_dir()]
    if names:
        return {name: path / name for name in sorted(names)}
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} has neither model_index.json nor text_encoder/ nor config.json; expected a diffusers "
            f"folder or a text encoder's, found {', '.join(sorted(p.name for p in path.iterdir())[:8])}."
        )
    return {"": path}


def _read_component(folder: Path) -> _Component:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json; expected one beside the weights. Copy it as well."
        )
    hf = _read_json(folder / "config.json")
    try:
        config = ClipTextConfig.from_hf(hf)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error
    return _Component(folder, config, whole=hf.get("model_type") == "clip")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}. Get the file again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; expected an object.")
    return content


def _find_family(path: Path, name: str | None, components: Mapping[str, _Component]) -> Family:
    """The family called `name`, or else the one whose towers have the widths that are found.

    A width that no known tower has (a scaled-down model) is accepted under a family given by name.
    """
    wanted = [find_family(name)] if name else list(FAMILIES.values())
    mismatches = {family.name: _mismatch(family, components, exact=name is None) for family in wanted}
    fitting = [family for family in wanted if mismatches[family.name] is None]
    if len(fitting) == 1:
        return fitting[0]
    reasons = "; ".join(f"{family}: {reason}" for family, reason in mismatches.items())
    if name:
        raise CheckpointError(f"{path} is not of family {reasons}.")
    raise CheckpointError(f"{path} is of no known family ({reasons}). If you know better, pass family=.")


def find_family(name: str) -> Family:
    """The family called `name`.

    Raises:
        CheckpointError: There is none; lists those there are.
    """
    if name not in FAMILIES:
        raise CheckpointError(f"Unknown family {name!r}; expected one of {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def _mismatch(family: Family, components: Mapping[str, _Component], *, exact: bool) -> str | None:
    """Why these text encoders cannot be those of `family`; None if they can."""
    folders = sorted(tower.folder for tower in family.towers)
    if sorted(components) != folders and (list(components) != [""] or len(folders) > 1):
        found = ", ".join(filter(None, components)) or "one text encoder"
        return f"expected {', '.join(folders)}, found {found}"
    known_widths = {t.config.hidden_size: t.name for f in FAMILIES.values() for t in f.towers}
    for tower in family.towers:
        width = components["" if "" in components else tower.folder].config.hidden_size
        if width != tower.config.hidden_size and (exact or width in known_widths):
            whose = f", that of {known_widths[width]}" if width in known_widths else ""
            return f"expected width {tower.config.hidden_size} ({tower.name}), found {width}{whose}"
    return None


def _open_tower(tower: Tower, component: _Component, tokenizer_folder: Path) -> ForeignTower:
    config = component.config
    if component.whole:
        # A whole CLIPModel keeps the blocks that a diffusion model leaves out (SD 2: the last of 24).
        blocks = min(config.num_hidden_layers, tower.config.num_hidden_layers)
        config = dataclasses.replace(config, num_hidden_layers=blocks)
    if tower.config.projection_dim is None:
        config = dataclasses.replace(config, projection_dim=None)
    source = open_folder(component.folder)
    keys, ignored = map_keys(
        source.tensors, config, str(component.folder), source_blocks=component.config.num_hidden_layers
    )
    if any((tokenizer_folder / name).is_file() for name in _TOKENIZER_FILES):
        tokenizer = ClipTokenizer.from_folder(tokenizer_folder)
    else:
        tokenizer = ClipTokenizer.packaged(tower.pad_token)
    return ForeignTower(config, source, keys, ignored, tokenizer)
