"""Text encoders for JAX diffusion pipelines: prompt in, UNet-ready embeddings out.

Names are imported when they are first used: `import clip_jax` alone imports neither jax nor flax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clip_jax._version import __version__ as __version__

if TYPE_CHECKING:
    from clip_jax.compilation import enable_compilation_cache as enable_compilation_cache
    from clip_jax.config import ClipTextConfig as ClipTextConfig
    from clip_jax.config import T5EncoderConfig as T5EncoderConfig
    from clip_jax.embed import text_embeddings as text_embeddings
    from clip_jax.encoder import TextEncoder as TextEncoder
    from clip_jax.errors import CheckpointError as CheckpointError
    from clip_jax.errors import ClipJaxError as ClipJaxError
    from clip_jax.errors import ConfigError as ConfigError
    from clip_jax.errors import PromptTooLongError as PromptTooLongError
    from clip_jax.exported import load_exported as load_exported
    from clip_jax.families import FAMILIES as FAMILIES
    from clip_jax.families import Family as Family
    from clip_jax.families import refiner_time_ids as refiner_time_ids
    from clip_jax.families import time_ids as time_ids
    from clip_jax.loading import info as info
    from clip_jax.loading import load as load
    from clip_jax.loading import load_tokenizers as load_tokenizers
    from clip_jax.models import ClipTextModel as ClipTextModel
    from clip_jax.models import T5Encoder as T5Encoder
    from clip_jax.structs import TextEmbeddings as TextEmbeddings
    from clip_jax.structs import Tokens as Tokens

_HOMES = {
    "CheckpointError": "errors",
    "ClipJaxError": "errors",
    "ClipTextConfig": "config",
    "ClipTextModel": "models",
    "ConfigError": "errors",
    "FAMILIES": "families",
    "Family": "families",
    "PromptTooLongError": "errors",
    "T5Encoder": "models",
    "T5EncoderConfig": "config",
    "TextEmbeddings": "structs",
    "TextEncoder": "encoder",
    "Tokens": "structs",
    "enable_compilation_cache": "compilation",
    "info": "loading",
    "load": "loading",
    "load_exported": "exported",
    "load_tokenizers": "loading",
    "refiner_time_ids": "families",
    "text_embeddings": "embed",
    "time_ids": "families",
}

# Rooms with names of their own.
_ROOMS = ("compat", "convert", "nnx")

__all__ = ["__version__", *_HOMES, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
