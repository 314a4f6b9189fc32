"""Contenders that load no model, and a made-up result."""

import sys

from bench.contenders import ENVIRONMENTS, Contender

PYTHONS = dict.fromkeys(ENVIRONMENTS, sys.executable)
WORKER = "tests.bench.fake_worker"


def contender(name, **fields):
    """A contender whose worker returns ones."""
    return Contender(**{"name": name, "worker": WORKER, "environment": "torch", "packages": (), **fields})


def timed(median, q1, q3, **fields):
    ms, after_pause_ms = ({"median": median + more, "q1": q1 + more, "q3": q3 + more} for more in (0, 1000))
    return {"ms": ms, "after_pause_ms": after_pause_ms, "first_call_s": 1.5, "peak_rss_mib": 1234, **fields}


RESULT = {
    "schema": 4,
    "benchmark": "encode",
    "platform": "cpu",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "dirty": False,
    "host": {"cores": 4},
    "settings": {"weights": "random, the same in all", "repeats": 15},
    "ceilings": {"matmul_gops": {"float32": 1234.4, "int8": 5000}, "copy_gbps": 20.4},
    "contenders": {
        "clip_jax": {"device": "Some CPU", "versions": {"python": "3.14.1", "clip-jax-text": "0.1.0", "jax": "0.12.0"}},
        "torch eager": {"device": "Some CPU", "versions": {"python": "3.11.7", "torch": "2.13.0"}},
        "torch compiled": {"device": "Some CPU", "versions": {"python": "3.11.7", "torch": "2.13.0"}},
    },
    "left_out": {"OpenVINO": "nncf not installed"},
    "cases": [
        {
            "preset": "sd15",
            "precision": "float32",
            "batch": 8,
            "other_cores": 0.01,
            "contenders": {
                "clip_jax": timed(50, 49.95, 51, least_ms=40, error={"relative": 0.0, "min_cosine": 1.0}),
                "torch eager": timed(100.04, 90, 1234.4, error={"relative": 0.0123, "min_cosine": 0.99987}),
            },
            "ratios": {"clip_jax": {"torch eager": {"median": 0.5, "min": 0.4567, "max": 1.2}}},
            "left_out": {"torch compiled": "ended with exit code 1"},
        },
        {
            "preset": "sdxl",
            "precision": "int8",
            "batch": 1,
            "other_cores": 0.03,
            "contenders": {"torch compiled": timed(9.5, 9, 10)},
            "ratios": {},
            "left_out": {"clip_jax": "this clip_jax does not quantise"},
        },
    ],
}
