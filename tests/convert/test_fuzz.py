"""Some hundred damaged files of each kind; `.ci/run` reads 20,000 (`python -m tests.fuzz`)."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.mutate import damaged
from tests.fuzz.seeds import seeds

ROOT = Path(__file__).parents[2]
COUNT = 300
READERS = ("safetensors", "torch zip", "TorchScript", "torch legacy", "GGUF", "msgpack")


def run(*arguments):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def outcome():
    pytest.importorskip("gguf")
    done = run("tests.fuzz", "--count", str(COUNT))
    assert done.stdout, done.stderr
    return {result["reader"]: result for result in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_refused_or_read(outcome, reader):
    result = outcome[reader]
    assert result["faults"] == []
    assert result["files"] == COUNT
    # Both happen, or the damage would be too little or too much to tell anything.
    assert result["refused"] > COUNT / 2
    assert result["loaded"] > 0


def test_every_reader_is_there(tmp_path):
    assert tuple(seeds(tmp_path)) == READERS


@pytest.fixture(scope="module")
def controls():
    done = run("tests.fuzz.controls")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("control", "fault"),
    [
        ("crashes", "IndexError"),
        ("hangs", "Fault: took more than 2 s"),
        ("allocates", "MemoryError"),
        ("runs_a_command", "Fault: os.system"),
        ("starts_a_process", "Fault: subprocess.Popen"),
        ("evaluates", "Fault: compile"),
        ("writes", "Fault: open"),
    ],
)
def test_a_broken_reader_is_found_out(controls, control, fault):
    """Negative controls: the harness sees each of what it is there to see."""
    (found,) = controls[control]
    assert fault in found["fault"]
    assert found["again"] == "python -m tests.fuzz --reader 'control' --seed 0 --count 1"


def test_damage_is_the_same_every_time():
    files = [b"\x93abcdefgh" * 9, b"other" * 5]
    first, second = ([damaged(files[0], files, random.Random(f"x {i}")) for i in range(50)] for _ in range(2))
    assert first == second
    assert sum(content != files[0] for content in first) > 40
