"""Params as arrays that stay what and where they are, and whether they are still the ones they were."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.models.quantized import is_quantized
from clip_jax.structs import is_traced


@jax.transfer_guard_host_to_device("allow")
def settled(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Params that stay as they are, and where they are; the very same ones if they do anyway.

    What is NumPy's is copied to the default device: programs would copy it there at every call, and it could be changed
    in place, which no `Snapshot` sees. What lies on another device is committed to it: `jax.default_device` puts it
    there but does not bind it, and every call after that would copy it to the device that is the default then.
    """
    default = {jax.local_devices()[0]}

    def settle(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return jnp.array(leaf)
        if isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.devices() != default:
            return jax.device_put(leaf, leaf.sharding)  # no copy, and of a committed one the very same array
        return leaf

    found = jax.tree.map(settle, params)
    same = all(map(operator.is_, jax.tree.leaves(found), jax.tree.leaves(params)))
    return params if same else found


def devices_of(params: Mapping[str, Any]) -> set[jax.Device]:
    """Where the arrays of params lie."""
    return {device for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) for device in leaf.devices()}


class Snapshot:
    """Params as they were when it was taken.

    Attributes:
        params: With dicts of its own, and the same arrays.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = jax.tree.map(lambda leaf: leaf, params, is_leaf=is_quantized)
        self._changes = any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))

    def is_of(self, params: Mapping[str, Any]) -> bool:
        """Whether `params` have the very same arrays in the same places; single numbers need only be equal.

        Never where one is NumPy's, put there in place: it may have been changed likewise.
        """
        # Dicts are compared in C, their values by identity first: that is faster than to flatten them.
        # Two different arrays are compared element by element, and the result of that is no bool.
        try:
            return not self._changes and bool(self.params == params)
        except Exception:  # whatever arrays raise: of other shapes, on other devices, deleted
            return False
