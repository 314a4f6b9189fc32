"""The Python environments that contenders run in: what they lack, and helpers that run in them once."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence

from bench.contenders import ENVIRONMENTS, Contender
from bench.host import ROOT
from bench.protocol import WorkerError

_MISSING = (
    "import sys; from importlib.util import find_spec; "
    "print(*(name for name in sys.argv[1:] if find_spec(name) is None))"
)
_STDERR_TAIL = 2000


def parse_pythons(pairs: Sequence[str]) -> dict[str, str]:
    """NAME=PATH, as `--python` takes it, -> environment name -> interpreter; this one for those not named.

    Raises:
        ValueError: An unknown name, no "=", or no such interpreter.
    """
    pythons = dict.fromkeys(ENVIRONMENTS, sys.executable)
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or name not in pythons:
            raise ValueError(f"--python {pair}: expected NAME=PATH, where NAME is one of {', '.join(ENVIRONMENTS)}")
        found = shutil.which(path)
        if found is None:
            raise ValueError(f"--python {pair}: there is no interpreter {path!r}")
        pythons[name] = os.path.abspath(found)  # helpers start in another folder; links stay, as they make a venv
    return pythons


@functools.cache
def missing(python: str, packages: tuple[str, ...]) -> tuple[str, ...]:
    """Which of `packages` an interpreter lacks."""
    done = subprocess.run([python, "-c", _MISSING, *packages], capture_output=True, text=True, check=True)
    return tuple(done.stdout.split())


def unfit(contender: Contender, pythons: Mapping[str, str], platform: str) -> str | None:
    """Why a contender takes no part in any case; None if it does."""
    if platform not in contender.platforms:
        return f"it runs on {' and '.join(contender.platforms)}, and is no match for a {platform}"
    if lacks := missing(pythons[contender.environment], contender.packages):
        return f"{', '.join(lacks)} not installed (--python {contender.environment}=PATH)"
    return None


def elsewhere(environment: str, platform: str, ours: str) -> str | None:
    """Why what runs on `platform` in an environment is not held against ours; None if ours runs on the same."""
    if platform == ours:
        return None
    found = f"it runs on {platform}, clip_jax on {ours}"
    if ours == "cpu":
        return f"{found}: install our extra for that (such as cuda12), or name an environment (--python clip_jax=PATH)"
    return f"{found}: name an environment where it runs on {ours} (--python {environment}=PATH)"


def run_helper(python: str, module: str, *arguments: object) -> str:
    """Runs a module once, and returns what it printed.

    Raises:
        WorkerError: It failed; shows the end of its stderr.
    """
    command = [python, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise WorkerError(f"{module} ended with exit code {done.returncode}", done.stderr[-_STDERR_TAIL:].strip())
    return done.stdout
