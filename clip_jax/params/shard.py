"""Where the parts of params and batches go: pure functions of architectures, a mesh and rules.

Rules are those of Flax (`nn.logical_to_mesh_sharding`): pairs of a logical axis and of the mesh axis that it is split
over, or several of them, or None. For every dimension the first rule counts whose mesh axes the array does not use
yet; a logical axis without a rule is whole on every device, and rules for other names than ours are passed over.
The logical axes are "batch", for token ids, and those of the parameters, which `clip_jax.models` lists.

A dimension that does not divide by its number of devices is whole on every device, the other dimensions of that
parameter are not. "heads" divides by whole heads: half a head would be gathered again in every block.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.typing
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.errors import ClipJaxError
from clip_jax.params.quantize import owner_of
from clip_jax.params.shapes import TensorSpec, param_axes, param_shapes
from clip_jax.structs import Tokens

#: (logical axis, mesh axis or several or None), the most important first.
Rules = Sequence[tuple[str, str | Sequence[str] | None]]

#: Tower name -> path -> where that parameter goes.
Shardings = dict[str, dict[str, NamedSharding]]

#: Where a parameter goes, by its tower, its path, and its shape and dtype as stored.
Placement = Callable[[str, str, TensorSpec], Sharding]

#: Which part of an array: one slice for every dimension.
Index = tuple[slice, ...]

DEFAULT_RULES: Rules = (
    ("batch", "data"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
)
"""Without other rules: batches over "data", kernels and embeddings over "tensor", or over "fsdp", or over both."""

_LOGICAL_AXES = ("batch", "vocab", "heads", "mlp", "embed")


def param_shardings(
    configs: Mapping[str, TowerConfig], mesh: Mesh | AbstractMesh, rules: Rules | None = None
) -> Shardings:
    """Where every parameter of some towers goes.

    Args:
        configs: Tower name -> architecture.
        mesh: The devices; an `AbstractMesh` will do for planning. One with explicit axes, as `jax.make_mesh` makes
            it, is taken as one with `AxisType.Auto`.
        rules: None means those of `DEFAULT_RULES` whose mesh axes `mesh` has.

    Returns:
        Tower name -> path -> sharding, in the order of the params.

    Raises:
        ClipJaxError: A rule names an axis that the mesh has not, or no rule is left.
    """
    mesh, rules = _auto(mesh), _checked(mesh, rules)
    return {
        tower: {
            path: NamedSharding(mesh, _spec(config, axes, param_shapes(config)[path], mesh, rules))
            for path, axes in param_axes(config).items()
        }
        for tower, config in configs.items()
    }


def batch_sharding(mesh: Mesh | AbstractMesh, rules: Rules | None = None) -> NamedSharding:
    """Where the rows of token ids [B, L] go, if B divides by the devices. Arguments and errors as above."""
    mesh, rules = _auto(mesh), _checked(mesh, rules)
    return NamedSharding(mesh, nn.logical_to_mesh_axes(("batch", None), rules))


def placed_by(shardings: Shardings) -> Placement:
    """What the readers of checkpoints take, for a tree of shardings; scales go where what they scale goes."""
    return lambda tower, path, spec: _fitted(shardings[tower][owner_of(path)], spec.shape)


def _fitted(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """`sharding` for an array that may be smaller: whole along dimensions that do not divide, as one of size 1."""
    devices = [math.prod(sharding.mesh.shape[axis] for axis in _names(axes)) for axes in sharding.spec]
    split = [axes if size % n == 0 else None for axes, size, n in zip(sharding.spec, shape, devices, strict=True)]
    return NamedSharding(sharding.mesh, PartitionSpec(*split))


def over_auto_axes(sharding: Sharding) -> Sharding:
    """The same sharding, for XLA to propagate: with explicit axes the model would have to state each of its own."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(_auto(sharding.mesh), sharding.spec, memory_kind=sharding.memory_kind)


def auto_axes(sharding: NamedSharding | None) -> contextlib.AbstractContextManager[object]:
    """Has the mesh of `sharding` in force instead of one with explicit axes, where modules had to state theirs."""
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    return jax.set_mesh(sharding.mesh) if explicit and sharding is not None else contextlib.nullcontext()


def is_on(params: Mapping[str, object], mesh: Mesh | AbstractMesh) -> bool:
    """Whether params are on that mesh; they may have been moved since it was named."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return isinstance(sharding, NamedSharding) and sharding.mesh == mesh


def idle_axes(shardings: Shardings, rules: Rules | None = None) -> list[str]:
    """The mesh axes of more than one device that rules mean for params, and that split none of them."""
    leaves = [sharding for tree in shardings.values() for sharding in tree.values()]
    mesh = leaves[0].mesh
    meant = {axis for name, axes in _checked(mesh, rules) if name != "batch" for axis in axes or ()}
    used = {axis for leaf in leaves for axes in leaf.spec for axis in _names(axes)}
    return sorted(axis for axis in meant - used if mesh.shape[axis] > 1)


def sharded_array(shape: tuple[int, ...], sharding: Sharding, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """An array that is read part by part, each straight to its device.

    Args:
        shape: Of the whole.
        sharding: Where the parts go. Of several processes each reads its own.
        read: Returns one part, which a device may take as it is: nothing that changes later. Called once for all
            devices that hold the same one.
    """
    parts: dict[str, np.ndarray] = {}

    def part(index: Index) -> np.ndarray:
        key = str(index)  # slices have no hash before Python 3.12
        if key not in parts:
            parts[key] = read(index)
        return parts[key]

    return jax.make_array_from_callback(shape, sharding, part)


def placed(tokens: Tokens, params: Mapping[str, object], sharding: NamedSharding | None) -> Tokens:
    """Token ids [B, L] with their rows where `sharding` says; as they are where B does not divide, or params left."""
    if sharding is None or not is_on(params, sharding.mesh):
        return tokens
    devices = math.prod(sharding.mesh.shape[axis] for axis in _names(sharding.spec[0]))

    def place(ids: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        return ids if len(ids) % devices else sharded_array(ids.shape, sharding, np.array(ids).__getitem__)

    return jax.tree.map(place, tokens)


def _spec(
    config: TowerConfig, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Rules
) -> PartitionSpec:
    split = []
    for name, size, mesh_axes in zip(axes, shape, nn.logical_to_mesh_axes(axes, rules), strict=True):
        devices = math.prod(mesh.shape[axis] for axis in _names(mesh_axes))
        split.append(mesh_axes if (_heads(config) if name == "heads" else size) % devices == 0 else None)
    return PartitionSpec(*split)


def _heads(config: TowerConfig) -> int:
    return config.num_attention_heads if isinstance(config, ClipTextConfig) else config.num_heads


def _names(mesh_axes: str | Sequence[str] | None) -> tuple[str, ...]:
    return (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes or ())


def _auto(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """The same mesh with `AxisType.Auto` for all axes."""
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names)
    return mesh.update_axis_types(dict.fromkeys(mesh.axis_names, AxisType.Auto))


def _checked(mesh: Mesh | AbstractMesh, rules: Rules | None) -> Rules:
    """The rules for our axes, each with a tuple of mesh axes or None."""
    default = rules is None
    try:
        pairs = [(name, _names(axes)) for name, axes in (DEFAULT_RULES if rules is None else rules)]
    except (TypeError, ValueError) as error:
        raise ClipJaxError(f"Expected rules as pairs (logical axis, mesh axis), found {rules!r}.") from error
    if default:
        pairs = [(name, tuple(axis for axis in axes if axis in mesh.axis_names)) for name, axes in pairs]
    ours = [(name, axes or None) for name, axes in pairs if name in _LOGICAL_AXES]
    unknown = sorted({axis for _, axes in ours for axis in axes or ()} - set(mesh.axis_names))
    found = f"the mesh has the axes {', '.join(map(str, mesh.axis_names)) or 'none'}"
    if unknown:
        raise ClipJaxError(f"The rules split over {', '.join(unknown)}; {found}. Name axes of the mesh in the rules.")
    if default and not any(axes for _, axes in ours):
        raise ClipJaxError(f"Expected a mesh with an axis data, fsdp or tensor; {found}. Pass rules= for them.")
    return ours
