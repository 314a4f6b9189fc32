"""Readers with every fault that the harness is there to find, under the harness: prints what it says of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.fuzz.__main__ import fuzz, guarded, read_whole


def crashes(path: Path) -> str:
    return f"{path.read_bytes()[10**9]}"


def hangs(_: Path) -> str:
    while True:
        pass


def allocates(_: Path) -> str:
    return f"{np.ones(2**31, np.uint8).sum()}"


def runs_a_command(_: Path) -> str:
    return f"{os.system('true')}"


def starts_a_process(_: Path) -> str:
    return f"{subprocess.run(['true'], check=False)}"


def evaluates(_: Path) -> str:
    return f"{eval('1 + 1')}"


def writes(path: Path) -> str:
    path.with_name("other").write_bytes(b"x")
    return "loaded"


CONTROLS = (crashes, hangs, allocates, runs_a_command, starts_a_process, evaluates, writes)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, guarded() as switch:
        path = Path(folder) / "file"
        read_whole(path)  # imports what is imported late
        outcome = {
            control.__name__: fuzz("control", [b"seed"], 1, 0, path, switch, control)["faults"] for control in CONTROLS
        }
    json.dump(outcome, sys.stdout)
