"""Which text encoders a folder holds, by its `model_index.json` and their `config.json`s."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from clip_jax.config import TowerConfig, config_from_hf
from clip_jax.errors import CheckpointError, ConfigError


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
        pipeline: `_class_name` of the pipeline, if there is one.
        zero_negative: `force_zeros_for_empty_prompt` of the pipeline, if it says so.
    """

    components: dict[str, Component]
    pipeline: str | None = None
    zero_negative: bool | None = None


def read_components(path: Path) -> Components:
    """Looks into a folder.

    Raises:
        CheckpointError: No folder, or none with text encoders in it.
        ConfigError: A `config.json` that cannot be honoured.
    """
    expected = "expected a diffusers folder or a text encoder's folder"
    if not path.is_dir():
        raise CheckpointError(f"{path} is a single file; {expected}.")
    if not any(path.iterdir()):
        raise CheckpointError(f"{path} is an empty folder; {expected}.")
    if (path / "model_index.json").is_file():
        index = _read_json(path / "model_index.json")
        folders = _named_folders(path, index)
        return Components(
            {name: _read_component(folder) for name, folder in folders.items()},
            pipeline=index.get("_class_name"),
            zero_negative=index.get("force_zeros_for_empty_prompt"),
        )
    folders = {folder.name: folder for folder in sorted(path.glob("text_encoder*")) if folder.is_dir()}
    if not folders:
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} has neither model_index.json nor text_encoder/ nor config.json; {expected}, "
                f"found {', '.join(sorted(p.name for p in path.iterdir())[:8])}."
            )
        folders = {"": path}
    return Components({name: _read_component(folder) for name, folder in folders.items()})


def _named_folders(path: Path, index: dict[str, Any]) -> dict[str, Path]:
    """Folder name -> folder of the text encoders that a model_index.json names."""
    # [null, null] stands for a component that the pipeline was saved without.
    names = [n for n, entry in index.items() if n.startswith("text_encoder") and entry not in (None, [None, None])]
    if not names:
        raise CheckpointError(
            f"{path} is a {index.get('_class_name', 'pipeline')} without a text_encoder "
            f"(model_index.json names none). Expected a pipeline that is conditioned on text."
        )
    missing = [name for name in names if not (path / name).is_dir()]
    if missing:
        raise CheckpointError(f"{path} lacks the folders {', '.join(missing)}, which its model_index.json names.")
    return {name: path / name for name in names}


def _read_component(folder: Path) -> Component:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; expected one beside the weights. Copy it as well.")
    hf = _read_json(folder / "config.json")
    try:
        config = config_from_hf(hf)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error
    return Component(folder, config, whole=hf.get("model_type") == "clip")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}. Get the file again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; expected an object.")
    return content
