"""Times whole processes from their start to their first embeddings, interleaved: ours and torch's."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from bench.environments import elsewhere, missing
from bench.host import ROOT, busy_seconds
from bench.protocol import Message, WorkerError
from bench.stats import pairwise_ratio, summary
from bench.workshop import Workshop

_PRESET = "sd15"
_PAUSE_S = 0.5  # so that what the last process left behind, freed memory above all, is done with


class Process(NamedTuple):
    """A process to time.

    Attributes:
        name: As in the results.
        module: What it runs, on the folder of weights.
        environment: Name of its Python environment.
        packages: What that has to have, by the names they are imported under.
        versions: Names of the distributions to tell of.
        cached: Whether it finds its programs compiled already.
    """

    name: str
    module: str
    environment: str
    packages: tuple[str, ...]
    versions: tuple[str, ...]
    cached: bool = False


_OURS = ("bench.workers.cold_clip_jax", "clip_jax", ("clip_jax", "jax"), ("clip-jax-text", "jax", "jaxlib", "flax"))
PROCESSES = (
    Process("clip_jax, compiled before", *_OURS, cached=True),
    Process("clip_jax", *_OURS),
    Process("torch eager", "bench.workers.cold_torch", "torch", ("torch", "transformers"), ("torch", "transformers")),
)


def run_cold(shop: Workshop, processes: Sequence[Process] = PROCESSES) -> dict[str, Any]:
    """The one case: SD 1.5 in float32, weights in the page cache.

    Raises:
        WorkerError: A process failed, or there is none to time.
    """
    left_out = {
        process.name: f"{', '.join(lacks)} not installed (--python {process.environment}=PATH)"
        for process in processes
        if (lacks := missing(shop.pythons[process.environment], process.packages))
    }
    with tempfile.TemporaryDirectory(dir=shop.scratch) as cache:
        ready = [process for process in processes if process.name not in left_out]
        for process in ready:  # the first run fills the page cache and the folder of compiled programs
            platform = _run(process, shop, cache)["platform"]
            if reason := elsewhere(process.environment, platform, shop.platform):
                left_out[process.name] = reason
        for name, reason in left_out.items():
            print(f"{name} is left out: {reason}.", file=sys.stderr)
        timed = [process for process in ready if process.name not in left_out]
        if not timed:
            raise WorkerError("there is nothing to time")
        # In all orders: what a process leaves behind (memory that the system has to take back) hits all alike.
        orders = itertools.islice(itertools.cycle(itertools.permutations(timed)), shop.repeats)
        turns = list(itertools.chain.from_iterable(orders))
        runs: dict[str, list[Message]] = {process.name: [] for process in timed}
        for process in tqdm(turns, desc="cold", unit="process", disable=None, leave=False):
            runs[process.name].append(_run(process, shop, cache))
    return {"contenders": {p.name: _about(p, shop) for p in timed}, "left_out": left_out, "cases": [_case(runs)]}


def _run(process: Process, shop: Workshop, cache: str) -> Message:
    command = [shop.pythons[process.environment], "-m", process.module, str(shop.checkpoint(_PRESET))]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    if process.cached:
        # What compiles in less than a second would not be kept otherwise.
        env |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    time.sleep(_PAUSE_S)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        busy, begin = busy_seconds(), time.perf_counter()
        started = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err)
        _, status, used = os.wait4(started.pid, 0)
        wall_s, busy = time.perf_counter() - begin, busy_seconds() - busy
        started.returncode = os.waitstatus_to_exitcode(status)  # Popen does not know of wait4
        out.seek(0)
        err.seek(0)
        if started.returncode:
            raise WorkerError(f"{process.name} ended with exit code {started.returncode}", err.read()[-2000:])
        phases = json.loads(out.read().splitlines()[-1])
    return {
        "ms": round(1e3 * wall_s, 1),
        "peak_rss_mib": used.ru_maxrss // 1024,
        "other_cores": max(0.0, (busy - used.ru_utime - used.ru_stime) / wall_s),
        **phases,
    }


def _case(runs: Mapping[str, Sequence[Message]]) -> dict[str, Any]:
    def of(name: str, key: str) -> list[float]:
        return [run[key] for run in runs[name]]

    first, *others = runs
    return {
        "preset": _PRESET,
        "precision": "float32",
        "batch": 1,
        "other_cores": round(max(sum(of(name, "other_cores")) / len(runs[name]) for name in runs), 2),
        "contenders": {
            name: {
                "ms": {**summary(of(name, "ms")), "samples": of(name, "ms")},
                "peak_rss_mib": max(of(name, "peak_rss_mib")),
                **{key: summary(of(name, key))["median"] for key in ("import_s", "load_s", "first_call_s")},
            }
            for name in runs
        },
        "ratios": {first: {name: pairwise_ratio(of(first, "ms"), of(name, "ms")) for name in others}},
        "left_out": {},
    }


def _about(process: Process, shop: Workshop) -> Message:
    look = "import json, sys; from bench.host import versions; print(json.dumps(versions(*sys.argv[1:])))"
    done = subprocess.run(
        [shop.pythons[process.environment], "-c", look, *process.versions],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return {"platform": shop.platform, "device": shop.device, "versions": json.loads(done.stdout)}
