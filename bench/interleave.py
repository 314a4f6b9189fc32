"""Times one case: one call of each contender in turn, so that drift of the machine hits all alike."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from bench.host import busy_seconds
from bench.protocol import Message, Worker, WorkerError
from bench.stats import pairwise_ratio, summary

WARMUP = 2
# Between calls, so that the threads of the worker that ran last are asleep when the next one starts.
PAUSE_S = 0.05
BATCH, LENGTH = 2, 77


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who is timed.

    Attributes:
        name: As in the results.
        command: Starts its worker.
    """

    name: str
    command: tuple[str, ...]


def run_case(contenders: Sequence[Contender], family: str, dtype: str, repeats: int, bar: tqdm) -> dict[str, Any]:
    """Times all contenders on one case.

    The first contender is ours: its worker tells the others the architecture, and ratios are to it.

    Raises:
        WorkerError: A worker failed, or the outputs differ in shape.
    """
    facts: dict[str, Message] = {}
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    with contextlib.ExitStack() as stack:
        request: Message = {"family": family, "dtype": dtype, "ids": _ids()}
        workers = []
        for contender in contenders:
            bar.set_description(f"{family} {dtype}: {contender.name} loads")
            worker = stack.enter_context(Worker(contender.name, contender.command))
            workers.append(worker)
            facts[worker.name] = worker.ask(request)
            request["config"] = facts[worker.name].pop("config", request.get("config"))
        shapes = {name: found.pop("output_shape") for name, found in facts.items()}
        if len({tuple(shape) for shape in shapes.values()}) > 1:
            raise WorkerError(f"The outputs for {family} {dtype} differ in shape: {shapes}.")

        bar.set_description(f"{family} {dtype}")
        wall = cpu = busy = 0.0
        for turn in range(WARMUP + repeats):
            for worker in workers:
                time.sleep(PAUSE_S)
                begin, busy_before = time.perf_counter(), busy_seconds()
                sample = worker.ask({})
                busy += busy_seconds() - busy_before
                wall += time.perf_counter() - begin
                cpu += sample["cpu_s"]
                facts[worker.name]["peak_rss_mib"] = sample["peak_rss_mib"]
                if turn >= WARMUP:
                    samples[worker.name].append(sample["ms"])
            bar.update()

    for name, found in facts.items():
        found["ms"] = {**summary(samples[name]), "samples": samples[name]}
    ours, *peers = samples
    return {
        "family": family,
        "dtype": dtype,
        "other_cores": round(max(0.0, (busy - cpu) / wall), 2),
        "contenders": facts,
        "ratio_to": {peer: pairwise_ratio(samples[ours], samples[peer]) for peer in peers},
    }


def _ids() -> list[list[int]]:
    rng = random.Random(0)
    return [[49406, *(rng.randrange(49406) for _ in range(LENGTH - 2)), 49407] for _ in range(BATCH)]
