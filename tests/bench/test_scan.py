"""The scan computes what the models compute, so that their times are of the same work."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import scan
from bench.scan import programs, stacked


def test_both_ways_compute_the_same(encoder):
    config, params = encoder.config["clip_l"], encoder.params["clip_l"]
    ids = jnp.asarray(encoder.tokenize("a cat", negative_prompt="blurry").cond["clip_l"])
    found = programs(config, "float32")
    unrolled = jax.jit(found["unrolled"])(params, ids)
    np.testing.assert_allclose(jax.jit(found["scan"])(stacked(params), ids), unrolled, atol=1e-5)
    other = jax.tree.map(lambda leaf: leaf[::-1], stacked(params)["text_model"]["encoder"])
    params = {**params, "text_model": {**params["text_model"], "encoder": other}}
    assert np.abs(jax.jit(found["scan"])(params, ids) - unrolled).max() > 1e-2  # blocks in another order


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_each_case_tells_how_many_cores_others_took(encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scan.clip_jax, "load", lambda *_, **__: encoder)
    monkeypatch.setattr(scan, "_TOWERS", {"sd15": "clip_l"})
    monkeypatch.setattr(scan, "_DTYPES", ("float32", "bfloat16"))
    monkeypatch.setattr(scan, "_ROUNDS", 2)
    noise = iter((0.1, 0.4))
    monkeypatch.setattr(scan, "watch_others", lambda: lambda: next(noise))
    monkeypatch.setattr(sys, "argv", ["scan", "--out", str(tmp_path / "scan.json")])
    scan.main()
    cases = json.loads((tmp_path / "scan.json").read_text())["scan"]
    assert [case["other_cores"] for case in cases] == [0.1, 0.4]
    warning = capsys.readouterr().err
    assert "Not quiet: other processes took 0.4 cores during sd15 bfloat16." in warning
    assert "float32" not in warning
