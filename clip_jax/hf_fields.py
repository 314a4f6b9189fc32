"""Checks the fields of a transformers `config.json` against those that an architecture knows."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from clip_jax.errors import ConfigError


def check_fields(
    config: Mapping[str, Any],
    known: Collection[str],
    refused_unless: Mapping[str, tuple[Any, ...]],
    *,
    model: str,
    computes: str,
) -> None:
    """Refuses values that change what is computed, and warns by name about fields that are not known.

    Args:
        config: The dict of a `config.json`.
        known: Fields that are read, or have no effect.
        refused_unless: Field -> the values under which it changes nothing; None stands for an absent one too.
        model: The class that cannot honour other values.
        computes: What it computes.

    Raises:
        ConfigError: A field of `refused_unless` has another value.
    """
    for name, allowed in refused_unless.items():
        if config.get(name) not in allowed:
            raise ConfigError(
                f"The config has {name}={config[name]!r}, which {model} cannot honour: it computes {computes}."
            )
    unknown = sorted(set(config) - set(known) - set(refused_unless))
    if unknown:
        warnings.warn(
            f"The config has fields unknown to clip_jax, which are ignored: {', '.join(unknown)}.",
            UserWarning,
            stacklevel=3,
        )
