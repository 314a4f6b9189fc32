"""JSON lines between the benchmark and its workers: every request gets one reply.

The first request describes the case and is answered with facts; each later one asks for two timed calls, one after
the other: the first comes after a pause, the second is warm. A worker waits, blocked on its stdin, while another runs,
and ends when its stdin closes. The arrays that come out of the first call are written to the file that the case calls
`output`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from bench.host import ROOT

Message = dict[str, Any]

_STDERR_TAIL = 2000


class WorkerError(Exception):
    """A worker died, hung, or said something that is not JSON.

    Attributes:
        brief: The same without the worker's own words, which may hold paths.
    """

    def __init__(self, brief: str, details: str = "") -> None:
        super().__init__(f"{brief}. {details}" if details else brief)
        self.brief = brief


class LeftOut(Exception):
    """A contender cannot take part in a case; the text says why. Raised by `start`, and again by `Worker.start`."""


class Model(NamedTuple):
    """What `start` makes of a case.

    Attributes:
        facts: About the contender, for the result.
        call: Runs the model once, and waits until what it returns is there.
        arrays: Turns that into numpy arrays, for the comparison.
    """

    facts: Message
    call: Callable[[], Any]
    arrays: Callable[[Any], Mapping[str, np.ndarray]]


class Worker:
    """One contender on one case, in a process of its own. A context manager that ends the process.

    Attributes:
        name: For error messages.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, timeout: float = 900.0, env: Mapping[str, str] | None = None
    ) -> None:
        """Starts `command` in the root of the repository; no reply within `timeout` seconds is an error."""
        self.name = name
        self._timeout = timeout
        # A file, not a pipe: it is read only if something goes wrong, and a full pipe would block the worker.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def start(self, case: Message) -> Message:
        """Sends the case, and returns the facts.

        Raises:
            LeftOut: The contender cannot take part in it.
            WorkerError: As `ask`.
        """
        facts = self.ask(case)
        if "left_out" in facts:
            raise LeftOut(facts["left_out"])
        return facts

    def ask(self, request: Message) -> Message:
        """Sends a request and waits for its reply.

        Raises:
            WorkerError: There is none; shows the end of the worker's stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # a dead worker shows below, as an empty reply
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        hung = threading.Event()

        def give_up() -> None:
            hung.set()
            self._process.kill()

        watchdog = threading.Timer(self._timeout, give_up)
        watchdog.start()
        line = self._process.stdout.readline()
        watchdog.cancel()
        if hung.is_set():
            raise self._error(f"did not answer within {self._timeout:g} s")
        if not line:
            raise self._error(f"ended with exit code {self._process.wait()}")
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            raise self._error(f"answered {line[:80]!r}, which is not JSON") from None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=0 if error else 30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()

    def _error(self, what: str) -> WorkerError:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _STDERR_TAIL))
        tail = self._stderr.read().decode(errors="replace").strip()
        stderr = f"Its stderr ends:\n{tail}" if tail else "Its stderr is empty."
        return WorkerError(f"The worker of {self.name} {what}", stderr)


def serve(start: Callable[[Message], Model]) -> None:
    """The worker's side. `start` makes the model of a case; it raises `LeftOut` if it cannot."""
    # Whatever else prints, libraries included, goes to stderr: stdout carries replies alone.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(message: Message) -> None:
        replies.write(json.dumps(message) + "\n")

    case = json.loads(sys.stdin.readline())
    try:
        model = start(case)
    except LeftOut as reason:
        reply({"left_out": str(reason)})
        return
    begin = time.perf_counter()
    result = model.call()
    first_call_s = time.perf_counter() - begin
    arrays = model.arrays(result)
    np.savez(case["output"], **arrays)
    reply({**model.facts, "first_call_s": round(first_call_s, 3)})
    del result, arrays
    for _ in sys.stdin:
        after_pause_ms, ms = _ms(model.call), _ms(model.call)
        peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        cpu = round(time.process_time(), 4)  # since it began, of all its threads
        reply({"ms": ms, "after_pause_ms": after_pause_ms, "cpu_s": cpu, "peak_rss_mib": peak_rss})


def _ms(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return round(1e3 * (time.perf_counter() - begin), 3)
