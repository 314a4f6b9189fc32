"""Quantised parameters, by qwix: which are quantised, how, and what they are stored as.

| scheme | kernels                                | token embedding          | products                             |
| ------ | -------------------------------------- | ------------------------ | ------------------------------------ |
| int8   | int8, a scale per output               | int8, a scale per row    | int8, activations with one per token |
| fp8    | float8_e4m3fn, a scale per output      | likewise, one per row    | on CUDA as in int8, else as in int4  |
| int4   | int4, a scale per output and 32 inputs | int4, one per 32 columns | in the dtype of the computation      |

Norms, biases, position embeddings and T5's relative bias stay arrays of `param_dtype`. Scales are bfloat16 in int4,
where there are many, and float32 in the others; of float16 they could leave the range. A quantised parameter is a
`qwix.QArray` where the array was, a pytree of two arrays; a checkpoint has these as `<path>/qvalue` and `<path>/scale`.

`clip_jax.models.quantized` computes with them. qwix is imported inside the functions: it takes a second.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from clip_jax.config import TowerConfig
from clip_jax.errors import CheckpointError, ClipJaxError
from clip_jax.models.quantized import is_quantized
from clip_jax.params.cast import param_dtype
from clip_jax.params.shapes import check_shapes, flatten, layer_groups, param_shapes

_QUANTIZED = re.compile(r"(^|/)(kernel|(token_embedding|shared)/embedding)$")
_PART = re.compile(r"(.+/(?:kernel|embedding))/(qvalue|scale)")

_PARTS = ("qvalue", "scale")

#: Axis -> how many of its indices share a scale.
_Tiles = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the parameters of a model are kept; `PLAIN`, or one of `SCHEMES`.

    Attributes:
        name: "int8", "fp8" or "int4"; None where nothing is quantised.
        qtype: Of quantised values.
        scale_dtype: Of their scales.
        tile: How many inputs of an output share a scale; None means all. Where they do not divide by it, the largest
            number is taken that divides both.
    """

    name: str | None
    qtype: np.dtype | None = None
    scale_dtype: np.dtype | None = None
    tile: int | None = None

    def takes(self, path: str) -> bool:
        """Whether the parameter at `path` is quantised."""
        return self.qtype is not None and _QUANTIZED.search(path) is not None

    def read_dtype(self, path: str, stored: np.dtype, dtype: np.dtype | None) -> np.dtype:
        """What a parameter is read as, for a tower in `dtype` (None keeps that of the source).

        What is to be quantised is read as it is stored, to be rounded once; what is quantised is never cast.
        """
        if dtype is None or self.takes(path) or owner_of(path) != path:
            return stored
        return param_dtype(path, dtype)

    def quantize(self, path: str, array: np.ndarray | jax.Array) -> Any:
        """The parameter as it is kept: a `qwix.QArray` if the scheme takes it, else `array` itself."""
        if not self.takes(path):
            return array
        quantized = _quantize(array, self.qtype, self.scale_dtype, *_axes(path, array.shape, self.tile))
        return jax.block_until_ready(quantized)  # or arrays that still wait for it would pile up

    def stored_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Path -> shape of what a checkpoint of this scheme has, for the shapes of the parameters."""
        stored: dict[str, tuple[int, ...]] = {}
        for path, shape in shapes.items():
            if not self.takes(path):
                stored[path] = shape
                continue
            output, tiles = _axes(path, shape, self.tile)
            shared = dict(tiles)
            scale = tuple(size if axis == output else size // shared.get(axis, size) for axis, size in enumerate(shape))
            stored |= {f"{path}/qvalue": shape, f"{path}/scale": scale}
        return stored


PLAIN = Scheme(None)
"""Nothing is quantised."""

SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "int8": Scheme("int8", np.dtype(np.int8), np.dtype(np.float32)),
        "fp8": Scheme("fp8", np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.float32)),
        "int4": Scheme("int4", np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.bfloat16), tile=32),
    }
)
"""Name -> scheme."""


def scheme_called(name: str | None) -> Scheme:
    """The scheme of that name; None is `PLAIN`.

    Raises:
        ClipJaxError: There is none.
    """
    if name is None:
        return PLAIN
    if name not in SCHEMES:
        raise ClipJaxError(f"quantize must be None, {', '.join(map(repr, SCHEMES))}, found {name!r}.")
    return SCHEMES[name]


def scheme_of(params: Mapping[str, Any]) -> Scheme:
    """The scheme that the params of some towers have been quantised by.

    Raises:
        ClipJaxError: Of several, or in part.
    """
    taken = {p: leaf for tree in params.values() for p, leaf in flatten(tree).items() if _QUANTIZED.search(p)}
    found = {leaf.qvalue.dtype.name if is_quantized(leaf) else None for leaf in taken.values()}
    if len(found) > 1:
        raise ClipJaxError(
            f"Expected kernels and token embeddings of one kind, found {', '.join(sorted(map(str, found)))}. "
            f"Quantise all of them by one scheme, or none."
        )
    kind = found.pop() if found else None
    schemes = {scheme.qtype and scheme.qtype.name: scheme for scheme in (PLAIN, *SCHEMES.values())}
    if kind not in schemes:
        raise ClipJaxError(f"Params are quantised to {kind}; expected one of {', '.join(map(str, schemes))}.")
    return schemes[kind]


def split(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> array, for parameters that may be quantised: those become `<path>/qvalue` and `<path>/scale`."""
    parts: dict[str, Any] = {}
    for path, leaf in leaves.items():
        parts |= {f"{path}/{part}": getattr(leaf, part) for part in _PARTS} if is_quantized(leaf) else {path: leaf}
    return parts


def join(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split`."""
    leaves: dict[str, Any] = {}
    for path, part in parts.items():
        owner = owner_of(path)
        if owner == path:
            leaves[path] = part
        elif owner not in leaves:
            import qwix

            leaves[owner] = qwix.QArray(*(parts[f"{owner}/{name}"] for name in _PARTS))
    return leaves


def stored_parts(
    params: Mapping[str, Any], configs: Mapping[str, TowerConfig], scheme: Scheme
) -> Iterator[dict[str, dict[str, Any]]]:
    """Params as a checkpoint has them, a block at a time: tower name -> path -> array.

    Raises:
        CheckpointError: They are not those of `configs`, so that no one could load them; at once, not on the way.
    """
    if params.keys() != configs.keys():
        raise CheckpointError(f"Expected params of {', '.join(configs)}, found {', '.join(params) or 'none'}.")
    towers = {name: split(flatten(tree)) for name, tree in params.items()}
    for name, leaves in towers.items():
        expected = scheme.stored_shapes(param_shapes(configs[name]))
        check_shapes(expected, {path: leaf.shape for path, leaf in leaves.items()}, f"Tower {name} of the params")
    return (
        {name: {path: leaves[path] for path in group}}
        for name, leaves in towers.items()
        for group in layer_groups(leaves)
    )


def owner_of(path: str) -> str:
    """The path of the parameter that the array at `path` in a checkpoint is a part of, or is."""
    found = _PART.fullmatch(path)
    return found[1] if found else path


def _axes(path: str, shape: tuple[int, ...], tile: int | None) -> tuple[int, _Tiles]:
    """The axis of outputs, and tiles of the inputs: kernels are [in, out], embeddings [V, D]."""
    output = 0 if path.endswith("embedding") else 1
    return output, () if tile is None else ((1 - output, math.gcd(shape[1 - output], tile)),)


@functools.partial(jax.jit, static_argnames=("qtype", "scale_dtype", "output", "tiles"))
def _quantize(array: np.ndarray | jax.Array, qtype: np.dtype, scale_dtype: np.dtype, output: int, tiles: _Tiles) -> Any:
    """A `qwix.QArray`; jitted, so that a float32 copy of the array is all that is made on the way."""
    import qwix

    return qwix.quantize(
        array.astype(jnp.float32),
        qtype,
        channelwise_axes=(output,),
        tiled_axes=dict(tiles),
        scale_dtype=scale_dtype,
    )
