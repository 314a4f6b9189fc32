"""Reads the pickles of `torch.save` without executing them: a machine that has no way to call anything.

A pickle is a program. The standard library's `pickle` runs it, and calls what it names; here `pickletools` takes it
apart, and the few instructions that a state dict needs build dicts, lists and descriptions of tensors. A global is a
name and nothing else. The names that tensors need are known; classes of Lightning and TorchScript become inert
dicts; every other name ends the reading.

Reference: Python `pickletools`; torch `serialization.py` (`_save`, `_legacy_save`) and `_utils.py` (`_rebuild_*`).
"""

from __future__ import annotations

import dataclasses
import pickletools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from clip_jax.convert.readers.tensor_file import damaged, short
from clip_jax.errors import CheckpointError

MAX_PICKLE_BYTES = 2**24
"""Longest pickle that is read: those of state dicts, with optimizers too, have less than a tenth of it."""

_MAX_DIMS = 64  # of a numpy array

#: Names of dtypes in `torch.`, and what they are in numpy.
_DTYPES: Mapping[str, np.dtype] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
_STORAGES: Mapping[str, np.dtype] = {
    "torch.DoubleStorage": _DTYPES["float64"],
    "torch.FloatStorage": _DTYPES["float32"],
    "torch.HalfStorage": _DTYPES["float16"],
    "torch.BFloat16Storage": _DTYPES["bfloat16"],
    "torch.LongStorage": _DTYPES["int64"],
    "torch.IntStorage": _DTYPES["int32"],
    "torch.ShortStorage": _DTYPES["int16"],
    "torch.CharStorage": _DTYPES["int8"],
    "torch.ByteStorage": _DTYPES["uint8"],
    "torch.BoolStorage": _DTYPES["bool"],
    "torch.storage.UntypedStorage": _DTYPES["uint8"],
}
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
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "torch.Size",
        "torch.device",
        "torch.jit._pickle.build_boollist",
        "torch.jit._pickle.build_doublelist",
        "torch.jit._pickle.build_intlist",
        "torch.jit._pickle.build_tensorlist",
    }
)
_INERT = re.compile(r"(pytorch_lightning|lightning|lightning_fabric|__torch__)(\.[\w.]*)?")


@dataclasses.dataclass(frozen=True)
class Storage:
    """Memory that tensors share.

    Attributes:
        key: Its name in the file.
        dtype: Of its elements; uint8 where the tensors say it.
        numel: How many elements it has.
    """

    key: str
    dtype: np.dtype
    numel: int


@dataclasses.dataclass(frozen=True)
class Strided:
    """A tensor: where its elements are in a storage. Lengths and offsets are in elements.

    Attributes:
        storage: That holds them.
        dtype: Of an element.
        offset: Of the first one.
        shape: Its dimensions.
        strides: Of each.
    """

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, data: np.ndarray) -> np.ndarray:
        """The tensor as a view of the storage's bytes, [size] uint8."""
        size = self.dtype.itemsize
        strides = [stride * size for stride in self.strides]
        return np.ndarray(self.shape, self.dtype, data.data, self.offset * size, strides)


@dataclasses.dataclass(frozen=True)
class Global:
    """The name of something that a pickle refers to. Not the thing."""

    name: str


class Inert(dict[Any, Any]):
    """An object of a class that is not there: what would have been its attributes."""


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
        for opcode, argument, _ in pickletools.genops(file):
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
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise damaged(path, f"its pickle cannot be read ({type(error).__name__}: {short(str(error))})") from error
    raise damaged(path, "its pickle does not end")


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
            if not isinstance(key, str | int | float | bytes | Global | None):
                raise TypeError(f"expected a name or a number for a key, found {type(key).__name__}")
            target[key] = value

    def find(self, module: Any, name: Any) -> None:
        """Pushes a global, if its name is one that may be."""
        full = f"{module}.{name}"
        known = full in _CALLS or full in _STORAGES or full in _DICTS or full in _IGNORED
        dtype = module == "torch" and name in _DTYPES
        if not (known or dtype or _INERT.fullmatch(str(module))):
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
            self.push(_CALLS[function.name](*arguments))
        elif function.name in _DICTS:
            self.push({})
        else:
            self.push(Inert())

    def build(self) -> None:
        """Takes the state of an object; only that of an inert one is kept."""
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Inert) and isinstance(state, dict):
            target.update(state)
        elif not isinstance(target, dict | Strided):
            raise TypeError(f"expected an object to set the state of, found {type(target).__name__}")

    def persistent(self) -> None:
        """A storage: ("storage", type, key, location, numel), and the view of it in old files."""
        match self.pop():
            case ("storage", Global(name), str(key), str(), int(numel), *view) if name in _STORAGES and numel >= 0:
                if len(view) != self.storage_entries - 5 or any(entry is not None for entry in view):
                    raise ValueError("expected a storage that is no view of another")
                storage = Storage(key, _STORAGES[name], numel)
                if self.storages.setdefault(key, storage) != storage:
                    raise ValueError(f"expected one description of storage {short(key)}, found two")
                self.push(storage)
            case other:
                raise ValueError(f"expected a storage, found {_kind(other)}")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Strided:
    return _strided(storage, offset, size, stride, None)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Strided:
    if not isinstance(dtype, Global):
        raise TypeError("expected a dtype")
    return _strided(storage, offset, size, stride, _DTYPES[dtype.name.removeprefix("torch.")])


def _strided(storage: Any, offset: Any, size: Any, stride: Any, dtype: np.dtype | None) -> Strided:
    """A tensor whose every element is in its storage.

    Raises:
        ValueError: It is not, or has more elements than the storage: they are negative, overlap, or are no numbers.
    """
    if not isinstance(storage, Storage):
        raise TypeError(f"expected a storage, found {type(storage).__name__}")
    numbers = (offset, *size, *stride)
    if not all(type(number) is int and number >= 0 for number in numbers):
        kinds = ", ".join(sorted({_kind(number) for number in numbers if type(number) is not int or number < 0})[:5])
        raise ValueError(f"expected whole numbers for offset, size and stride, found {kinds}")
    if len(size) != len(stride) or len(size) > _MAX_DIMS:
        raise ValueError(f"expected a stride for every dimension, found {short(size)} and {short(stride)}")
    dtype = dtype or storage.dtype
    available = storage.numel * storage.dtype.itemsize // dtype.itemsize
    count, last = 1, offset
    for length, step in zip(size, stride, strict=True):
        count *= length
        last += (length - 1) * step
    if count > available or (count and last >= available):
        raise ValueError(
            f"expected a tensor within the {available} elements of its storage, found shape {short(size)}, strides "
            f"{short(stride)}, offset {offset}"
        )
    # A tensor without elements may point anywhere.
    return Strided(storage, dtype, offset if count else 0, tuple(size), tuple(stride))


def _kind(value: Any) -> str:
    """What a value is, for messages; never a look into a container, which may hold itself."""
    return short(value) if isinstance(value, int | str) else f"a {type(value).__name__}"


def _first(value: Any, *_: Any) -> Any:
    return value


_CALLS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.jit._pickle.restore_type_tag": _first,
}

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


def tensors_in(root: Any, path: Path, most: int = 1_000_000) -> dict[str, Strided]:
    """The tensors of a state dict, by dotted names; dicts in it are walked, lists are not.

    What training saves beside a state dict called "state_dict" is left out.

    Raises:
        CheckpointError: More than `most` entries, as a dict that holds itself has, or a name twice.
    """
    found: dict[str, Strided] = {}
    inner = root.get("state_dict") if isinstance(root, dict) else None
    stack = [("", inner if isinstance(inner, dict) else root)]
    count = 0
    while stack:
        prefix, node = stack.pop()
        for key, value in node.items() if isinstance(node, dict) else ():
            count += 1
            if count > most or len(prefix) > 1000:
                raise damaged(path, f"its dicts are nested without end, or hold more than {most} entries")
            name = f"{prefix}{key.name if isinstance(key, Global) else key}"
            if name in found:
                raise damaged(path, f"expected every name once, found {short(name)} twice")
            if isinstance(value, Strided):
                found[name] = value
            elif isinstance(value, dict):
                stack.append((f"{name}.", value))
    return found
