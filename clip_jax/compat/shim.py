"""Puts the classes on `transformers`, for code that looks them up there by name. Never done unless asked for."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from clip_jax.compat.base import FlaxPreTrainedModel
from clip_jax.compat.clip import FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection, FlaxCLIPTextPreTrainedModel
from clip_jax.compat.t5 import FlaxT5EncoderModel
from clip_jax.errors import ClipJaxError

# Where transformers 4 had each class. Pipelines write the first part of it into `model_index.json`, and read it there.
_HOMES: dict[type[FlaxPreTrainedModel], str] = {
    FlaxPreTrainedModel: "transformers.modeling_flax_utils",
    FlaxCLIPTextPreTrainedModel: "transformers.models.clip.modeling_flax_clip",
    FlaxCLIPTextModel: "transformers.models.clip.modeling_flax_clip",
    FlaxCLIPTextModelWithProjection: "transformers.models.clip.modeling_flax_clip",
    FlaxT5EncoderModel: "transformers.models.t5.modeling_flax_t5",
}
_OURS = {cls: cls.__module__ for cls in _HOMES}

# What transformers had under these names when `install` was called; None while it is not.
_before: dict[str, Any] | None = None


def install() -> None:
    """Puts `FlaxCLIPTextModel`, `FlaxCLIPTextModelWithProjection` and `FlaxT5EncoderModel` on `transformers`.

    And their base classes `FlaxPreTrainedModel` and `FlaxCLIPTextPreTrainedModel`, which loaders check against. Call
    it before the pipeline is imported. Until `uninstall` the classes say that they are of transformers
    (`__module__`), as pipelines expect that write the name of a class's library to disk. To call it again changes
    nothing. Where transformers is version 4, its own classes are replaced.

    Raises:
        ClipJaxError: transformers is not installed.
    """
    global _before
    if _before is not None:
        return
    transformers = _transformers()
    # Not getattr, by which transformers 4 would import its own.
    _before = {cls.__name__: vars(transformers)[cls.__name__] for cls in _HOMES if cls.__name__ in vars(transformers)}
    for cls, home in _HOMES.items():
        setattr(transformers, cls.__name__, cls)
        cls.__module__ = home


def uninstall() -> None:
    """Puts `transformers` back as it was; without `install` before, changes nothing."""
    global _before
    if _before is None:
        return
    transformers = _transformers()
    for cls, ours in _OURS.items():
        delattr(transformers, cls.__name__)
        cls.__module__ = ours
    for name, value in _before.items():
        setattr(transformers, name, value)
    _before = None


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ClipJaxError(
            "transformers is not installed, so that there is nothing to put classes on. Import them from "
            "clip_jax.compat, or install transformers."
        ) from error
