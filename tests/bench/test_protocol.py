"""Workers that answer, chatter, leave out, die, hang or talk nonsense. None of them loads a model."""

import sys

import numpy as np
import pytest

from bench.protocol import LeftOut, Worker, WorkerError
from tests.bench.fakes import WORKER

FAKE = (sys.executable, "-m", WORKER)


def python(code):
    return sys.executable, "-c", code


@pytest.fixture
def case(tmp_path):
    return {"ids": [[1] * 77] * 2, "options": {}, "output": str(tmp_path / "output.npz")}


def test_one_reply_per_request_whatever_the_worker_prints(case):
    with Worker("fake", FAKE) as worker:
        facts = worker.start(case)
        assert facts["seen"] == case
        assert facts["first_call_s"] >= 0
        for _ in range(3):
            assert set(worker.ask({})) == {"ms", "after_pause_ms", "cpu_s", "peak_rss_mib"}
        assert worker.alive
    assert worker._process.returncode == 0  # it ended by itself when its stdin closed
    assert np.load(case["output"])["prompt_embeds"].shape == (2, 77, 8)


def test_a_worker_that_leaves_itself_out(case):
    with Worker("fake", FAKE) as worker, pytest.raises(LeftOut, match="^too small$"):
        worker.start({**case, "options": {"left_out": "too small"}})


@pytest.mark.parametrize(
    ("code", "brief", "details"),
    [
        ("import sys; sys.exit('no such weights')", "ended with exit code 1", "Its stderr ends:\nno such weights"),
        ("import sys; sys.stderr.write('x' * 9999 + 'end'); sys.exit(3)", "exit code 3", "\nx{1997}end$"),
        ("raise SystemExit", "exit code 0", "Its stderr is empty"),
        ("print('hello')", "answered 'hello\\\\n', which is not JSON", "Its stderr is empty"),
    ],
)
def test_a_worker_that_fails(code, brief, details):
    with Worker("fake", python(code)) as worker, pytest.raises(WorkerError, match=f"(?s){brief}.*{details}") as raised:
        worker.ask({"large": "x" * 100_000})
    assert raised.value.brief.startswith("The worker of fake")
    assert "stderr" not in raised.value.brief


def test_a_worker_that_dies_between_calls(case):
    with Worker("fake", FAKE) as worker:
        worker.start({**case, "options": {"calls": 3}})  # the first, and those of one request
        worker.ask({})
        with pytest.raises(WorkerError, match="(?s)exit code 1.*worn out"):
            worker.ask({})
        assert not worker.alive


def test_a_worker_that_hangs():
    code = "import sys, time; print('stuck', file=sys.stderr, flush=True); time.sleep(60)"
    with (
        Worker("fake", python(code), timeout=1.5) as worker,
        pytest.raises(WorkerError, match=r"did not answer within 1\.5 s.*\nstuck"),
    ):
        worker.ask({})
