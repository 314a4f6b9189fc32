"""The command, with everything that takes time replaced."""

import json
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import report
from bench.protocol import WorkerError
from tests.bench.fakes import RESULT

CEILINGS = {"matmul_gops": {"float32": 1000, "int8": 2000}, "copy_gbps": 20, "flops": {"sd15:8": 4e10, "sdxl:1": 2e11}}


@pytest.fixture
def machine(monkeypatch):
    """Helpers that answer at once; returns what they were asked."""
    asked = []

    def helper(python, module, *arguments):
        asked.append((module, *arguments))
        return json.dumps(CEILINGS if module == "bench.ceilings" else {"platform": "gpu", "name": "NVIDIA H200 (SXM)"})

    monkeypatch.setattr(command, "run_helper", helper)
    return asked


def found(**changes):
    cases = json.loads(json.dumps(RESULT["cases"]))
    cases[0]["contenders"]["clip_jax"] |= {"read_mib": 100.0}
    return {"contenders": RESULT["contenders"], "left_out": {}, "cases": cases, **changes}


def test_it_writes_what_the_report_reads(machine, monkeypatch, tmp_path, capsys):
    asked = {}

    out = tmp_path / "new" / "encode-nvidia-h200-sxm.json"

    def run_cases(contenders, cases, shop, after_each):
        asked.update(names=[one.name for one in contenders], cases=list(map(str, cases)), shop=shop)
        after_each(found())
        assert json.loads(out.read_text())["cases"]
        out.unlink()
        return found()

    monkeypatch.setattr(command, "run_cases", run_cases)
    options = ["--presets", "sd15", "--precisions", "float32", "int8", "--batches", "1", "8", "--repeats", "3"]
    also = ["--also", "sd21:4"]
    command.main(["encode", *options, *also, "--contenders", "torch eager", "--out", str(tmp_path / "new")])
    assert asked["names"] == ["clip_jax", "torch eager"]
    product = ["sd15 float32 x1", "sd15 float32 x8", "sd15 int8 x1", "sd15 int8 x8"]
    assert asked["cases"] == [*product, "sd21 float32 x4", "sd21 int8 x4"]
    assert (asked["shop"].platform, asked["shop"].repeats) == ("gpu", 3)
    assert not asked["shop"].scratch.exists()  # a temporary folder
    assert machine[-1] == ("bench.ceilings", "sd15:1", "sd15:8", "sd21:4", "--precisions", "float32", "int8")

    result = json.loads(out.read_text())
    assert report.tables(result, out.name)[0].marker == "bench:encode:gpu"
    assert result["cases"][0]["flops"] == 4e10
    assert result["cases"][0]["contenders"]["clip_jax"]["least_ms"] == 40
    capsys.readouterr()
    report.main([str(out)])
    assert "| sd15 | float32 | 8 | clip_jax |" in capsys.readouterr().out


def test_all_benchmarks_are_run_unless_named(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "run_cases", lambda *_: found())
    monkeypatch.setattr(command, "run_cold", lambda *_: found())
    monkeypatch.setattr(command, "run_cache", lambda *_: found())
    command.main(["--out", str(tmp_path), "--scratch", str(tmp_path / "kept")])
    names = {path.name.partition("-")[0] for path in tmp_path.glob("*.json")}
    assert names == {"encode", "compat", "cold", "cache"}
    assert (tmp_path / "kept").exists()


@pytest.mark.parametrize("benchmarks", [[], ["encode", "cache"]])
def test_flux_has_no_pairs_to_find_in_the_cache(machine, benchmarks):
    with pytest.raises(SystemExit, match="cache is of pairs, and flux has none; name the benchmark: encode"):
        command.main([*benchmarks, "--presets", "sd15", "flux"])


def test_a_noisy_machine_is_told(machine, monkeypatch, tmp_path, capsys):
    noisy = found()
    noisy["cases"][0]["other_cores"], noisy["cases"][1]["other_cores"] = 0.1, 0.4
    monkeypatch.setattr(command, "run_cases", lambda *_: noisy)
    command.main(["compat", "--out", str(tmp_path)])
    warning = capsys.readouterr().err
    assert "0.4 cores during sdxl int8" in warning
    assert "sd15" not in warning


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["decode"], "there is no benchmark decode; known are cache, cold, compat, encode"),
        (["--contenders", "tensorflow"], "there is no contender tensorflow"),
        (["--also", "sd15"], "2"),
        (["--also", "sd22:1"], "2"),
        (["--python", "torch=no-such-python"], "there is no interpreter 'no-such-python'"),
    ],
)
def test_what_is_not_there_is_told_before_anything_runs(options, message, monkeypatch):
    monkeypatch.setattr(command, "run_helper", pytest.fail)
    with pytest.raises(SystemExit, match=message):
        command.main(options)


def test_a_failure_is_a_message(machine, monkeypatch, tmp_path):
    def fail(*_):
        raise WorkerError("ours died", "stderr")

    monkeypatch.setattr(command, "run_cases", fail)
    with pytest.raises(SystemExit, match="bench: ours died. stderr"):
        command.main(["compat", "--out", str(tmp_path)])
    assert not list(Path(tmp_path).iterdir())
