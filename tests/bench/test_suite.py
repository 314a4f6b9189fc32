"""Cases of contenders that load no model."""

import dataclasses
import json
import re

import numpy as np
import pytest

from bench import interleave, suite, workshop
from bench.contenders import Export
from bench.protocol import WorkerError
from bench.suite import run_cases
from bench.workshop import Case, Workshop
from tests.bench.fakes import PYTHONS, contender

OURS, PEER = contender("ours", ours=True), contender("peer", options={"value": 1.01})
MORE = contender("more of ours", ours=True)
CASE = Case("sd15", "float32")
ONES = np.ones((2, 77, 8), np.float32)


@pytest.fixture
def shop(monkeypatch, tmp_path):
    monkeypatch.setattr(interleave, "PAUSE_S", 0)
    for preset in ("sd15", "sd21"):
        (tmp_path / preset / "weights").mkdir(parents=True)  # they are made, then
    return Workshop(PYTHONS, "cpu", "Some CPU", tmp_path, 3)


def compared(case):
    """Each of ours, and with whom."""
    return {name: set(ratios) for name, ratios in case["ratios"].items()}


def test_two_contenders(shop):
    result = run_cases([OURS, PEER], [CASE, Case("sd21", "float32", 2)], shop)
    json.dumps(result)
    assert list(result["contenders"]) == ["ours", "peer"]
    first, second = result["cases"]
    assert (first["preset"], second["preset"], second["batch"]) == ("sd15", "sd21", 2)
    ours, peer = first["contenders"].values()
    assert [len(row) for row in peer["seen"]["ids"]] == [77, 77]
    assert ours["seen"]["ids"] == peer["seen"]["ids"]
    assert len(second["contenders"]["peer"]["seen"]["ids"]) == 4
    assert ours["seen"]["checkpoint"].endswith("sd15/weights")
    assert ours["error"] == {"relative": 0, "min_cosine": 1}
    assert peer["error"] == {"relative": 0.01, "min_cosine": 1}
    assert len(peer["ms"]["samples"]) == len(peer["after_pause_ms"]["samples"]) == 3
    assert compared(first) == {"ours": {"peer"}}
    assert not result["left_out"]
    assert not first["left_out"]


def test_ours_takes_turns_with_each_peer(shop):
    (case,) = run_cases([OURS, PEER, contender("third")], [CASE], shop)["cases"]
    assert compared(case) == {"ours": {"peer", "third"}}
    assert len(case["contenders"]["ours"]["ms"]["samples"]) == 6
    assert len(case["contenders"]["third"]["ms"]["samples"]) == 3


def test_what_there_is_is_told_after_each_peer(shop):
    told = []
    cases = [CASE, Case("sd21", "float32")]
    result = run_cases([OURS, PEER, contender("third")], cases, shop, lambda found: told.append(json.dumps(found)))
    seen = [[list(case["contenders"]) for case in json.loads(one)["cases"]] for one in told]
    all_three = ["ours", "peer", "third"]
    assert seen[:2] == [[["ours", "peer"]], [all_three]]
    assert [len(one) for one in seen] == [1, 1, 1, 2, 2, 2]
    assert json.loads(told[-1]) == json.loads(json.dumps(result))
    lengths = [len(json.loads(one)["cases"][0]["contenders"]["ours"]["ms"]["samples"]) for one in told[:3]]
    assert lengths == [3, 6, 6]


def test_more_of_ours_take_turns_with_the_first_and_each_peer(shop):
    (case,) = run_cases([OURS, MORE, PEER, contender("third")], [CASE], shop)["cases"]
    assert compared(case) == {
        "ours": {"more of ours", "peer", "third"},
        "more of ours": {"ours", "peer", "third"},
    }
    samples = {name: len(entry["ms"]["samples"]) for name, entry in case["contenders"].items()}
    assert samples == {"ours": 6, "more of ours": 6, "peer": 3, "third": 3}


def test_more_of_ours_are_left_out_where_they_fail(shop):
    failing = dataclasses.replace(MORE, options={"left_out": "no oneDNN"})
    int8 = dataclasses.replace(MORE, name="int8", precisions=("int8",))
    (case,) = run_cases([OURS, failing, int8, PEER], [CASE], shop)["cases"]
    assert case["left_out"] == {"more of ours": "no oneDNN"}
    assert compared(case) == {"ours": {"peer"}}


def test_ours_alone_is_timed_too(shop):
    (case,) = run_cases([OURS], [CASE], shop)["cases"]
    assert len(case["contenders"]["ours"]["ms"]["samples"]) == 3


def test_the_reference_is_ours_in_float32(shop):
    (case,) = run_cases([OURS, PEER], [Case("sd15", "bfloat16")], shop)["cases"]
    assert case["contenders"]["ours"]["seen"]["precision"] == "bfloat16"
    assert case["contenders"]["peer"]["error"]["relative"] == 0.01


def test_larger_batches_are_called_less_often(shop):
    shop = dataclasses.replace(shop, repeats=15)
    assert [shop.calls(Case("sd15", "float32", batch)) for batch in (1, 2, 8)] == [15, 7, 5]
    assert dataclasses.replace(shop, repeats=3).calls(Case("sd15", "float32", 8)) == 3


def test_who_cannot_take_part_in_a_case_is_not_asked(shop):
    peers = [contender("other preset", presets=("sdxl",)), contender("other precision", precisions=("int8",))]
    (case,) = run_cases([OURS, *peers], [CASE], shop)["cases"]
    assert list(case["contenders"]) == ["ours"]
    assert not case["left_out"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"options": {"left_out": "too small"}}, "too small"),
        ({"options": {"calls": 2}}, "The worker of bad ended with exit code 1"),
        ({"worker": "no.such"}, "The worker of bad ended with exit code 1"),
        ({"export": Export("no.such", "file")}, "no.such ended with exit code 1"),
    ],
)
def test_a_peer_that_fails_is_left_out_and_told(shop, fields, reason, capsys):
    (case,) = run_cases([OURS, contender("bad", **fields), PEER], [CASE], shop)["cases"]
    assert case["left_out"] == {"bad": reason}
    assert set(case["contenders"]) == {"ours", "peer"}
    assert compared(case) == {"ours": {"peer"}}
    assert "sd15 float32 x1: bad is left out: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ours", "platform", "reason"),
    [
        ("cpu", "gpu", r"it runs on gpu, clip_jax on cpu: install our extra .*cuda12.*\(--python clip_jax=PATH\)"),
        ("gpu", "cpu", r"it runs on cpu, clip_jax on gpu: name an environment .*\(--python torch=PATH\)"),
    ],
)
def test_a_peer_that_runs_elsewhere_is_left_out_and_told(shop, ours, platform, reason, capsys):
    shop = dataclasses.replace(shop, platform=ours)
    first = dataclasses.replace(OURS, options={"platform": ours})
    bad, good = (contender(name, options={"platform": at}) for name, at in (("bad", platform), ("good", ours)))
    result = run_cases([first, bad, good], [CASE], shop)
    (case,) = result["cases"]
    assert list(case["left_out"]) == ["bad"]
    assert re.match(reason, case["left_out"]["bad"])
    assert compared(case) == {"ours": {"good"}}
    assert result["contenders"]["good"]["platform"] == ours
    assert re.search(f"bad is left out: {reason}", capsys.readouterr().err)


def test_outputs_of_another_shape_are_not_compared(shop, monkeypatch):
    monkeypatch.setattr(suite, "_reference", lambda *_: {"pooled_prompt_embeds": ONES})
    (case,) = run_cases([OURS], [CASE], shop)["cases"]
    assert case["left_out"]["ours"].startswith("It returns {'prompt_embeds': (2, 77, 8)}; expected {'pooled")
    assert not case["contenders"]


def test_where_ours_is_left_out_peers_are_timed_without_ratio(shop, monkeypatch):
    monkeypatch.setattr(suite, "_reference", lambda *_: {"prompt_embeds": ONES})
    (case,) = run_cases([contender("ours", ours=True, options={"left_out": "not yet"}), PEER], [CASE], shop)["cases"]
    assert case["left_out"] == {"ours": "not yet"}
    assert list(case["contenders"]) == ["peer"]
    assert case["ratios"] == {}


def test_that_ours_dies_ends_the_run(shop):
    with pytest.raises(WorkerError, match="ours died beside peer"):
        run_cases([contender("ours", ours=True, options={"calls": 3}), PEER], [CASE], shop)


def test_missing_packages_leave_a_peer_out_of_everything(shop, capsys):
    bad = contender("bad", packages=("json", "no_such_package"))
    result = run_cases([OURS, bad], [CASE], shop)
    assert result["left_out"] == {"bad": "no_such_package not installed (--python torch=PATH)"}
    assert "bad is left out: no_such_package" in capsys.readouterr().err
    with pytest.raises(WorkerError, match="bad cannot run: no_such_package"):
        run_cases([bad], [CASE], shop)


def test_files_are_made_once_and_appear_when_they_are_whole(shop, monkeypatch):
    made = []

    def helper(python, module, *arguments):
        made.append((module, *arguments[1:3], *arguments[4:]))
        arguments[3].write_text("model")

    monkeypatch.setattr(workshop, "run_helper", helper)
    one = contender("one", export=Export("export", "model.onnx", ("dynamic",)))
    for precision in ("float32", "bfloat16", "int8", "int8"):
        request = shop.request(one, Case("sd15", precision))
        assert request["file"].endswith(f"{'int8' if precision == 'int8' else 'float32'}-2-dynamic/model.onnx")
    assert made == [("export", 2, "float32", "dynamic"), ("export", 2, "int8", "dynamic")]
    assert not list(shop.scratch.rglob("*.part"))
