"""Takes turns: a few calls of each worker after the other, so that drift of the machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from bench.host import busy_seconds
from bench.protocol import Worker

WARMUP = 2
# Between calls, so that the threads of the worker that ran last are asleep when the next one starts.
PAUSE_S = 0.05


class Turns(NamedTuple):
    """What a few rounds of turns gave, by the names of the workers.

    Attributes:
        ms: Of each warm call that counts, in order.
        after_pause_ms: Of the call before each of them, the first one after a pause.
        peak_rss_mib: Of each worker's process.
        other_cores: How many cores other processes took meanwhile, pauses included, on average.
    """

    ms: dict[str, list[float]]
    after_pause_ms: dict[str, list[float]]
    peak_rss_mib: dict[str, int]
    other_cores: float


def take_turns(workers: Sequence[Worker], repeats: int) -> Turns:
    """Gives each worker `repeats` turns, after a warm-up that does not count."""
    ms: dict[str, list[float]] = {worker.name: [] for worker in workers}
    after_pause_ms: dict[str, list[float]] = {worker.name: [] for worker in workers}
    peaks: dict[str, int] = {}
    cpu: dict[str, float] = {}
    begin = before = 0.0

    def others() -> float:  # CPU seconds of all processes but this one and the workers
        return busy_seconds() - time.process_time() - sum(cpu.values())

    for turn in range(WARMUP + repeats):
        if turn == WARMUP:
            begin, before = time.perf_counter(), others()
        for worker in workers:
            time.sleep(PAUSE_S)
            sample = worker.ask({})
            cpu[worker.name], peaks[worker.name] = sample["cpu_s"], sample["peak_rss_mib"]
            if turn >= WARMUP:
                ms[worker.name].append(sample["ms"])
                after_pause_ms[worker.name].append(sample["after_pause_ms"])
    other_cores = (others() - before) / (time.perf_counter() - begin)
    return Turns(ms, after_pause_ms, peaks, round(max(0.0, other_cores), 2))
