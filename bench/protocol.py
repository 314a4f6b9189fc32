"""JSON lines between the benchmark and its workers: every request gets one reply.

The first request describes the case and is answered with facts; each later one asks for one timed call. A
worker waits, blocked on its stdin, while another runs, and ends when its stdin closes.
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
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from bench.host import ROOT

Message = dict[str, Any]
#: Runs the model once, waits until it is done, and returns the shape of what came out.
Call = Callable[[], Sequence[int]]

_STDERR_TAIL = 2000


class WorkerError(Exception):
    """A worker died, hung, or said something that is not JSON."""


class Worker:
    """One contender on one case, in a process of its own. A context manager that ends the process.

    Attributes:
        name: For error messages.
    """

    def __init__(self, name: str, command: Sequence[str], *, timeout: float = 900.0) -> None:
        """Starts `command` in the root of the repository; no reply within `timeout` seconds is an error."""
        self.name = name
        self._timeout = timeout
        # A file, not a pipe: it is read only if something goes wrong, and a full pipe would block the worker.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True
        )

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
            raise WorkerError(self._blame(f"did not answer within {self._timeout:g} s"))
        if not line:
            raise WorkerError(self._blame(f"ended with exit code {self._process.wait()}"))
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            raise WorkerError(self._blame(f"answered {line[:80]!r}, which is not JSON")) from None

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

    def _blame(self, what: str) -> str:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _STDERR_TAIL))
        tail = self._stderr.read().decode(errors="replace").strip()
        stderr = f"Its stderr ends:\n{tail}" if tail else "Its stderr is empty."
        return f"The worker of {self.name} {what}. {stderr}"


def serve(start: Callable[[Message], tuple[Message, Call]]) -> None:
    """The worker's side. `start` makes the model of a case and returns facts about it, and what to time."""
    # Whatever else prints, libraries included, goes to stderr: stdout carries replies alone.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(message: Message) -> None:
        replies.write(json.dumps(message) + "\n")

    facts, call = start(json.loads(sys.stdin.readline()))
    begin = time.perf_counter()
    shape = call()
    reply({**facts, "first_call_s": round(time.perf_counter() - begin, 3), "output_shape": list(shape)})
    for _ in sys.stdin:
        cpu, begin = time.process_time(), time.perf_counter()
        call()
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        reply({"ms": round(1e3 * seconds, 3), "cpu_s": round(cpu, 4), "peak_rss_mib": peak_rss})
