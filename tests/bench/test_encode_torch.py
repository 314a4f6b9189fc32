"""What torch's first call is made of; torch itself is replaced."""

import sys
import types

import pytest

from bench.workers import encode_torch


@pytest.fixture
def calls(monkeypatch):
    """What has been run, in order; models and programs take any ids."""
    seen = []

    class Towers:
        towers = (types.SimpleNamespace(config=types.SimpleNamespace(_attn_implementation="sdpa")),)

        def __init__(self, folder, dtype): ...

        def to(self, device):
            return self

        def __call__(self, *ids):
            seen.append(f"eager, {len(ids)}")

    torch = types.SimpleNamespace(
        cuda=types.SimpleNamespace(is_available=lambda: False),
        device=str,
        float32="float32",
        tensor=lambda ids, device: ids,
        compile=lambda model, mode, **_: lambda *ids: seen.append(f"{mode}, {len(ids)}"),
        inference_mode=lambda: lambda function: function,
        get_num_threads=lambda: 1,
    )
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # which a start sets
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "bench.workers.towers", types.SimpleNamespace(Towers=Towers))
    monkeypatch.setattr(encode_torch, "versions", lambda *_: {})
    return seen


@pytest.mark.parametrize(
    ("modes", "t5_ids", "expected"),
    [
        ({"cpu": "default", "gpu": "reduce-overhead"}, None, ["eager, 1", "default, 1", "default, 1"]),
        ({"cpu": "default"}, [[2]], ["eager, 2", "default, 2", "default, 2"]),
        ({"gpu": "max-autotune"}, None, ["eager, 1", "eager, 1"]),
    ],
)
def test_what_compiling_needs_is_a_part_of_the_first_call(calls, modes, t5_ids, expected):
    case = {
        "preset": "sd15",
        "precision": "float32",
        "checkpoint": "folder",
        "ids": [[1]],
        "t5_ids": t5_ids,
        "options": {"modes": modes},
    }
    model = encode_torch.start(case)
    assert calls == []
    model.call()
    model.call()
    assert calls == expected
    assert model.facts["about"]["platform"] == "cpu"


@pytest.mark.parametrize(("modes", "told"), [({"gpu": "reduce-overhead"}, {"cudagraph_skips": 3}), ({}, {})])
def test_what_is_left_out_of_cuda_graphs_is_told(calls, monkeypatch, modes, told):
    cuda = {"is_available": lambda: True, "get_device_name": lambda: "GPU", "synchronize": lambda: None}
    monkeypatch.setattr(sys.modules["torch"], "cuda", types.SimpleNamespace(**cuda))
    counters = types.SimpleNamespace(counters={"inductor": {"cudagraph_skips": 3}})
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", counters)
    case = {"preset": "sd15", "precision": "float32", "checkpoint": "folder", "ids": [[1]], "t5_ids": None}
    model = encode_torch.start({**case, "options": {"modes": modes}})
    model.call()
    outputs = types.SimpleNamespace(float=lambda: outputs, cpu=lambda: outputs, numpy=lambda: "array")
    assert model.arrays([outputs]) == {"prompt_embeds": "array"}
    about = model.facts["about"]
    assert {name: about[name] for name in about if name == "cudagraph_skips"} == told
