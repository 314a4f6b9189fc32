"""The short table of `encode`: a row for each of ours in each case, and the ratio to each peer. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.timings import compared, fewer, listed, number, of_flux, when, where

_Json = Mapping[str, Any]


def rows(result: _Json) -> list[list[str]]:
    """Header, alignments, and a row for each of ours in each case."""
    ours = compared(result)
    peers = _peers(result, ours)
    header = ["preset", "precision", "pairs", "", "ms", *peers]
    return [header, ["---", "---", "---:", "---", *["---:"] * (1 + len(peers))]] + [
        [
            case["preset"],
            case["precision"],
            str(case["batch"]),
            name,
            number(case["contenders"][name]["ms"]["median"]),
            *(_ratio(case, name, peer) for peer in peers),
        ]
        for case in result["cases"]
        for name in ours
        if name in case["contenders"]
    ]


def caption(result: _Json, source: str) -> str:
    """What the table shows, and where the rest is."""
    ours = [result["contenders"][name]["versions"] for name in compared(result)[:1]]  # all have one environment
    facts = [
        where(result),
        *(f"ours with {listed({key: versions[key] for key in ('python', 'jax')})}" for versions in ours),
        when(result),
        f"`{source}`",
    ]
    return (
        "Guidance pairs of token ids to embeddings: our time, and that divided by each peer's in the same precision; "
        f"below 1 ours is faster. Medians of {result['settings']['repeats']} interleaved warm calls with each peer"
        f"{fewer(result)}, and of their ratios; {'; '.join(facts)}.{of_flux(result)} "
        "Spread, errors, first calls, memory, versions of all: [bench/README.md](bench/README.md#results)."
    )


def _peers(result: _Json, ours: list[str]) -> list[str]:
    names = [name for case in result["cases"] for ratios in case["ratios"].values() for name in ratios]
    return [name for name in dict.fromkeys(names) if name not in ours]


def _ratio(case: _Json, name: str, peer: str) -> str:
    ratio = case["ratios"].get(name, {}).get(peer)
    return f"{ratio['median']:.2f}" if ratio else ""
