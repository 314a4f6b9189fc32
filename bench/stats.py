"""Medians and spreads of samples; pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles (inclusive: as numpy's), interquartile range, and extremes of two or more samples."""
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    found = {"median": median, "q1": q1, "q3": q3, "iqr": q3 - q1, "min": min(samples), "max": max(samples)}
    return {name: round(value, 4) for name, value in found.items()}


def pairwise_ratio(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Median and extremes of `ours[i] / peer[i]`, the samples of one round each: drift cancels out."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    found = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}  # some are of microseconds to seconds


def least_ms(flops: float, read_mib: float, matmul_gops: float, copy_gbps: float) -> float:
    """The least time of a call, by what the machine was measured to do: its products, or reading its kernels once."""
    return round(max(flops / matmul_gops / 1e6, read_mib * 2**20 / copy_gbps / 1e6), 4)
