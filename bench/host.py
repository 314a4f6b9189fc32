"""Facts about the machine (Linux) and the checkout: neither host name nor paths."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Cores that other processes took while we timed. More than this, and the numbers are not worth publishing:
# a threaded matmul that waits for a core it shares can be 20 times slower, and not all suffer alike.
QUIET = 0.1


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    """The name of the CPU, or its architecture where the kernel does not tell."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def slug(device: Mapping[str, str]) -> str:
    """How files with the results of a device are called: of its `platform` and `name`."""
    if device["platform"] == "cpu":
        return f"cpu-{cores()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-")


def busy_seconds() -> float:
    """CPU time used up on the whole machine since it booted, what its hypervisor took included."""
    ticks = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def watch_others() -> Callable[[], float]:
    """Of a process that times itself: what it returns tells how many cores others have taken since, on average."""
    begin, busy, cpu = time.perf_counter(), busy_seconds(), time.process_time()

    def other_cores() -> float:
        others = busy_seconds() - busy - (time.process_time() - cpu)
        return round(max(0.0, others / (time.perf_counter() - begin)), 2)

    return other_cores


def tell_noise(other_cores: float, during: str) -> None:
    """Says so on stderr if the machine was not quiet."""
    if other_cores > QUIET:
        print(
            f"Not quiet: other processes took {other_cores} cores during {during}. "
            "Do not publish this; repeat it on a quiet machine.",
            file=sys.stderr,
        )


def host_facts() -> dict[str, object]:
    """What a reader needs to know of the machine."""
    return {
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": cores(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Of Python, and of packages by the names they are installed under."""
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def git_state() -> dict[str, object]:
    """The commit, None outside a repository; `dirty` if anything but results differs from it."""
    return {
        "commit": _git("rev-parse", "--verify", "--quiet", "HEAD") or None,
        "dirty": bool(_git("--no-optional-locks", "status", "--porcelain", "--", ".", ":!bench/results")),
    }


def stamp() -> dict[str, object]:
    """What a result of one's own begins with."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"schema": 1, "date": now, **git_state()}


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
