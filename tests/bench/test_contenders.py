"""The registry holds together, and environments are told apart."""

import sys
from importlib.util import find_spec

import pytest

from bench.contenders import CONTENDERS, ENVIRONMENTS
from bench.environments import missing, parse_pythons, run_helper, unfit
from bench.presets import COMPAT, LARGE_PRESETS, PRECISIONS, PRESETS, compat_ids
from bench.protocol import WorkerError
from tests.bench.fakes import PYTHONS, contender

ALL = [one for group in CONTENDERS.values() for one in group]


def test_ours_come_first_and_take_part_in_everything():
    for benchmark, presets in (("encode", (*PRESETS, *LARGE_PRESETS)), ("compat", tuple(COMPAT))):
        first = CONTENDERS[benchmark][0]
        assert first.presets == presets
        assert first.platforms == ("cpu", "gpu", "tpu")
        ours = [one.ours for one in CONTENDERS[benchmark]]
        assert ours == sorted(ours, reverse=True)
        assert ours == [one.name.startswith("clip_jax") for one in CONTENDERS[benchmark]]
    assert CONTENDERS["encode"][0].precisions == PRECISIONS


def test_names_are_told_apart():
    assert len({one.name for one in ALL}) == len(ALL)


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_an_entry_names_what_there_is(one):
    modules = [one.worker, *([one.export.module] if one.export else [])]
    assert all(find_spec(module) for module in modules)
    assert one.environment in ENVIRONMENTS
    assert set(one.precisions) <= set(PRECISIONS)
    assert set(one.presets) <= {*PRESETS, *LARGE_PRESETS, *COMPAT}
    assert one.packages


def test_two_peers_do_not_share_a_file_by_mistake():
    files = [(p, one.environment, one.export.arguments) for one in ALL if one.export for p in one.precisions]
    assert len(set(files)) == len(files)


def test_ids_of_compat():
    assert [(name, len(compat_ids(name)), len(compat_ids(name)[0])) for name in COMPAT] == [
        ("clip_l", 1, 77),
        ("t5_large", 1, 256),
    ]


def test_pythons():
    pythons = parse_pythons([f"torch={sys.executable}"])
    assert set(pythons) == set(ENVIRONMENTS)
    assert set(pythons.values()) == {sys.executable}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("torch=no-such-python", "there is no interpreter 'no-such-python'"),
        ("torch", "expected NAME=PATH"),
        ("tensorflow=python", "NAME is one of clip_jax, torch, onnxruntime"),
    ],
)
def test_pythons_that_are_refused(pair, message):
    with pytest.raises(ValueError, match=message):
        parse_pythons([pair])


def test_missing_packages():
    assert missing(sys.executable, ("json", "no_such", "nor_this")) == ("no_such", "nor_this")


def test_unfit():
    assert unfit(contender("one"), PYTHONS, "gpu") is None
    assert unfit(contender("one", platforms=("cpu",)), PYTHONS, "gpu") == "it runs on cpu, and is no match for a gpu"


def test_a_helper_that_fails_shows_its_stderr():
    assert "usage" in run_helper(sys.executable, "json.tool", "--help")
    with pytest.raises(WorkerError, match="(?s)json.tool ended with exit code .*No such file") as raised:
        run_helper(sys.executable, "json.tool", "no-such-file")
    assert "No such file" not in raised.value.brief
