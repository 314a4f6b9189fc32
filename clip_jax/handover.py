"""Params as few arguments: what the program of an accelerator is called with.

JAX looks at each argument of every call, and a text encoder has hundreds of parameters, most of them norms and biases.
Where the computation itself takes less than a millisecond that is a good part of it. So the small ones lie side by side
in one array for each dtype, and the program takes them apart; the large ones are handed over as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from clip_jax.embed import Params, Skips, embed
from clip_jax.families import Family
from clip_jax.models import Attention
from clip_jax.models.quantized import is_quantized
from clip_jax.params.snapshot import Snapshot, devices_of
from clip_jax.structs import TextEmbeddings, Tokens, is_traced

#: Elements. Norms and biases have less, and copies of them weigh nothing; kernels and embeddings have more.
#: What is quantised goes as it is: its scales are read by products, out of whose kernels XLA keeps slices.
_SMALL = 2**15

_ARRAYS = (jax.Array, jax.ShapeDtypeStruct)


class Packed(NamedTuple):
    """Params as arguments: the small ones joined, by the name of their dtype, and the large ones."""

    joined: dict[str, jax.Array]
    large: list[Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where params are in a `Packed`.

    Attributes:
        tree: Of the params.
        places: For each leaf its dtype and shape where it is small; None where it is among the large ones.
    """

    tree: Any
    places: tuple[tuple[str, tuple[int, ...]] | None, ...]

    def unpacked(self, packed: Packed) -> Params:
        """The params again; to be traced."""
        large, begins = iter(packed.large), dict.fromkeys(packed.joined, 0)
        leaves = []
        for place in self.places:
            if place is None:
                leaves.append(next(large))
                continue
            dtype, shape = place
            begin, end = begins[dtype], begins[dtype] + math.prod(shape)
            leaves.append(jax.lax.slice(packed.joined[dtype], (begin,), (end,)).reshape(shape))
            begins[dtype] = end
        params: Params = jax.tree.unflatten(self.tree, leaves)
        return params


def pack(params: Params) -> tuple[Packed, Layout]:
    """Params on one device, or their shapes, as few arguments there; and how they are to be unpacked."""
    leaves, tree = jax.tree.flatten(params, is_leaf=is_quantized)
    places = tuple(
        (leaf.dtype.name, leaf.shape) if isinstance(leaf, _ARRAYS) and leaf.size <= _SMALL else None for leaf in leaves
    )
    small: dict[str, list[Any]] = {}
    for place, leaf in zip(places, leaves, strict=True):
        if place is not None:
            small.setdefault(place[0], []).append(leaf)
    large = [leaf for place, leaf in zip(places, leaves, strict=True) if place is None]
    return Packed({dtype: _joined(members) for dtype, members in small.items()}, large), Layout(tree, places)


@jax.transfer_guard("allow")
@jax.ensure_compile_time_eval()  # within a `jit` too: what is kept must be no tracer
def _joined(arrays: list[Any]) -> Any:
    """Side by side, by way of the host: nothing is compiled for it. Of shapes and dtypes the like."""
    if isinstance(arrays[0], jax.ShapeDtypeStruct):
        length = sum(array.size for array in arrays)
        return jax.ShapeDtypeStruct((length,), arrays[0].dtype, sharding=arrays[0].sharding)
    values = np.concatenate([value.reshape(-1) for value in jax.device_get(arrays)])
    (device,) = arrays[0].devices()
    if any(array.committed for array in arrays):
        return jax.device_put(values, SingleDeviceSharding(device))
    with jax.default_device(device):
        return jax.device_put(values)


class Handover:
    """Params as an encoder hands them to its programs, one for each choice of layers.

    Attributes:
        others: What else the programs are made for: a family, a dtype, and what computes attention.
    """

    def __init__(self, params: Params, *others: Any) -> None:
        self.others = others
        self._snapshot = Snapshot(params)
        self._packed, self._layout = pack(params)
        self._programs: dict[Skips, Callable[[Packed, Tokens], TextEmbeddings]] = {}

    def is_of(self, params: Params, *others: Any) -> bool:
        """Whether params, and what else there is, are still those."""
        return self.others == others and self._snapshot.is_of(params)

    def __call__(self, tokens: Tokens, skips: Skips) -> TextEmbeddings:
        """Runs the program."""
        if skips not in self._programs:
            self._programs[skips] = program(self._layout, *self.others, skips)
        return self._programs[skips](self._packed, tokens)


def renewed(handover: Handover | None, params: Params, *others: Any) -> Handover | None:
    """The same if it is still of these params; otherwise one that is, or None where others were put in their place."""
    if handover is not None and handover.is_of(params, *others):
        return handover
    return Handover(params, *others) if pays(params) else None  # they may be traced now, or lie on a mesh


@functools.lru_cache(maxsize=64)
def program(
    layout: Layout, family: Family, dtype: np.dtype, attention: Attention, skips: Skips
) -> Callable[[Packed, Tokens], TextEmbeddings]:
    """`embed` on packed params, jitted; the same for all encoders whose params are laid out alike."""

    @jax.jit
    def text_embeddings(packed: Packed, tokens: Tokens) -> TextEmbeddings:
        return embed(layout.unpacked(packed), tokens, family, dtype, skips, attention)

    run: Callable[[Packed, Tokens], TextEmbeddings] = text_embeddings
    return run


def pays(params: Params) -> bool:
    """Whether params are on one device that is no CPU: there the same call takes tens of milliseconds."""
    if is_traced(params):
        return False
    devices = devices_of(params)
    return len(devices) == 1 and all(device.platform != "cpu" for device in devices)
