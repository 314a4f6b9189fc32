"""Programs with the kernels compiled in, for CPUs: products by oneDNN, which packs a constant kernel beforehand.

Otherwise a kernel is an argument, and every call packs it anew. XLA leaves products to oneDNN only when told to
(`xla/service/cpu/onednn_contraction_rewriter.cc`). Not the default here: such programs cannot be kept on disk.
"""

from __future__ import annotations

import functools
import platform
import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

from clip_jax.embed import Params, Skips
from clip_jax.errors import ClipJaxError
from clip_jax.models.quantized import is_quantized
from clip_jax.params.memory import give_back
from clip_jax.params.snapshot import Snapshot, devices_of
from clip_jax.structs import TextEmbeddings, Tokens

#: What computes embeddings: traceable, and a function of nothing else.
Function = Callable[[Params, Tokens], TextEmbeddings]

#: The same with params in it.
Program = Callable[[Tokens], TextEmbeddings]

_OPTIONS = {
    "xla_cpu_experimental_onednn_custom_call": True,
    # YNN, XLA's other library, would take the products first; reductions are left to it.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}
# float16 would need a CPU that multiplies it, and T5 mixes it with float32.
_DTYPES = ("float32", "bfloat16")

FREEZING = threading.Lock()
"""Held while programs are made and kept: one compilation uses all cores."""


class FrozenPrograms:
    """Compiled programs by the shapes of ids and the layers that they are for, all with the same params in them.

    Attributes:
        others: What else they were compiled for, a family and a dtype.
    """

    def __init__(self, params: Params, *others: Hashable) -> None:
        self.others = others
        self._snapshot = Snapshot(params)
        self._devices = devices_of(params)
        self._programs: dict[Hashable, Program] = {}

    @property
    def programs(self) -> tuple[Program, ...]:
        """All of them."""
        return tuple(self._programs.values())

    def are_of(self, params: Params, *others: Hashable) -> bool:
        """Whether params, and what else there is, are still those that were compiled in."""
        return self.others == others and self._snapshot.is_of(params)

    def find(self, tokens: Tokens, skips: Skips) -> Program | None:
        """The program for such ids, if there is one; compiled ones run on their device alone."""
        default = jax.config.jax_default_device
        if isinstance(default, jax.Device) and {default} != self._devices:
            return None
        if any(isinstance(ids, jax.Array) and ids.devices() != self._devices for ids in jax.tree.leaves(tokens)):
            return None
        return self._programs.get(_key(tokens, skips))

    def add(self, function: Function, tokens: Tokens, skips: Skips, dtype: np.dtype) -> None:
        """Compiles one more, unless it is there.

        Args:
            function: What to compile.
            tokens: Of which shapes and dtypes count.
            skips: Layers that `function` leaves out.
            dtype: Of the computation.

        Raises:
            ClipJaxError: As from `freeze`.
        """
        key = _key(tokens, skips)
        if key not in self._programs:
            self._programs[key] = freeze(function, self._snapshot.params, tokens, dtype)


def freeze(function: Function, params: Params, tokens: Tokens, dtype: np.dtype) -> Program:
    """Compiles `function` with the kernels of `params` as constants, for ids of these shapes.

    Args:
        function: What to compile.
        params: On one CPU device, and not quantised.
        tokens: Of which shapes and dtypes count.
        dtype: Of the computation; kernels are cast to it.

    Raises:
        ClipJaxError: Other params, another dtype, or a JAX without oneDNN.
    """
    check_freezable(params, dtype)
    kernels = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.asarray(leaf).astype(dtype, copy=False) if is_kernel(path) else None, params
    )
    others = jax.tree_util.tree_map_with_path(lambda path, leaf: None if is_kernel(path) else leaf, params)

    def run(others: Params, tokens: Tokens) -> TextEmbeddings:
        return function(jax.tree.map(_either, kernels, others, is_leaf=lambda leaf: leaf is None), tokens)

    compiled = _compile(run, others, tokens)
    give_back()
    return functools.partial(compiled, others)


def _compile(function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    lowered = jax.jit(function).lower(*arguments)
    with warnings.catch_warnings():  # where a compilation cache is on, such a program does not go into it
        warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
        return lowered.compile(compiler_options=_OPTIONS)


def check_freezable(params: Params, dtype: np.dtype) -> None:
    """Refuses what XLA would not hand to oneDNN.

    Raises:
        ClipJaxError: As from `freeze`.
    """
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    if any(map(is_quantized, leaves)):
        raise ClipJaxError("Quantised params cannot be frozen: XLA leaves oneDNN none of their products. Leave it out.")
    devices = devices_of(params)
    if len(devices) > 1 or any(device.platform != "cpu" for device in devices):
        found = ", ".join(sorted(map(str, devices)))
        raise ClipJaxError(f"freeze is for params on one CPU device, found them on {found}. Leave it out.")
    if dtype.name not in _DTYPES:
        raise ClipJaxError(f"freeze is for {' and '.join(_DTYPES)}, found {dtype.name}. Leave it out, or load so.")
    if not _packs(dtype.name):
        raise ClipJaxError(
            f"freeze needs an XLA that packs kernels of {dtype.name} by oneDNN, as that of jax 0.11 and newer does on "
            f"x86-64; found jax {jax.__version__} on {platform.machine()}. Leave it out, or upgrade jax (on "
            f"Python 3.12 or newer)."
        )


@functools.cache
def _packs(dtype: str) -> bool:
    """Whether a product with a constant becomes one of oneDNN's, with the constant packed."""
    square = np.ones((512, 512), dtype)
    try:
        compiled = _compile(lambda x: x @ square, jax.device_put(square, jax.devices("cpu")[0]))
    except jax.errors.JaxRuntimeError:  # options that this version does not know
        return False
    return '"weights_prepacked":true' in (compiled.as_text() or "")


def _either(kernel: np.ndarray | None, other: jax.Array | None) -> np.ndarray | jax.Array | None:
    return other if kernel is None else kernel


def is_kernel(path: jax.tree_util.KeyPath) -> bool:
    """Whether a parameter is a kernel, which is compiled in."""
    return getattr(path[-1], "key", None) == "kernel"


def _key(tokens: Tokens, skips: Skips) -> Hashable:
    leaves, tree = jax.tree.flatten(tokens)
    return tree, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves), skips
