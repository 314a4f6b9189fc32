"""Runs the cases of `encode` and of `compat`: ours, one or more, beside each peer, one peer after the other."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.compare import error
from bench.contenders import Contender
from bench.environments import elsewhere, unfit
from bench.interleave import take_turns
from bench.protocol import LeftOut, Message, Worker, WorkerError
from bench.stats import pairwise_ratio, summary
from bench.workshop import Case, Workshop

#: Name of an output -> values.
Arrays = Mapping[str, np.ndarray]


def run_cases(
    contenders: Sequence[Contender],
    cases: Sequence[Case],
    shop: Workshop,
    after_each: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """All cases, and what the contenders say about themselves; the first contender is ours, and can do all of them.

    Who takes no part is in `left_out` with the reason: here of all cases, in a case of that. `after_each` gets what
    there is after each peer of a case, which then is not lost if a later one ends it all.

    Raises:
        WorkerError: Ours cannot run at all, or died while it was timed.
    """
    first = contenders[0]
    left_out = {one.name: reason for one in contenders if (reason := unfit(one, shop.pythons, shop.platform))}
    if first.name in left_out:
        raise WorkerError(f"{first.name} cannot run: {left_out[first.name]}")
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}.", file=sys.stderr)
    groups = {
        case: [
            one
            for one in contenders
            if one.name not in left_out and case.preset in one.presets and case.precision in one.precisions
        ]
        for case in cases
    }
    references: dict[tuple[str, int], Arrays] = {}
    abouts: dict[str, Message] = {}
    found: dict[str, Any] = {"contenders": {}, "left_out": left_out, "cases": []}
    peers = sum(not one.ours for group in groups.values() for one in group)
    with tqdm(total=peers, unit="peer", disable=None, leave=False) as bar:
        for case, group in groups.items():
            key = (case.preset, case.batch)
            if key not in references:
                bar.set_description(f"{case}: weights and reference")
                references[key] = _reference(first, case, shop)
            ended = found["cases"]
            for result in run_case(group, case, references[key], shop, bar):
                abouts |= {name: entry.pop("about") for name, entry in result["contenders"].items()}
                found["contenders"] = {one.name: abouts[one.name] for one in contenders if one.name in abouts}
                found["cases"] = [*ended, result]
                if after_each:
                    after_each(found)
    return found


def run_case(
    contenders: Sequence[Contender], case: Case, reference: Arrays, shop: Workshop, bar: tqdm
) -> Iterator[dict[str, Any]]:
    """Ours beside each peer, and what is known after it. One peer at a time is in memory: models of SDXL are large.

    Raises:
        WorkerError: One of ours died while it was timed. Whatever else fails is left out.
    """
    run = _Run(case, reference, shop)
    ours = [one for one in contenders if one.ours]
    peers = [one for one in contenders if not one.ours]
    requests = {}
    for peer in peers:  # before ours take memory
        bar.set_description(f"{case}: export for {peer.name}")
        with run.leaving_out(peer):
            requests[peer.name] = shop.request(peer, case)
    with contextlib.ExitStack() as stack:
        seated = []
        for one in ours:
            bar.set_description(f"{case}: {one.name} loads")
            with run.leaving_out(one):
                seated.append(stack.enter_context(run.seat(one, shop.request(one, case))))
        for peer in peers:
            bar.set_description(f"{case}: {peer.name}")
            if peer.name in requests:
                with run.leaving_out(peer), run.seat(peer, requests[peer.name]) as worker:
                    run.turns(seated, worker)
            if dead := [worker.name for worker in seated if not worker.alive]:
                raise WorkerError(f"{dead[0]} died beside {peer.name}")
            bar.update()
            if run.samples:
                yield run.result()
        if seated and not run.samples:
            run.turns(seated)
    yield run.result()


class _Run:
    """What comes together of a case."""

    def __init__(self, case: Case, reference: Arrays, shop: Workshop) -> None:
        self.case, self.reference, self.shop = case, reference, shop
        self.samples: dict[str, list[float]] = {}
        self.after_pause: dict[str, list[float]] = {}
        self.entries: dict[str, Message] = {}
        self.ratios: dict[str, dict[str, Message]] = {}
        self.left_out: dict[str, str] = {}
        self.noise = 0.0

    @contextlib.contextmanager
    def leaving_out(self, one: Contender) -> Iterator[None]:
        """Where it fails, a contender is left out, and the others go on."""
        try:
            yield
        except (LeftOut, WorkerError) as reason:
            self.entries.pop(one.name, None)
            self.left_out[one.name] = reason.brief if isinstance(reason, WorkerError) else str(reason)
            tqdm.write(f"{self.case}: {one.name} is left out: {reason}", file=sys.stderr)

    @contextlib.contextmanager
    def seat(self, one: Contender, request: Message) -> Iterator[Worker]:
        """A worker that has made its model where ours runs, and whose first output is compared."""
        with Worker(one.name, (self.shop.pythons[one.environment], "-m", one.worker)) as worker:
            entry, outputs = worker.start(request), _read(request)
            if reason := elsewhere(one.environment, entry["about"]["platform"], self.shop.platform):
                raise LeftOut(reason)
            self.entries[one.name] = {**entry, "error": error(outputs, self.reference)}
            yield worker

    def turns(self, ours: Sequence[Worker], peer: Worker | None = None) -> None:
        workers = [*ours, peer] if peer else ours
        turns = take_turns(workers, self.shop.calls(self.case))
        self.noise = max(self.noise, turns.other_cores)
        for worker in workers:
            self.samples.setdefault(worker.name, []).extend(turns.ms[worker.name])
            self.after_pause.setdefault(worker.name, []).extend(turns.after_pause_ms[worker.name])
            self.entries[worker.name]["peak_rss_mib"] = turns.peak_rss_mib[worker.name]
        for one in ours:
            ratios = self.ratios.setdefault(one.name, {})
            # Ours among themselves have taken turns beside all peers.
            ratios |= {
                other.name: pairwise_ratio(self.samples[one.name], self.samples[other.name])
                for other in ours
                if other is not one
            }
            if peer:
                ratios[peer.name] = pairwise_ratio(turns.ms[one.name], turns.ms[peer.name])

    def result(self) -> dict[str, Any]:
        """Of those that have had their turns."""

        def told(samples: list[float]) -> Message:
            return {**summary(samples), "samples": [*samples]}

        return {
            **self.case._asdict(),
            "other_cores": self.noise,
            "contenders": {
                name: {**entry, "ms": told(self.samples[name]), "after_pause_ms": told(self.after_pause[name])}
                for name, entry in self.entries.items()
                if name in self.samples
            },
            "ratios": {name: {**ratios} for name, ratios in self.ratios.items()},
            "left_out": {**self.left_out},
        }


def _reference(ours: Contender, case: Case, shop: Workshop) -> Arrays:
    """What ours computes in float32, on the CPU."""
    request = shop.request(ours, case._replace(precision="float32"))
    command = (shop.pythons[ours.environment], "-m", ours.worker)
    with Worker(ours.name, command, env={"JAX_PLATFORMS": "cpu"}) as worker:
        worker.start(request)
    return _read(request)


def _read(request: Message) -> Arrays:
    """What a worker wrote; taken away, so that nobody's output is held for another's."""
    path = Path(request["output"])
    with np.load(path) as outputs:
        found = dict(outputs)
    path.unlink()
    return found
