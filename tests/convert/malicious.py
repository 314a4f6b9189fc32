"""Pickles that a checkpoint could hide, as a stranger would write them: name -> (pickle, what the refusal says).

Run as a script, it opens every one of them as a zip file and as a legacy file of torch, within bounds of memory and
time, and prints what became of each as JSON: `python malicious.py FOLDER CANARY`.
"""

from __future__ import annotations

import collections
import json
import pickle
import resource
import struct
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, ClassVar

_MIB = 2**20


class Call:
    """What pickles as a call of a global, whether this machine has it or not."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self.module, self.name, self.arguments = module, name, arguments


class _Writer(pickle._Pickler):  # type: ignore[name-defined]
    """Python's own pickler, which also writes calls of what is not there."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_call(self, call: Call) -> None:
        self.write(f"c{call.module}\n{call.name}\n".encode())
        self.save(call.arguments)
        self.write(pickle.REDUCE)

    dispatch[Call] = save_call


def dumps(value: Any) -> bytes:
    import io

    file = io.BytesIO()
    _Writer(file, 2).dump(value)
    return file.getvalue()


def _short_text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def _storage(kind: str = "FloatStorage", numel: int = 4, key: str = "0") -> bytes:
    parts = _short_text("storage") + f"ctorch\n{kind}\n".encode() + _short_text(key) + _short_text("cpu")
    return pickle.MARK + parts + pickle.LONG1 + b"\x08" + struct.pack("<q", numel) + pickle.TUPLE + pickle.BINPERSID


def _tensor(offset: Any, size: Any, stride: Any, storage: bytes | None = None) -> bytes:
    arguments = b"".join(dumps(value)[2:-1] for value in (offset, size, stride, False, {}))
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + (storage or _storage()) + arguments + b"tR"
    return b"\x80\x02}" + _short_text("w") + tensor + b"s."


def _laughs() -> bytes:
    """A dict of two references to a dict of two references, sixty times over."""
    value: dict[str, Any] = {"a": 1}
    for _ in range(60):
        value = {"a": value, "b": value}
    return dumps(value)


def _itself() -> bytes:
    value: dict[str, Any] = {}
    value["a"] = value
    return dumps(value)


def _globals(canary: str) -> dict[str, tuple[bytes, str]]:
    touch = f"touch {canary}"
    calls = {
        "os.system": Call("os", "system", touch),
        "posix.system": Call("posix", "system", touch),
        "nt.system": Call("nt", "system", touch),
        "subprocess.Popen": Call("subprocess", "Popen", ["touch", canary]),
        "subprocess.check_output": Call("subprocess", "check_output", ["touch", canary]),
        "builtins.eval": Call("builtins", "eval", f"open({canary!r}, 'w')"),
        "builtins.exec": Call("builtins", "exec", f"open({canary!r}, 'w')"),
        "builtins.open": Call("builtins", "open", canary, "w"),
        "builtins.getattr": Call("builtins", "getattr", "x", "upper"),
        "builtins.__import__": Call("builtins", "__import__", "os"),
        "builtins.compile": Call("builtins", "compile", "1", "x", "eval"),
        "__builtin__.eval": Call("__builtin__", "eval", f"open({canary!r}, 'w')"),
        "runpy.run_path": Call("runpy", "run_path", canary),
        "webbrowser.open": Call("webbrowser", "open", canary),
        "shutil.rmtree": Call("shutil", "rmtree", canary),
        "pickle.loads": Call("pickle", "loads", b"cos\nsystem\n."),
        "numpy.load": Call("numpy", "load", canary, None, True),
        "numpy.lib.npyio.load": Call("numpy.lib.npyio", "load", canary),
        "torch.load": Call("torch", "load", canary),
        "torch.hub.load": Call("torch.hub", "load", "a/b", "c"),
        "torch.storage._load_from_bytes": Call("torch.storage", "_load_from_bytes", b"x"),
        "torch.jit.load": Call("torch.jit", "load", canary),
        "functools.partial": Call("functools", "partial", 1),
        "operator.attrgetter": Call("operator", "attrgetter", "system"),
        "copyreg._reconstructor": Call("copyreg", "_reconstructor", 1, 2, 3),
        "importlib.import_module": Call("importlib", "import_module", "os"),
        "bdb.Bdb": Call("bdb", "Bdb"),
        "collections.OrderedDict.__init__.__globals__": Call("collections", "OrderedDict.__init__.__globals__"),
        "torch._utils.os.system": Call("torch._utils", "os.system", touch),
        "pytorch_lightningx.run": Call("pytorch_lightningx", "run", touch),
    }
    found = {name: (dumps({"state_dict": call}), f"asks for {name},") for name, call in calls.items()}
    nested = Call("torch._utils", "_rebuild_parameter", Call("os", "system", touch), True, {})
    found["nested reducers"] = (dumps({"w": nested}), "asks for os.system,")
    found["hooks of a tensor"] = (
        _tensor(0, (4,), (1,)).replace(b"tR", b"cos\nsystem\n" + _short_text(touch) + b"\x85RtR"),
        "asks for os.system,",
    )
    stack = b"\x80\x04" + _short_text("os") + _short_text("system") + b"\x93" + _short_text(touch) + b"\x85R."
    found["STACK_GLOBAL"] = (stack, "asks for os.system,")
    return found


def corpus(canary: str) -> dict[str, tuple[bytes, str]]:
    """Name -> (pickle, what the refusal says)."""
    damaged = "is damaged: its pickle cannot be read"
    deep = b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b"."
    return _globals(canary) | {
        "a class of its own": (b"\x80\x02(Vx\nios\nsystem\n.", "uses the pickle instruction"),
        "INST": (b"\x80\x02(ios\nsystem\n.", "uses the pickle instruction INST"),
        "OBJ": (b"\x80\x02(ctorch\nSize\no.", "uses the pickle instruction OBJ"),
        "EXT1": (b"\x80\x02\x82\x01.", "uses the pickle instruction EXT1"),
        "EXT4": (b"\x80\x02\x84\x01\0\0\0.", "uses the pickle instruction EXT4"),
        "NEXT_BUFFER": (b"\x80\x05\x97.", "uses the pickle instruction NEXT_BUFFER"),
        "BYTEARRAY8": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", damaged),
        "DUP": (b"\x80\x02}2.", "uses the pickle instruction DUP"),
        "PERSID": (b"\x80\x02Pstorage\n.", "uses the pickle instruction PERSID"),
        "a call of a call": (b"\x80\x02ctorch\nSize\n)R)R.", damaged),
        "state of a global": (b"\x80\x02ctorch\nSize\n}b.", damaged),
        "state of a list": (b"\x80\x02]}b.", damaged),
        "items of a global": (b"\x80\x02ctorch\nSize\nK\1K\2s.", damaged),
        "a key that is a list": (b"\x80\x02}]K\1s.", damaged),
        "a memo of four billion": (b"\x80\x02}r\xff\xff\xff\xff.", ""),
        "a memo that is empty": (b"\x80\x02h\x07.", damaged),
        "a text of a terabyte": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.", damaged),
        "bytes without bound": (b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"x.", damaged),
        "a number of a gigabyte": (b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"\1.", damaged),
        "a number in text": (b"\x80\x02L" + b"9" * 10**5 + b"L\n.", damaged),
        "lists a million deep": (deep, "does not end within 1000000 instructions"),
        "sixty doublings": (_laughs(), "nested without end"),
        "a dict in itself": (_itself(), "nested without end"),
        "no end": (b"\x80\x02}", damaged),
        "nothing on the stack": (b"\x80\x02.", damaged),
        "no mark": (b"\x80\x02u.", damaged),
        "a storage that is a number": (b"\x80\x02K\1Q.", damaged),
        "a storage of another type": (_tensor(0, (4,), (1,), _storage("OsStorage")), "asks for torch.OsStorage"),
        "a storage with a path for a key": (_tensor(0, (4,), (1,), _storage(key="../../x")), ""),
        "a storage of exabytes": (_tensor(0, (2**58,), (1,), _storage(numel=2**58)), ""),
        "a storage below nothing": (_tensor(0, (4,), (1,), _storage(numel=-4)), damaged),
        "strides beyond the storage": (_tensor(0, (2, 2), (2**40, 1)), "expected a tensor within"),
        "strides below nothing": (_tensor(3, (4,), (-1,)), "expected whole numbers"),
        "an offset beyond the storage": (_tensor(2**62, (1,), (1,)), "expected a tensor within"),
        "an offset below nothing": (_tensor(-1, (1,), (1,)), "expected whole numbers"),
        "one value a trillion times": (_tensor(0, (2**40,), (0,)), "expected a tensor within"),
        "sizes that overflow": (_tensor(0, (2**32, 2**32, 2**32), (0, 0, 0)), "too large for any array"),
        "sizes that are no numbers": (_tensor(0, ("4",), (1,)), "expected whole numbers"),
        "sizes that are lists": (_tensor(0, ([[]],), (1,)), "expected whole numbers"),
        "another number of strides": (_tensor(0, (2, 2), (1,)), "expected a stride for every dimension"),
        "a thousand dimensions": (_tensor(0, (1,) * 1000, (1,) * 1000), "too large for any array"),
        "a torch.Size of a dict": (_tensor(0, (4,), (1,)).replace(b"K\x04\x85", b"ctorch\nSize\n}\x85R"), damaged),
        "a tensor of a dict": (_tensor(0, (4,), (1,), b"}"), "expected a storage"),
        "a tensor of nothing": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", damaged),
        "attributes of what is no tensor": (
            b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nSize\nctorch\nTensor\n)}tR.",
            "expected what makes a tensor and its arguments",
        ),
        "a tensor that makes itself": (
            b"\x80\x02" + b"ctorch._tensor\n_rebuild_from_type_v2\nq\0(h\0ctorch\nTensor\n)}tR.",
            "expected what makes a tensor and its arguments",
        ),
        "a dtype that is a text": (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n(" + _storage() + b"K\0)))}" + _short_text("os") + b"tR.",
            damaged,
        ),
    }


def write_zip(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/data/0", bytes(16))
    return path


def write_legacy(path: Path, data: bytes) -> Path:
    start = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + dumps(1001) + dumps({"little_endian": True})
    data = data.replace(b"tQ", b"NtQ")  # a sixth entry: that of a view
    path.write_bytes(start + data + dumps(["0"]) + struct.pack("<q", 4) + bytes(16))
    return path


def main(folder: Path, canary: str) -> None:
    from clip_jax.convert.readers import open_file
    from clip_jax.errors import CheckpointError

    base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (base + 512 * _MIB, base + 512 * _MIB))
    outcome: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for name, (data, _) in corpus(canary).items():
        for kind, write in (("zip", write_zip), ("legacy", write_legacy)):
            path = write(folder / "x.pt", data)
            start = time.monotonic()
            try:
                file = open_file(path)
                result = f"loaded {sum(file.read(tensor).size for tensor in file.tensors)}"
            except CheckpointError as error:
                result = str(error)
            except BaseException as error:  # that is what must not happen
                result = f"CRASH {type(error).__name__}: {error}"
            outcome[name][kind] = [result, time.monotonic() - start]
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
