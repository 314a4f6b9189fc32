"""Facts about the machine (Linux) and the checkout: neither host name nor paths."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    """The name of the CPU, or its architecture where the kernel does not tell."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def busy_seconds() -> float:
    """CPU time used up on the whole machine since it booted, what its hypervisor took included."""
    ticks = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


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


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
