"""One text encoder from a folder or a Hub repo, as `from_pretrained` reads it, and back to a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax

from clip_jax.compat.config import tower_config
from clip_jax.config import TowerConfig
from clip_jax.convert.export import write_component
from clip_jax.convert.hub import Access
from clip_jax.convert.resolve import resolve
from clip_jax.convert.tower import open_alone
from clip_jax.errors import CheckpointError, ClipJaxError, ConfigError
from clip_jax.params.shapes import TensorSpec, check_shapes, flatten, param_shapes, unflatten
from clip_jax.params.shard import over_auto_axes
from clip_jax.progress import byte_bar
from clip_jax.tokenizers.files import read_json

#: One sharding for all, a tree like that of the params, or a function of a path and its shape and dtype.
Shardings: TypeAlias = (
    jax.sharding.Sharding | Mapping[str, Any] | Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]
)


class Pretrained(NamedTuple):
    """What a folder held: the fields of its `config.json`, or the config that was given instead; and the params."""

    config: Any
    params: dict[str, Any]


def load_pretrained(
    source: str | os.PathLike[str],
    architecture: str,
    config: Any,
    access: Access,
    shardings: Shardings | None,
) -> Pretrained:
    """Reads one text encoder; arguments and errors as in `FlaxPreTrainedModel.from_pretrained`.

    Args:
        source: A folder, or a repo id.
        architecture: "CLIPTextModel", "CLIPTextModelWithProjection" or "T5EncoderModel".
        config: To use instead of the folder's, if not None.
        access: How to get at a repo, and which folder below the source is meant.
        shardings: Where params go; None is the default device.
    """
    folder = resolve(source, access).path / (access.folder or "")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; expected one with config.json and weights.")
    if config is None:
        if not (folder / "config.json").is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
            raise CheckpointError(
                f"{folder} has no config.json, found {found or 'nothing'}. Name the text encoder's folder with "
                f"subfolder=, or pass config=."
            )
        config = read_json(folder / "config.json")
    try:
        tower = tower_config(config, architecture)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    opened = open_alone(folder, tower)
    placement = None if shardings is None else _placement(shardings, tower)
    with byte_bar(sum(spec.nbytes for spec in opened.specs().values()), "Loading", None) as bar:
        return Pretrained(config, unflatten(opened.read_params(None, placement, bar.update)))


def save_pretrained(folder: str | os.PathLike[str], config: Any, tower: TowerConfig, params: Mapping[str, Any]) -> None:
    """Writes `config.json` and `model.safetensors`; arguments and errors as in the class."""
    shapes = param_shapes(tower)
    leaves = {path: leaf for path, leaf in flatten(params).items() if path in shapes}
    check_shapes(shapes, {path: tuple(leaf.shape) for path, leaf in leaves.items()}, "What is to be saved")
    fields = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    write_component(Path(folder), fields, {path: leaves[path] for path in shapes})


def _placement(shardings: Shardings, tower: TowerConfig) -> Callable[[str, TensorSpec], jax.sharding.Sharding]:
    """`shardings` as a function that the readers take."""
    if isinstance(shardings, jax.sharding.Sharding):
        whole = over_auto_axes(shardings)
        return lambda path, spec: whole  # noqa: ARG005
    if callable(shardings):
        function = shardings
        return lambda path, spec: over_auto_axes(function(path, jax.ShapeDtypeStruct(spec.shape, spec.dtype)))
    leaves = flatten(shardings)
    missing = sorted(param_shapes(tower).keys() - leaves.keys())
    if missing or not all(isinstance(leaf, jax.sharding.Sharding) for leaf in leaves.values()):
        raise ClipJaxError(
            f"Expected shardings to be a Sharding, a function, or a tree with a Sharding for every param, found "
            f"{f'none for {len(missing)} params, such as {missing[0]}' if missing else 'other leaves'}."
        )
    return lambda path, spec: over_auto_axes(leaves[path])  # noqa: ARG005
