"""Calls of a cache: what the worker prints becomes cases; one round of the real worker on a small model."""

import json
import sys

import pytest

from bench import cached
from bench.protocol import WorkerError
from bench.workers import cache_clip_jax
from bench.workshop import Workshop
from tests.bench.fakes import PYTHONS

ABOUT = {"device": "Some CPU", "versions": {"python": "3.14.1"}}
MS = {"both": [10.0, 20.0], "one": [6.0, 12.0], "none": [0.01, 0.02]}


@pytest.fixture
def shop(tmp_path):
    for preset in ("sd15", "sdxl"):
        (tmp_path / preset / "weights").mkdir(parents=True)
    return Workshop(PYTHONS, "cpu", "Some CPU", tmp_path, 2)


def test_a_case_for_each_preset(shop, monkeypatch):
    printed = "chatter\n" + json.dumps({"about": ABOUT, "ms": MS, "other_cores": 0.02})
    monkeypatch.setattr(cached, "run_helper", lambda python, module, weights, repeats: printed)
    result = cached.run_cache(shop, ["sd15", "sdxl"])
    assert [case["preset"] for case in result["cases"]] == ["sd15", "sdxl"]
    case = result["cases"][0]
    assert case["other_cores"] == 0.02
    assert case["contenders"]["one"]["ms"]["median"] == 9
    assert case["ratios"] == {
        "both": {
            "one": {"median": 0.6, "min": 0.6, "max": 0.6},
            "none": {"median": 0.001, "min": 0.001, "max": 0.001},
        }
    }
    assert result["contenders"]["none"] == ABOUT


def test_a_worker_that_fails_ends_the_run(shop):
    with pytest.raises(WorkerError, match="no.such ended with exit code 1"):
        cached.run_cache(shop, ["sd15"], worker="no.such")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_worker_times_each_kind_of_call(encoder, tmp_path, monkeypatch, capsys):
    encoder.save(tmp_path / "converted")
    monkeypatch.setattr(cache_clip_jax, "_AT_ONCE", 10)
    cache_clip_jax.main(str(tmp_path), 2)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    pair, one, again = found["ms"].values()
    assert len(pair) == len(one) == len(again) == 2
    assert min(pair) > max(again) > 0
