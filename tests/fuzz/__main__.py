"""Damages small files and opens them: `python -m tests.fuzz --count 20000 [--reader GGUF] [--seed 0]`.

Each has to end in a `CheckpointError`, or in tensors of the shapes and dtypes that were announced; within two
seconds, a gigabyte of address space, and without a process started, code run or a file written. What does not is
kept, and said how to bring about again.
"""

from __future__ import annotations

import argparse
import codecs
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_jax.convert.layouts import find_encoders
from clip_jax.convert.readers import open_file
from clip_jax.convert.source import TensorSource
from clip_jax.errors import CheckpointError
from tests.fuzz.mutate import damaged
from tests.fuzz.seeds import seeds

_SECONDS, _BYTES = 2, 2**30
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "exec", "compile")
_FORBIDDEN += ("socket.connect", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "shutil.rmtree", "ctypes.dlopen")


class Fault(BaseException):
    """What must not happen; no Exception, so that nothing catches it."""


def read_whole(path: Path) -> str:
    """Opens a file, reads all of it, and looks for text encoders in it.

    Returns:
        "loaded" or "refused".

    Raises:
        Fault: A tensor is not what was announced.
    """
    try:
        file = open_file(path)
        for name, info in file.tensors.items():
            array = file.read(name)
            if array.shape != info.shape or array.dtype != info.dtype:
                raise Fault(f"{name}: announced {info.dtype} {info.shape}, found {array.dtype} {array.shape}")
            array.tobytes() if array.nbytes < 2**20 else array.ravel()[:1].tobytes()
        source = TensorSource([file])
        for encoder in find_encoders(source.state, str(path), metadata=source.metadata):
            for tensor in encoder.state.values():
                if tensor.read().shape != tensor.shape:
                    raise Fault(f"{tensor.key}: announced {tensor.shape}, found {tensor.read().shape}")
    except CheckpointError:
        return "refused"
    return "loaded"


@contextmanager
def guarded() -> Iterator[Callable[[bool], None]]:
    """Bounds time and memory, and watches what is done; yields a switch for the watching."""
    watching = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        if event in _FORBIDDEN or (event == "open" and arguments[1] not in (None, "r", "rb")):
            raise Fault(f"{event} {str(arguments)[:200]}")

    def late(*_: object) -> None:
        raise Fault(f"took more than {_SECONDS} s")

    def switch(on: bool) -> None:
        nonlocal watching
        watching = on
        signal.setitimer(signal.ITIMER_REAL, _SECONDS if on else 0)

    base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (base + _BYTES, base + _BYTES))
    signal.signal(signal.SIGALRM, late)
    sys.addaudithook(watch)
    yield switch


def fuzz(
    reader: str,
    files: list[bytes],
    count: int,
    seed: int,
    path: Path,
    switch: Callable[[bool], None],
    read: Callable[[Path], str] = read_whole,
) -> dict[str, Any]:
    """Damages and reads `count` files; tells how many were refused and loaded, and what went wrong."""
    outcome: dict[str, Any] = {"reader": reader, "files": 0, "refused": 0, "loaded": 0, "slowest_ms": 0.0, "faults": []}
    for number in range(seed, seed + count):
        rng = random.Random(f"{reader} {number}")
        content = damaged(rng.choice(files), files, rng)
        path.write_bytes(content)
        start = time.perf_counter()
        fault = None
        try:
            switch(True)
            outcome[read(path)] += 1
        except BaseException as error:
            fault = f"{type(error).__name__}: {error}"
        finally:
            switch(False)
        outcome["files"] += 1
        outcome["slowest_ms"] = max(outcome["slowest_ms"], round(1e3 * (time.perf_counter() - start), 1))
        if fault is not None:
            kept = path.parent / f"{reader.replace(' ', '-')}-{number}"
            kept.write_bytes(content)
            command = f"python -m tests.fuzz --reader {reader!r} --seed {number} --count 1"
            outcome["faults"].append({"fault": fault[:500], "again": command, "file": str(kept)})
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=20000, help="files of each reader (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first file (%(default)s)")
    parser.add_argument("--reader", help="only this one")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    chosen = seeds(folder)
    if arguments.reader:
        chosen = {arguments.reader: chosen[arguments.reader]}
    for files in chosen.values():  # imports what is imported late, and makes sure that the seeds are whole
        for content in files:
            (folder / "file").write_bytes(content)
            if read_whole(folder / "file") != "loaded":
                raise SystemExit("a seed is damaged itself")
    codecs.lookup("raw-unicode-escape")  # a module of Python's own, which it imports for one instruction of pickles
    failed = False
    with guarded() as switch:
        for reader, files in chosen.items():
            outcome = fuzz(reader, files, arguments.count, arguments.seed, folder / "file", switch)
            failed |= bool(outcome["faults"])
            print(json.dumps(outcome), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
