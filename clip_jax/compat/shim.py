"""Puts the classes on `transformers`, for code that looks them up there by name. Never done unless asked for."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
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

# Modules of transformers, names, and what they had there when `install` was called; None while it is not.
_before: list[tuple[ModuleType, str, Any]] | None = None
_ABSENT = object()

# Name -> module that `install` has made.
_made: dict[str, ModuleType] = {}


def install() -> None:
    """Puts `FlaxCLIPTextModel`, `FlaxCLIPTextModelWithProjection` and `FlaxT5EncoderModel` on `transformers`.

    And their base classes `FlaxPreTrainedModel` and `FlaxCLIPTextPreTrainedModel`, which loaders check against; and all
    of them in the modules that transformers 4 had them in, which are made if they are gone
    (`transformers.models.clip.modeling_flax_clip`). Call it before the pipeline is imported. Until `uninstall` the
    classes say that they are of transformers (`__module__`), as pipelines expect that write the name of a class's
    library to disk; where they are unpickled, it has to be called too. To call it again changes nothing. Where
    transformers is version 4, its own classes are replaced.

    Raises:
        ClipJaxError: transformers is not installed.
    """
    global _before
    transformers = _transformers()
    if _before is not None and _before[0][0] is transformers:
        return
    uninstall()  # transformers 5 may have put another module in its place
    try:
        places = [(module, cls) for cls, home in _HOMES.items() for module in (transformers, _module(home))]
    except BaseException:  # a module of transformers that this version of JAX breaks: as if it had not been called
        _remove_made()
        raise
    _before = []
    for module, cls in places:
        # Not getattr, by which transformers 4 would import its own.
        _before.append((module, cls.__name__, vars(module).get(cls.__name__, _ABSENT)))
        setattr(module, cls.__name__, cls)
        cls.__module__ = _HOMES[cls]


def uninstall() -> None:
    """Puts `transformers` back as it was; without `install` before, changes nothing."""
    global _before
    if _before is None:
        return
    for module, name, value in _before:
        if value is _ABSENT:
            delattr(module, name)
        else:
            setattr(module, name, value)
    _remove_made()
    for cls, ours in _OURS.items():
        cls.__module__ = ours
    _before = None


def _module(name: str) -> ModuleType:
    """A module of transformers; an empty one where it has none, for classes to be found in when they are unpickled."""
    try:
        return importlib.import_module(name)
    except ImportError:
        made = _made[name] = sys.modules[name] = ModuleType(name)
        made.__spec__ = ModuleSpec(name, loader=None)  # `importlib.util.find_spec` asks for it
        parent, _, child = name.rpartition(".")
        setattr(_module(parent), child, made)
        return made


def _remove_made() -> None:
    for name, module in _made.items():
        parent, _, child = name.rpartition(".")
        if sys.modules.get(name) is module:
            del sys.modules[name]
        if parent in sys.modules and vars(sys.modules[parent]).get(child) is module:
            delattr(sys.modules[parent], child)
    _made.clear()


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ClipJaxError(
            "transformers is not installed, so that there is nothing to put classes on. Import them from "
            "clip_jax.compat, or install transformers."
        ) from error
