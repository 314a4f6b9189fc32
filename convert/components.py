"""Which text encoders a folder holds, by its `model_index.json` and their `config.json`s."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from clip_jax.config import ClipTextConfig, T5EncoderConfig, TowerConfig, config_from_hf
from clip_jax.convert.infer import encoder_width
from clip_jax.convert.layouts import Encoder
from clip_jax.convert.source import ENCODER_FOLDER, WEIGHTS, open_source, pick_weights
from clip_jax.errors import CheckpointError, ConfigError
from clip_jax.tokenizers.files import exists, expanded, listing, names_in, read_json

#: An architecture, the dict of a transformers `config.json`, or the path of one.
ConfigLike = TowerConfig | Mapping[str, Any] | str | os.PathLike[str]

# Kind of a text encoder -> `model_type` of its `config.json`.
_MODEL_TYPES = {"clip": ("clip", "clip_text_model"), "t5": ("t5",)}


@dataclasses.dataclass(frozen=True)
class Component:
    """One text encoder.

    Attributes:
        folder: Where it is.
        config: Its architecture.
        whole: Whether it is a whole `CLIPModel`, the text encoder beside the image encoder.
    """

    folder: Path
    config: TowerConfig
    whole: bool


@dataclasses.dataclass(frozen=True)
class Components:
    """What a folder holds.

    Attributes:
        components: Folder name -> text encoder; "" for a folder that is itself one.
        index: `model_index.json`, if there is one.
    """

    components: dict[str, Component]
    index: dict[str, Any] = dataclasses.field(default_factory=dict)


def is_component_folder(path: Path) -> bool:
    """Whether a folder is to be read by its configs; one with nothing but weights is like a file of weights."""
    if not path.is_dir():
        return False
    names = names_in(path)
    described = names & {"model_index.json", "config.json"} or any(map(ENCODER_FOLDER.fullmatch, names))
    return bool(described) or pick_weights(names) is None


def read_components(path: Path, skip: Collection[str] = ()) -> Components:
    """Looks into a folder, but not into the folders `skip` below it.

    Raises:
        CheckpointError: No folder, or none with text encoders in it, or one that cannot be read.
        ConfigError: A `config.json` that cannot be honoured.
    """
    expected = "expected a diffusers folder or a text encoder's folder"
    if not names_in(path):
        raise CheckpointError(f"{path} is an empty folder; {expected}.")
    if exists(path / "model_index.json"):
        index = read_json(path / "model_index.json")
        folders = _named_folders(path, index, skip)
        return Components({name: _read_component(folder, index[name]) for name, folder in folders.items()}, index)
    folders = {name: path / name for name in sorted(filter(ENCODER_FOLDER.fullmatch, names_in(path)))}
    folders = {name: folder for name, folder in folders.items() if name not in skip and folder.is_dir()}
    if not folders:
        if not exists(path / "config.json"):
            raise CheckpointError(
                f"{path} has neither model_index.json nor text_encoder/ nor config.json; {expected}, "
                f"found {listing(path)}."
            )
        folders = {"": path}
    return Components({name: _read_component(folder) for name, folder in folders.items()})


def _named_folders(path: Path, index: dict[str, Any], skip: Collection[str]) -> dict[str, Path]:
    """Folder name -> folder of the text encoders that a model_index.json names."""
    # [null, null] stands for a component that the pipeline was saved without.
    names = [n for n, entry in index.items() if ENCODER_FOLDER.fullmatch(n) and entry not in (None, [None, None])]
    if not names:
        raise CheckpointError(
            f"{path} is a {index.get('_class_name', 'pipeline')} without a text_encoder "
            f"(model_index.json names none). Expected a pipeline that is conditioned on text."
        )
    names = [name for name in names if name not in skip]
    missing = [name for name in names if not (path / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"{path} lacks the folders {', '.join(missing)}, which its model_index.json names. Copy them as well, or "
            f"leave out what can be left out with without= (--without)."
        )
    return {name: path / name for name in names}


def read_beside(path: Path, encoder: Encoder) -> Component | None:
    """What the `config.json` beside weights tells of the one text encoder that they hold.

    Args:
        path: Its folder, or a file there of one of the usual names (`source.WEIGHTS`).
        encoder: What the weights are.

    Returns:
        None without a `config.json`, and for a file beside that of another kind or width of model; a folder is one.

    Raises:
        CheckpointError: It cannot be read.
        ConfigError: It cannot be honoured.
    """
    is_folder = path.is_dir()
    folder = path if is_folder else path.parent
    if not (is_folder or path.name in WEIGHTS) or not exists(folder / "config.json"):
        return None
    hf = read_json(folder / "config.json")
    if not is_folder and str(hf.get("model_type")) not in _MODEL_TYPES[encoder.kind]:
        return None
    # Where no class is named, the weights tell whether it projects.
    projects = "text_projection.weight" in encoder.state
    component = _component(folder, hf, "CLIPTextModelWithProjection" if projects else None)
    fits = is_folder or width(component.config) == encoder_width(encoder, str(path))
    return component if fits else None


def width(config: TowerConfig) -> int:
    """The width of the residual stream."""
    return config.hidden_size if isinstance(config, ClipTextConfig) else config.d_model


def _read_component(folder: Path, entry: object = None) -> Component:
    """The text encoder in a folder; `entry` is its entry in `model_index.json`, [library, class]."""
    if not exists(folder / "config.json"):
        raise CheckpointError(f"{folder} has no config.json; expected one beside the weights. Copy it as well.")
    named = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    hf = read_json(folder / "config.json")
    if named is None and hf.get("model_type") == "clip_text_model" and not hf.get("architectures"):
        # Where no class is named, the weights tell whether it projects.
        named = "CLIPTextModelWithProjection" if "text_projection.weight" in open_source(folder).state else None
    return _component(folder, hf, named)


def _component(folder: Path, hf: dict[str, Any], named: str | None) -> Component:
    """The text encoder in a folder; `named` is its class, where the `config.json` names none."""
    if named is not None and not hf.get("architectures"):
        hf = {**hf, "architectures": [named]}
    try:
        config = config_from_hf(hf)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error
    return Component(folder, config, whole=hf.get("model_type") == "clip")


def read_configs(given: Mapping[str, ConfigLike]) -> dict[str, TowerConfig]:
    """Tower name -> architecture, from configs, dicts or paths of a `config.json`.

    Raises:
        CheckpointError: A file that cannot be read.
        ConfigError: A config that cannot be honoured, or that is of no tower.
    """
    if not isinstance(given, Mapping) or "model_type" in given:
        found = "the dict of a config.json" if isinstance(given, Mapping) else type(given).__name__
        raise ConfigError(f"Expected config to name towers, such as {{'clip_l': ...}}, found {found}.")
    read = {}
    for name, config in given.items():
        if isinstance(config, ClipTextConfig | T5EncoderConfig):
            read[name] = config
        else:
            read[name] = config_from_hf(config if isinstance(config, Mapping) else read_json(expanded(config)))
    return read
