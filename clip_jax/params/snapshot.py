"""Params as arrays that stay as they are, and whether they are still the ones they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.models.quantized import is_quantized


def immutable(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Params with what is NumPy's copied to the default device; the very same ones if nothing is.

    Programs would copy it there at every call, and it could be changed in place, which no `Snapshot` sees.
    """
    if not any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params)):
        return params
    return jax.tree.map(lambda leaf: jnp.array(leaf) if isinstance(leaf, np.ndarray) else leaf, params)


class Snapshot:
    """Params as they were when it was taken.

    Attributes:
        params: With dicts of its own, and the same arrays.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = jax.tree.map(lambda leaf: leaf, params, is_leaf=is_quantized)

    def is_of(self, params: Mapping[str, Any]) -> bool:
        """Whether `params` have the very same arrays in the same places; single numbers need only be equal."""
        # Dicts are compared in C, their values by identity first: that is faster than to flatten them.
        # Two different arrays are compared element by element, and the result of that is no bool.
        try:
            return bool(self.params == params)
        except Exception:  # whatever arrays raise: of other shapes, on other devices, deleted
            return False
