"""Workers that answer, chatter, die, hang or talk nonsense. None of them loads a model."""

import io
import json
import sys

import pytest
from tqdm import tqdm

from bench import encode, interleave, report
from bench.interleave import Contender, run_case
from bench.protocol import Worker, WorkerError

# What a worker sees of the case comes back as facts, so that tests can look at it.
FAKE = """
import os
from bench.protocol import serve
def start(case):
    print("chatter on stdout")
    os.system("echo chatter of a child")
    facts = {"about": {"device": "abacus"}, "seen": case, "config": case.get("config", {"hidden_size": 8})}
    return facts, lambda: print("more chatter") or SHAPE
serve(start)
""".replace("SHAPE", "(2, 77, 8)")


def python(code):
    return sys.executable, "-c", code


def test_one_reply_per_request_whatever_the_worker_prints():
    with Worker("fake", python(FAKE)) as worker:
        facts = worker.ask({"family": "sd15"})
        assert facts["seen"] == {"family": "sd15"}
        assert facts["output_shape"] == [2, 77, 8]
        assert facts["first_call_s"] >= 0
        for _ in range(3):
            assert set(worker.ask({})) == {"ms", "cpu_s", "peak_rss_mib"}
    assert worker._process.returncode == 0  # it ended by itself when its stdin closed


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import sys; sys.exit('no such weights')",
            "fake ended with exit code 1. Its stderr ends:\nno such weights",
        ),
        ("import sys; sys.stderr.write('x' * 9999 + 'end'); sys.exit(3)", "exit code 3.*: ?\nx{1997}end$"),
        ("raise SystemExit", "exit code 0. Its stderr is empty"),
        ("print('hello')", "answered 'hello\\\\n', which is not JSON"),
    ],
)
def test_a_worker_that_fails(code, message):
    with Worker("fake", python(code)) as worker, pytest.raises(WorkerError, match=message):
        worker.ask({"large": "x" * 100_000})


def test_a_worker_that_dies_between_calls():
    code = FAKE.replace("lambda:", "lambda calls=[]: calls.append(1) or 1 // (len(calls) < 2) and")
    with Worker("fake", python(code)) as worker:
        worker.ask({})
        with pytest.raises(WorkerError, match="(?s)exit code 1.*ZeroDivisionError"):
            worker.ask({})


def test_a_worker_that_hangs():
    code = "import sys, time; print('stuck', file=sys.stderr, flush=True); time.sleep(60)"
    with (
        Worker("fake", python(code), timeout=1.5) as worker,
        pytest.raises(WorkerError, match=r"did not answer within 1\.5 s.*\nstuck"),
    ):
        worker.ask({})


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(interleave, "PAUSE_S", 0)


def test_a_case(no_pause):
    contenders = [Contender("ours", python(FAKE)), Contender("peer", python(FAKE))]
    with tqdm(file=io.StringIO()) as bar:
        case = run_case(contenders, "sd15", "float32", 3, bar)
    assert bar.n == interleave.WARMUP + 3
    ours, peer = case["contenders"].values()
    assert "config" not in ours["seen"]
    assert peer["seen"]["config"] == {"hidden_size": 8}  # ours told it
    assert [len(row) for row in peer["seen"]["ids"]] == [77, 77]
    assert ours["seen"]["ids"] == peer["seen"]["ids"]
    for found in (ours, peer):
        assert len(found["ms"]["samples"]) == 3
    assert set(case["ratio_to"]) == {"peer"}


def test_outputs_of_different_shapes_are_not_compared(no_pause):
    contenders = [Contender("ours", python(FAKE)), Contender("peer", python(FAKE.replace("77, 8", "1, 8")))]
    with tqdm(file=io.StringIO()) as bar, pytest.raises(WorkerError, match="sd15 float32 differ in shape"):
        run_case(contenders, "sd15", "float32", 2, bar)


def test_the_command_writes_what_the_report_reads(no_pause, monkeypatch, tmp_path, capsys):
    fake = FAKE.replace('"abacus"', '"abacus", "versions": {"python": "3"}')
    monkeypatch.setattr(encode, "Contender", lambda name, _: Contender(name, python(fake)))
    out = tmp_path / "new" / "run.json"
    options = "--no-torch --families sd15 sd21 --dtypes float32 --repeats 2 --out".split()
    encode.main([*options, str(out)])
    result = json.loads(out.read_text())
    assert [case["family"] for case in result["cases"]] == ["sd15", "sd21"]
    capsys.readouterr()
    report.main([str(out)])
    assert "| sd21 | float32 |" in capsys.readouterr().out


def test_a_noisy_machine_is_told(monkeypatch, tmp_path, capsys):
    cases = [{"family": f, "dtype": "float32", "other_cores": c} for f, c in (("sd15", 0.1), ("sd21", 0.4))]
    monkeypatch.setattr(encode, "run", lambda *_: {"cases": cases})
    encode.main(["--no-torch", "--out", str(tmp_path / "run.json")])
    warning = capsys.readouterr().err
    assert "0.4 cores during sd21 float32" in warning
    assert "sd15" not in warning


def test_missing_torch_and_interpreters_are_told_before_anything_runs(monkeypatch):
    monkeypatch.setattr(encode, "run", pytest.fail)
    with pytest.raises(SystemExit, match="--jax-python: there is no interpreter 'no-such-python'"):
        encode.main(["--jax-python", "no-such-python"])
    monkeypatch.setattr(encode.subprocess, "run", lambda *_: type("Done", (), {"returncode": 1}))
    with pytest.raises(SystemExit, match="lacks torch or transformers.*--no-torch"):
        encode.main([])
