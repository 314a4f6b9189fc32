"""Reads the pickles of `torch.save` without executing them: a machine that has no way to call anything.

A pickle is a program. The standard library's `pickle` runs it, and calls what it names; here `pickletools` takes it
apart, and the few instructions that a state dict needs build dicts, lists and descriptions of tensors. A global is a
name and nothing else. The names that tensors need are known; classes of Lightning and TorchScript become inert
dicts; every other name ends the reading.

Reference: Python `pickletools`; torch `serialization.py` (`_save`, `_legacy_save`) and `_utils.py` (`_rebuild_*`).
"""

from __future__ import annotations

import dataclasses
import itertools
import pickletools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

from clip_jax.convert.readers.tensor_file import damaged, short
from clip_jax.convert.readers.torch_tensors import DTYPES, STORAGES, Storage, Strided, kind, strided
from clip_jax.errors import CheckpointError

MAX_PICKLE_BYTES = 2**24
"""Longest pickle that is read: those of state dicts, with optimizers too, have less than a tenth of it."""

# Those of Stable Diffusion with its optimizer have a hundred thousand. Each may take a hundred bytes and a
# microsecond, whatever it does: what takes more is bounded by itself.
_MAX_INSTRUCTIONS = 1_000_000
_MAX_GLOBAL = 500  # characters
_MAX_ARGUMENTS = 20
_MAX_NAMES, _MAX_NAME = 100_000, 500  # entries of nested dicts; characters

_DICTS = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict")
# Found in real checkpoints beside the tensors; what they would have made is of no use here.
_IGNORED = frozenset(
    {
        "_codecs.encode",
        "argparse.Namespace",
        "builtins.list",
        "builtins.set",
        "__builtin__.list",
        "__builtin__.set",
        "collections.Counter",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "torch.Tensor",
        "torch.device",
        "torch.jit._pickle.build_boollist",
        "torch.jit._pickle.build_doublelist",
        "torch.jit._pickle.build_intlist",
        "torch.jit._pickle.build_tensorlist",
    }
)
_INERT = re.compile(r"(pytorch_lightning|lightning|lightning_fabric|__torch__)(\.[\w.]*)?")


@dataclasses.dataclass(frozen=True)
class Global:
    """The name of something that a pickle refers to. Not the thing."""

    name: str


class Inert(dict[Any, Any]):
    """An object of a class that is not there: its items, if it was a dict.

    Attributes:
        state: What would have been its attributes. Not a copy: many objects may share one.
    """

    state: Mapping[Any, Any] = MappingProxyType({})


class Loaded(NamedTuple):
    """What a pickle describes.

    Attributes:
        value: Dicts, lists, `Strided` tensors, `Inert` objects and plain values.
        storages: Key -> storage, of all that it refers to.
    """

    value: Any
    storages: Mapping[str, Storage]


def load_pickle(file: IO[bytes], path: Path, *, legacy: bool = False) -> Loaded:
    """Reads one pickle, up to its STOP, from where `file` is.

    Args:
        file: The bytes; at most `MAX_PICKLE_BYTES` of them.
        path: For messages.
        legacy: Whether storages are written as before torch 1.6, with a sixth entry.

    Raises:
        CheckpointError: It refers to anything that a checkpoint has no use for, or is damaged.
    """
    machine = _Machine(path, 6 if legacy else 5)
    try:
        for opcode, argument, _ in itertools.islice(pickletools.genops(file), _MAX_INSTRUCTIONS):
            if opcode.name == "STOP":
                return Loaded(machine.pop(), machine.storages)
            step = _STEPS.get(opcode.name)
            if step is None:
                raise CheckpointError(
                    f"{path}: uses the pickle instruction {opcode.name}, which a checkpoint has no use for; nothing of "
                    f"it was run. Get the file from a place that you trust, or as safetensors."
                )
            step(machine, argument)
    except CheckpointError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, RecursionError) as error:
        raise damaged(path, f"its pickle cannot be read ({type(error).__name__}: {str(error)[:300]})") from error
    raise damaged(path, f"its pickle does not end within {_MAX_INSTRUCTIONS} instructions")


class _Machine:
    """The stack, the marks and the memo of a pickle."""

    def __init__(self, path: Path, storage_entries: int):
        self.path = path
        self.storage_entries = storage_entries
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_tuple(self, size: int) -> None:
        items = [self.pop() for _ in range(size)]
        self.push(tuple(reversed(items)))

    def memoize(self, index: int | None = None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("expected a list to append to")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("expected a dict to set items of")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, tuple):  # of settings: no tensor is called so, and to hash it may take for ever
                continue
            # Of longer numbers as many as one likes have the same hash, and the dict would go through all of them.
            endless = type(key) is int and key >> 63 not in (0, -1)
            if endless or not isinstance(key, str | int | float | bytes | Global | None):
                raise TypeError(f"expected a name or a number for a key, found {kind(key)}")
            target[key] = value

    def find(self, module: str, name: str) -> None:
        """Pushes a global, if its name is one that may be."""
        full = f"{module}.{name}" if len(module) + len(name) < _MAX_GLOBAL else f"{module[:50]}...{name[-50:]}"
        if not (full in _KNOWN or (_INERT.fullmatch(module) and "..." not in full)):
            raise CheckpointError(
                f"{self.path}: asks for {short(full)[1:-1]}, which a checkpoint has no use for; nothing of it was run. "
                f"Get the file from a place that you trust, or as safetensors."
            )
        self.push(Global(full))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("expected the name of a global")
        self.find(module, name)

    def call(self) -> None:
        """Does what calling a global would have amounted to, for the few that matter."""
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise TypeError("expected a global and its arguments")
        if function.name in _CALLS:
            if len(arguments) > _MAX_ARGUMENTS:
                raise TypeError(f"expected at most {_MAX_ARGUMENTS} arguments, found {len(arguments)}")
            self.push(_CALLS[function.name](*arguments))
        elif function.name in _DICTS:
            self.push({})
        else:
            self.push(Inert())

    def build(self) -> None:
        """Takes the state of an object; only that of an inert one is kept."""
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Inert) and isinstance(state, dict):
            target.state = state
        elif not isinstance(target, dict | Strided):
            raise TypeError(f"expected an object to set the state of, found {kind(target)}")

    def persistent(self) -> None:
        """A storage: ("storage", type, key, location, numel), and in old files the view of it, which is None."""
        match self.pop():
            case ("storage", Global(name), str(key), str(), int(numel), *view) if name in STORAGES and numel >= 0:
                if len(view) != self.storage_entries - 5 or any(entry is not None for entry in view):
                    raise ValueError("expected a storage that is no view of another")
                storage = Storage(key, STORAGES[name], int(numel))
                if self.storages.setdefault(key, storage) != storage:
                    raise ValueError(f"expected one description of storage {short(key)}, found two")
                self.push(storage)
            case other:
                raise ValueError(f"expected a storage, found {kind(other)}")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Strided:
    return strided(storage, offset, size, stride)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Strided:
    if not isinstance(dtype, Global) or dtype.name not in DTYPES:
        raise TypeError(f"expected a dtype, found {kind(dtype)}")
    return strided(storage, offset, size, stride, DTYPES[dtype.name])


def _rebuild_with_attributes(function: Any, _type: Any, arguments: Any, *_: Any) -> Any:
    """A tensor that somebody has given attributes of their own, without them."""
    rebuild = _TENSORS.get(function.name) if isinstance(function, Global) else None
    if rebuild is None or not isinstance(arguments, tuple) or len(arguments) > _MAX_ARGUMENTS:
        raise TypeError(f"expected what makes a tensor and its arguments, found {kind(function)}")
    return rebuild(*arguments)


def _first(value: Any, *_: Any) -> Any:
    return value


def _size(lengths: Any = ()) -> tuple[Any, ...]:
    """What `torch.Size` is: a tuple, that may be the shape of a tensor."""
    if not isinstance(lengths, tuple | list):
        raise TypeError(f"expected the lengths of a torch.Size, found {kind(lengths)}")
    return tuple(lengths)


_TENSORS: Mapping[str, Callable[..., Strided]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
}

_CALLS: Mapping[str, Callable[..., Any]] = {
    **_TENSORS,
    "torch.Size": _size,
    "torch._tensor._rebuild_from_type_v2": _rebuild_with_attributes,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.jit._pickle.restore_type_tag": _first,
}

_KNOWN = frozenset({*_CALLS, *_DICTS, *_IGNORED, *STORAGES, *DTYPES})

_push = _Machine.push

#: Instruction -> what it does. Those that are not here end the reading.
_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda *_: None),
    "MARK": lambda machine, _: machine.mark(),
    "POP": lambda machine, _: machine.pop(),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"), _push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _push),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.pop_tuple(1),
    "TUPLE2": lambda machine, _: machine.pop_tuple(2),
    "TUPLE3": lambda machine, _: machine.pop_tuple(3),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_mark()),
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "ADDITEMS": lambda machine, _: machine.append(machine.pop_mark()),
    "FROZENSET": lambda machine, _: machine.push(machine.pop_mark()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "BINPUT": _Machine.memoize,
    "LONG_BINPUT": _Machine.memoize,
    "MEMOIZE": _Machine.memoize,
    "BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "GLOBAL": lambda machine, names: machine.find(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.stack_global(),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.persistent(),
}


def tensors_in(root: Any, path: Path) -> dict[str, Strided]:
    """The tensors of a state dict, by dotted names; dicts in it are walked, lists are not.

    What training saves beside a state dict called "state_dict" is left out.

    Args:
        root: What a pickle describes.
        path: For messages.

    Raises:
        CheckpointError: Too many entries or too long a name, as a dict that holds itself has, or a name twice.
    """
    found: dict[str, Strided] = {}
    inner = root.get("state_dict") if isinstance(root, dict) else None
    stack = [("", inner if isinstance(inner, dict) else root)]
    count = 0
    while stack:
        prefix, node = stack.pop()
        for key, value in _entries(node):
            count += 1
            name = _join(prefix, key)
            if count > _MAX_NAMES or len(name) > _MAX_NAME:
                raise damaged(
                    path,
                    f"expected dicts of at most {_MAX_NAMES} entries and names of at most {_MAX_NAME} characters, "
                    f"found more: they are nested without end, or no state dict",
                )
            if name in found:
                raise damaged(path, f"expected every name once, found {short(name)} twice")
            if isinstance(value, Strided):
                found[name] = value
            elif isinstance(value, dict):
                stack.append((f"{name}.", value))
    return found


def _entries(node: Any) -> Iterator[tuple[Any, Any]]:
    """The items of a dict, and the attributes of an object."""
    if isinstance(node, dict):
        yield from node.items()
    if isinstance(node, Inert):
        yield from node.state.items()


def _join(prefix: str, key: Any) -> str:
    """A dotted name, cut where it is too long to be one: a long key may be used many times."""
    match key:
        case Global(name):
            return f"{prefix}{name}"
        case str():
            return f"{prefix}{key[: _MAX_NAME + 1]}"
        case bytes():
            return f"{prefix}{key[: _MAX_NAME + 1]!r}"
    return f"{prefix}{key}"
