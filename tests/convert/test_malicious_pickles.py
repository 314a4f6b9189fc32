"""Pickles that ask for more than tensors are refused, by name, before anything of them has happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert import malicious

# Not refused, because nothing is wrong with what is in them: there is just no tensor.
HARMLESS = {"a memo of four billion"}
SLOWEST_SECONDS = 60  # of a machine that is busy; without bounds these would take hours


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What became of every pickle, in a process of its own with half a gigabyte to spare."""
    folder = tmp_path_factory.mktemp("malicious")
    command = [sys.executable, malicious.__file__, str(folder), str(folder / "canary")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert not (folder / "canary").exists()
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("name", malicious.corpus("canary"))
def test_a_malicious_pickle_is_refused(outcome, name, kind):
    result, seconds = outcome[name][kind]
    assert seconds < SLOWEST_SECONDS
    assert "CRASH" not in result
    if name in HARMLESS:
        assert result == "loaded 0" or "expected a list of the keys of its 0 storages" in result
        return
    _, message = malicious.corpus("canary")[name]
    assert "loaded" not in result
    assert message in result
    if message.startswith("asks for"):
        assert "nothing of it was run" in result
        assert "as safetensors" in result


def test_the_corpus_is_dangerous_to_pickle(tmp_path):
    """Negative control: Python's own unpickler does what they ask for."""
    import pickle

    canary = tmp_path / "canary"
    data, _ = malicious.corpus(str(canary))["os.system"]
    pickle.loads(data)
    assert canary.exists()


def test_the_corpus_is_well_formed_where_it_is_meant_to_be(tmp_path):
    """Negative control: the same tensor with honest numbers is read, from either kind of file."""
    from clip_jax.convert.readers import open_file

    data = malicious._tensor(0, (2, 2), (2, 1))
    for write in (malicious.write_zip, malicious.write_legacy):
        file = open_file(write(Path(tmp_path) / "x.pt", data))
        assert file.read("w").tolist() == [[0, 0], [0, 0]]
