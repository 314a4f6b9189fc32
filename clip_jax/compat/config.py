"""The configuration that a model shows: the fields of a `config.json`, as attributes."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_jax.config import ClipTextConfig, TowerConfig, config_from_hf
from clip_jax.errors import ClipJaxError, ConfigError

_RUN_TIME = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
# What transformers takes for dropout where a config does not say.
_DROPOUT = {"t5": {"dropout_rate": 0.1}, "clip_text_model": {"attention_dropout": 0.0}}
# Names that transformers' T5Config takes for its own, too (its `attribute_map`).
_T5_ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}


class HfConfig:
    """The part of transformers' `PretrainedConfig` that pipelines use, without transformers.

    Fields are attributes and may be set; those of `config.json` that are not ours are kept. T5's have the other names
    that transformers knows them by, too.
    """

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(_RUN_TIME | fields)
        for alias in fields.keys() & (_T5_ALIASES.keys() if fields.get("model_type") == "t5" else ()):
            self.__dict__.setdefault(_T5_ALIASES[alias], self.__dict__.pop(alias))  # of both names the own one counts

    def own_name(self, name: str) -> str:
        """That of a field for one of its names."""
        return _T5_ALIASES.get(name, name) if self.__dict__.get("model_type") == "t5" else name

    def __getattr__(self, name: str) -> Any:  # what is not in `__dict__`
        try:
            return self.__dict__[self.own_name(name)]
        except KeyError:
            raise AttributeError(f"The config has no field {name!r}.", name=name, obj=self) from None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self.own_name(name), value)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(self.own_name(name))

    def to_dict(self) -> dict[str, Any]:
        """All fields, copied."""
        return copy.deepcopy(self.__dict__)

    def to_json_string(self, use_diff: bool = True) -> str:  # noqa: ARG002
        """All fields as JSON; the argument of transformers makes no difference here."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes `config.json`."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        Path(save_directory, "config.json").write_text(self.to_json_string())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HfConfig) and self.__dict__ == other.__dict__

    def __repr__(self) -> str:
        return f"HfConfig {self.to_json_string()}"


def shown_config(config: Any, tower: TowerConfig) -> Any:
    """What `model.config` is: a config object of transformers as it was passed, anything else with all fields."""
    if hasattr(config, "to_json_string"):
        return config
    fields = dict(config) if isinstance(config, Mapping) else {}
    if fields.get("model_type") == "clip":  # a whole CLIPModel: its text half, and the width of its projection
        whole = fields
        fields = dict(whole.get("text_config") or {}) | (whole.get("text_config_dict") or {})
        if "projection_dim" in whole:
            fields["projection_dim"] = whole["projection_dim"]
    ours = tower.to_hf()
    kind = ours["model_type"]
    return HfConfig(**(_DROPOUT[kind] | ours | fields | {"model_type": kind}))


def with_fields(config: Mapping[str, Any], architecture: str, fields: Mapping[str, Any]) -> HfConfig:
    """What `model.config` is for a `config.json`, with fields set that `from_pretrained` was given.

    They are set before a model is made from it, as `PretrainedConfig.from_dict` of transformers 4 does, so that they
    say what is computed.

    Args:
        config: The dict of a `config.json`.
        architecture: As in `tower_config`.
        fields: Name -> value.

    Raises:
        ConfigError: As in `tower_config`.
        ClipJaxError: The config has no such field.
    """
    tower = tower_config(config, architecture)
    shown: HfConfig = shown_config(config, tower)
    for name, value in fields.items():
        if shown.own_name(name) not in vars(shown):
            raise ClipJaxError(
                f"Flax{architecture}.from_pretrained has no argument {name!r}, and its config no such field."
            )
        setattr(shown, name, value)
    return shown


def tower_config(config: Any, architecture: str) -> TowerConfig:
    """Our own configuration, from one of transformers 4 or 5, one of ours, or the dict of a `config.json`.

    Args:
        config: Any of these.
        architecture: The class to read it for: "CLIPTextModel" has no projection, whatever the config says of its
            width, "CLIPTextModelWithProjection" has one.

    Raises:
        ConfigError: None of these, of another kind of model, or not to be honoured.
    """
    model_type = "t5" if architecture == "T5EncoderModel" else "clip_text_model"
    if isinstance(config, TowerConfig):
        config = config.to_hf()
    elif hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"Expected a config of transformers or of clip_jax, or a dict, found {type(config).__name__}."
        )
    fields = {"model_type": model_type, **config, "architectures": [architecture]}
    read = config_from_hf(fields)
    if read.to_hf()["model_type"] != model_type:
        raise ConfigError(f"Flax{architecture} is made from a {model_type!r}, found {fields['model_type']!r}.")
    if isinstance(read, ClipTextConfig) and architecture == "CLIPTextModel":
        return dataclasses.replace(read, projection_dim=None)
    return read
