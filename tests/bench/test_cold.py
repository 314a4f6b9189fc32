"""Whole processes that load no model."""

import pytest

from bench import cold
from bench.cold import PROCESSES, Process, run_cold
from bench.protocol import WorkerError
from bench.workshop import Workshop
from tests.bench.fakes import PYTHONS

FAKE = ("tests.bench.fake_cold", "torch", (), ("numpy",))
CACHED, PLAIN = Process("cached", *FAKE, cached=True), Process("plain", *FAKE)


@pytest.fixture
def shop(monkeypatch, tmp_path):
    monkeypatch.setattr(cold, "_PAUSE_S", 0)
    (tmp_path / "sd15" / "weights").mkdir(parents=True)
    return Workshop(PYTHONS, "cpu", "Some CPU", tmp_path, 2)


def test_processes_take_turns(shop, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/of/the/user")
    result = run_cold(shop, [CACHED, PLAIN])
    (case,) = result["cases"]
    cached, plain = case["contenders"].values()
    assert (cached["first_call_s"], plain["first_call_s"]) == (2, 1)
    assert len(plain["ms"]["samples"]) == 2
    assert plain["peak_rss_mib"] > 0
    assert {first: set(others) for first, others in case["ratios"].items()} == {"cached": {"plain"}}
    assert "numpy" in result["contenders"]["plain"]["versions"]
    assert result["contenders"]["plain"]["platform"] == "cpu"


def test_they_take_turns_in_all_orders(shop, monkeypatch):
    started = []
    run = cold._run

    def noted(process, shop, cache):
        started.append(process.name)
        return run(process, shop, cache)

    monkeypatch.setattr(cold, "_run", noted)
    run_cold(shop, [CACHED, PLAIN])
    assert started == ["cached", "plain", "cached", "plain", "plain", "cached"]  # the first of each does not count


def test_a_process_that_fails_ends_the_run(shop):
    failing = Process("failing", "no.such", *FAKE[1:])
    with pytest.raises(WorkerError, match="(?s)failing ended with exit code 1.*No module named"):
        run_cold(shop, [failing])


def test_missing_packages_leave_a_process_out(shop):
    lacking = Process("lacking", FAKE[0], "torch", ("no_such_package",), ())
    result = run_cold(shop, [PLAIN, lacking])
    assert result["left_out"] == {"lacking": "no_such_package not installed (--python torch=PATH)"}
    assert list(result["cases"][0]["contenders"]) == ["plain"]
    with pytest.raises(WorkerError, match="nothing to time"):
        run_cold(shop, [lacking])


def test_a_process_that_runs_elsewhere_is_left_out_and_told(shop, monkeypatch, capsys):
    run = cold._run

    def on_a_gpu(process, *rest):
        return run(process, *rest) | ({"platform": "gpu"} if process.name == "cached" else {})

    monkeypatch.setattr(cold, "_run", on_a_gpu)
    result = run_cold(shop, [PLAIN, CACHED])
    assert result["left_out"]["cached"].startswith("it runs on gpu, clip_jax on cpu: install our extra")
    assert list(result["contenders"]) == list(result["cases"][0]["contenders"]) == ["plain"]
    assert "cached is left out: it runs on gpu" in capsys.readouterr().err
    with pytest.raises(WorkerError, match="nothing to time"):
        run_cold(shop, [CACHED])


def test_ours_comes_first():
    assert PROCESSES[0].cached
    assert not PROCESSES[1].cached
    assert PROCESSES[0].module == PROCESSES[1].module != PROCESSES[2].module
