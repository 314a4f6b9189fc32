"""Both ways compute the rows of the same captions, which are as long as they are said to be."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from bench import features
from bench.features import captions, contenders, sizes
from clip_jax.compat import FlaxCLIPTextModelWithProjection
from tests.compat.conftest import SMALL_PROJECTED


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(features, "_TEXTS", 9)
    monkeypatch.setattr(features, "BATCH_SIZE", 4)


def test_captions_end_where_they_are_said_to(few):
    ids = captions()
    ends = (ids == ids[:, -1:]).argmax(-1)
    assert (ends + 1).tolist() == sizes()
    assert ids.shape == (9, 77)
    assert len(set(sizes())) > 3
    assert captions().tolist() == ids.tolist()


@pytest.mark.slow
def test_both_ways_compute_the_same(few):
    model = FlaxCLIPTextModelWithProjection(SMALL_PROJECTED)
    both = contenders(model)
    buckets, whole = (np.asarray(both[name](captions())) for name in ("in buckets", "whole"))
    np.testing.assert_allclose(buckets, whole, atol=1e-5)
    assert np.abs(buckets - whole[::-1]).max() > 1e-2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_result_has_what_its_table_wants(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, "_MODELS", {"small": dataclasses.replace(SMALL_PROJECTED, num_hidden_layers=1)})
    monkeypatch.setattr(features, "_ROUNDS", 2)
    monkeypatch.setattr(features, "BATCH_SIZE", 9)  # one program
    noise = iter((0.1, 0.4))
    monkeypatch.setattr(features, "watch_others", lambda: lambda: next(noise))
    monkeypatch.setattr(sys, "argv", ["features", "--out", str(tmp_path / "features.json")])
    features.main()
    result = json.loads((tmp_path / "features.json").read_text())
    whole, half = result["features"]
    assert (whole["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert whole["relative_error"] < 1e-5
    assert half["relative_error"] < 2e-2
    assert len(whole["texts_per_second"]["whole"]["samples"]) == 2
    assert result["sizes"]["texts"] == 9
    warning = capsys.readouterr().err
    assert "took 0.4 cores during small bfloat16" in warning
    assert "float32" not in warning
