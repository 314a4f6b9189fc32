"""Cores of others, by clocks that stand where the test puts them."""

import pytest

from bench import host


def test_cores_that_others_take(monkeypatch):
    clocks = {"perf_counter": 10.0, "process_time": 3.0, "busy_seconds": 100.0}
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(host.time, name, lambda name=name: clocks[name])
    monkeypatch.setattr(host, "busy_seconds", lambda: clocks["busy_seconds"])
    other_cores = host.watch_others()
    clocks.update(perf_counter=14.0, process_time=8.0, busy_seconds=106.0)
    taken = other_cores()
    clocks.update(process_time=10.0)  # more than the machine says it was busy, whose ticks are coarse
    assert (taken, other_cores()) == (0.25, 0)


@pytest.mark.parametrize(("cores", "told"), [(0.1, False), (0.11, True)])
def test_noise_is_told_above_the_limit(cores, told, capsys):
    host.tell_noise(cores, "a case")
    assert ("Not quiet: other processes took 0.11 cores during a case." in capsys.readouterr().err) is told


def test_results_are_named_after_the_device(monkeypatch):
    monkeypatch.setattr(host, "cores", lambda: 2)
    assert host.slug({"platform": "cpu", "name": "cpu"}) == "cpu-2-cores"
    assert host.slug({"platform": "gpu", "name": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"
