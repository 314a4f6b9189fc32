"""One text encoder from a folder or a Hub repo, as `from_pretrained` reads it, and back to a folder."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from clip_jax.compat.config import tower_config, with_fields
from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.convert.export import write_component
from clip_jax.convert.hub import Access
from clip_jax.convert.infer import blocks
from clip_jax.convert.layouts import one_encoder
from clip_jax.convert.resolve import resolve
from clip_jax.convert.source import open_source
from clip_jax.convert.tower import ForeignTower, open_alone
from clip_jax.errors import CheckpointError, ClipJaxError, ConfigError
from clip_jax.models.quantized import is_quantized
from clip_jax.params.shapes import TensorSpec, check_shapes, flatten, param_shapes, unflatten
from clip_jax.params.shard import over_auto_axes
from clip_jax.progress import byte_bar
from clip_jax.tokenizers.files import exists, listing, read_json

#: One sharding for all, a tree like that of the params, or a function of a path and its shape and dtype.
Shardings: TypeAlias = (
    jax.sharding.Sharding | Mapping[str, Any] | Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]
)


class Pretrained(NamedTuple):
    """What a folder held: its `config.json` as `model.config`, or the config that was given instead; and the params."""

    config: Any
    params: dict[str, Any]


def load_pretrained(
    source: str | os.PathLike[str],
    architecture: str,
    config: Any,
    fields: Mapping[str, Any],
    access: Access,
    shardings: Shardings | None,
) -> Pretrained:
    """Reads one text encoder; arguments and errors as in `FlaxPreTrainedModel.from_pretrained`.

    Args:
        source: A folder, or a repo id.
        architecture: "CLIPTextModel", "CLIPTextModelWithProjection" or "T5EncoderModel".
        config: To use instead of the folder's, if not None.
        fields: To set in the folder's config.
        access: How to get at a repo, and which folder below the source is meant.
        shardings: Where params go; None is the default device.
    """
    folder = resolve(source, access).path / (access.folder or "")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; expected one with config.json and weights.")
    if config is None:
        if not exists(folder / "config.json"):
            raise CheckpointError(
                f"{folder} has no config.json, found {listing(folder)}. Name the text encoder's folder with "
                f"subfolder=, or pass config=."
            )
    elif fields:
        raise ClipJaxError(
            f"Fields of the config are arguments of from_pretrained only where the folder's config is used, found "
            f"{', '.join(sorted(fields))} beside config=. Set them in that config."
        )
    try:
        if config is None:
            config = with_fields(read_json(folder / "config.json"), architecture, fields)
        tower = tower_config(config, architecture)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    opened = _open(folder, tower)
    placement = None if shardings is None else _placement(shardings, tower)
    with byte_bar(sum(spec.nbytes for spec in opened.specs().values()), "Loading", None) as bar:
        return Pretrained(config, unflatten(opened.read_params(None, placement, bar.update)))


def save_pretrained(folder: str | os.PathLike[str], config: Any, tower: TowerConfig, params: Mapping[str, Any]) -> None:
    """Writes `config.json` and `model.safetensors`; arguments and errors as in the class."""
    shapes, leaves = param_shapes(tower), flatten(params)
    if any(map(is_quantized, leaves.values())):
        raise CheckpointError(
            f"{folder}: the params are quantised, for which transformers has no names; expected whole ones. Save them "
            f"with the TextEncoder that they are of."
        )
    try:
        check_shapes(shapes, {path: np.shape(leaf) for path, leaf in leaves.items()}, "What is to be saved")
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Pass as params= the model's own; merge a LoRA into them, or leave it out."
        ) from error
    fields = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    write_component(Path(folder), fields, {path: leaves[path] for path in shapes})


def _open(folder: Path, tower: TowerConfig) -> ForeignTower:
    """Pairs the params of an architecture with the weights in a folder, less those of blocks after its own.

    Reference: transformers 4.57 `FlaxPreTrainedModel.from_pretrained`, which warns of weights that it has no use for.
    It makes up blocks that are not there, which is an error here.
    """
    source = open_source(folder)
    encoder = one_encoder(source.state, str(folder), "auto", source.metadata)
    found = blocks(encoder)
    whole: TowerConfig
    if isinstance(tower, ClipTextConfig):
        name, asked = "num_hidden_layers", tower.num_hidden_layers
        whole = dataclasses.replace(tower, num_hidden_layers=found or asked)
    else:
        name, asked = "num_layers", tower.num_layers
        whole = dataclasses.replace(tower, num_layers=found or asked)
    opened = open_alone(whole, encoder, source, str(folder))  # blocks left aside are held against the architecture, too
    if asked > found:
        raise CheckpointError(
            f"{folder}: the config asks for {name}={asked}, found weights of {found} blocks; none are made up. Set "
            f"{name} to {found} or less, or take the whole checkpoint."
        )
    if asked < found:
        warnings.warn(
            f"{folder}: the config asks for {name}={asked}, found weights of {found} blocks. The rest "
            f"is left aside; set {name}={found} to have all.",
            UserWarning,
            stacklevel=4,
        )
    keys = {path: opened.map.keys[path] for path in param_shapes(tower)}
    return dataclasses.replace(opened, config=tower, map=opened.map._replace(keys=keys))


def _placement(shardings: Shardings, tower: TowerConfig) -> Callable[[str, TensorSpec], jax.sharding.Sharding]:
    """`shardings` as a function that the readers take."""

    def fitting(path: str, spec: TensorSpec, sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
        if not isinstance(sharding, jax.sharding.Sharding):
            raise ClipJaxError(f"Expected shardings to have a Sharding for {path}, found {sharding!r}.")
        try:
            sharding.shard_shape(spec.shape)
        except (ValueError, IndexError) as error:
            raise ClipJaxError(
                f"shardings do not fit {path} with the shape {spec.shape}: {error} Leave that dimension whole."
            ) from error
        return over_auto_axes(sharding)

    if isinstance(shardings, jax.sharding.Sharding):
        whole = shardings
        return lambda path, spec: fitting(path, spec, whole)
    if callable(shardings):
        function = shardings
        return lambda path, spec: fitting(path, spec, function(path, jax.ShapeDtypeStruct(spec.shape, spec.dtype)))
    leaves = flatten(shardings)
    missing = sorted(param_shapes(tower).keys() - leaves.keys())
    if missing or not all(isinstance(leaf, jax.sharding.Sharding) for leaf in leaves.values()):
        raise ClipJaxError(
            f"Expected shardings to be a Sharding, a function, or a tree with a Sharding for every param, found "
            f"{f'none for {len(missing)} params, such as {missing[0]}' if missing else 'other leaves'}."
        )
    return lambda path, spec: fitting(path, spec, leaves[path])
