"""The parameter tree of a tower, as flat paths with shapes and logical axes; the comparison of two trees."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.errors import CheckpointError
from clip_jax.models import model_of

#: "text_model/encoder/layers/0/mlp/fc1/kernel" -> its shape.
Shapes = Mapping[str, tuple[int, ...]]

#: "text_model/encoder/layers/0/mlp/fc1/kernel" -> ("embed", "mlp"); None is a dimension that has no name.
Axes = Mapping[str, tuple[str | None, ...]]

_SECOND_BLOCK = re.compile(r"(.*/(?:layers|block)/)1/")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored parameter."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory, int4 packed two to a byte (as jax 0.12 has them)."""
        bits = 4 if self.dtype == ml_dtypes.int4 else 8 * self.dtype.itemsize
        return -(-math.prod(self.shape) * bits // 8)


@functools.cache
def param_shapes(config: TowerConfig) -> Shapes:
    """Path -> shape of every parameter of a tower; nothing is allocated."""
    return {path: leaf.shape for path, leaf in _every_block(config, flatten(_abstract(config))).items()}


@functools.cache
def param_axes(config: TowerConfig) -> Axes:
    """Path -> logical axis of every dimension of every parameter, as `clip_jax.models` documents them."""
    specs = traverse_util.flatten_dict(nn.get_partition_spec(_abstract(config)), sep="/")
    specs = _every_block(config, specs)
    return {
        path: (*specs[path], *[None] * (len(shape) - len(specs[path]))) for path, shape in param_shapes(config).items()
    }


def _abstract(config: TowerConfig) -> dict[str, Any]:
    """The parameters of a model of the first two blocks; T5's first has one more than the others."""
    blocks = min(2, _blocks(config))
    if isinstance(config, ClipTextConfig):
        config = dataclasses.replace(config, num_hidden_layers=blocks)
    else:
        config = dataclasses.replace(config, num_layers=blocks)
    with nn.logical_axis_rules(()):  # a pipeline's own rules, where they are in force, would constrain shapes
        # Within the trace, so that no array is made: a transfer guard may be in force.
        return jax.eval_shape(lambda: model_of(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]


def _every_block(config: TowerConfig, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Has the second block stand for all that follow."""
    every = dict(leaves)
    for path, leaf in leaves.items():
        if second := _SECOND_BLOCK.match(path):
            every |= {f"{second[1]}{i}{path[second.end() - 1 :]}": leaf for i in range(2, _blocks(config))}
    return every


def _blocks(config: TowerConfig) -> int:
    return config.num_hidden_layers if isinstance(config, ClipTextConfig) else config.num_layers


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict -> path -> leaf, without the logical axes that leaves made by `init` are boxed with."""
    leaves = traverse_util.flatten_dict(tree, sep="/")
    return {path: leaf.value if isinstance(leaf, nn.LogicallyPartitioned) else leaf for path, leaf in leaves.items()}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> leaf to a nested dict."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def layer_groups(paths: Iterable[str]) -> list[list[str]]:
    """Splits the parameters of a tower into one group per block, and one for what is outside the blocks."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        head, found, tail = path.partition("/layers/" if "/layers/" in path else "/block/")
        groups.setdefault(f"{head}{found}{tail.split('/')[0]}" if found else "", []).append(path)
    return list(groups.values())


def check_shapes(expected: Shapes, found: Shapes, what: str) -> None:
    """Compares two trees and reports every difference at once.

    Raises:
        CheckpointError: A parameter is missing, one too many, or of another shape.
    """
    wrong = [
        f"{path} has shape {found[path]}, expected {expected[path]}"
        for path in sorted(expected.keys() & found.keys())
        if tuple(found[path]) != tuple(expected[path])
    ]
    faults = [
        *list_faults("missing", expected.keys() - found.keys()),
        *list_faults("not expected", found.keys() - expected.keys()),
        *list_faults("wrong shape", wrong),
    ]
    if faults:
        raise CheckpointError(f"{what} does not match its architecture. " + " ".join(faults))


def check_params(config: TowerConfig, params: Mapping[str, Any], what: str) -> None:
    """All parameters of a tower have to be there, in their shapes; others (those of a LoRA) may be.

    Raises:
        CheckpointError: One is missing, or of another shape.
    """
    shapes, found = param_shapes(config), {}
    for path in shapes:
        with contextlib.suppress(KeyError, TypeError, AttributeError):  # it is not there, or no array
            found[path] = tuple(nn.meta.unbox(functools.reduce(operator.getitem, path.split("/"), params)).shape)
    check_shapes(shapes, found, what)


def list_faults(kind: str, names: Iterable[str], most: int = 20) -> list[str]:
    """One sentence that counts and lists `names`, cut after `most`; none where there are no names."""
    names = sorted(names)
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{kind} ({len(names)}): {', '.join(names[:most])}{more}."]
