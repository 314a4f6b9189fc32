"""What the profile makes of a program and of its operations; and one of a small encoder, as it is run."""

import json
import sys

import pytest

from bench import profile
from bench.profile import BETWEEN, KINDS, Span, compiled, kinds, middle, profiled, shares

SCOPE = "jit(f)/vmap(ClipTextModel)/text_model/encoder/layers/jit(core_fn)/0"
PROGRAM = f"""\
ENTRY %main (p: f32[77,64]) -> f32[77,64] {{
  %p = f32[77,64]{{1,0}} parameter(0)
  %gather = f32[77,64]{{1,0}} fusion(%p), metadata={{op_name="jit(f)/vmap(ClipTextModel)/embeddings/add"}}
  %norm = f32[77,64]{{1,0}} fusion(%gather), metadata={{op_name="{SCOPE}/layer_norm1/reduce_sum" stack_frame_id=3}}
  %scale.1 = f32[77,64]{{1,0}} fusion(%norm), metadata={{op_name="{SCOPE}/self_attn/q_proj/div"}}
  %dot.2 = f32[77,64]{{1,0}} fusion(%scale.1), metadata={{op_name="{SCOPE}/self_attn/q_proj/dot_general"}}
  %heads = f32[77,64]{{1,0}} fusion(%dot.2), metadata={{op_name="{SCOPE}/self_attn/transpose"}}
  %scores = f32[77,77]{{1,0}} fusion(%heads), backend_config={{"op_name":"none"}}
  %gelu = f32[77,64]{{1,0}} fusion(%scores), metadata={{op_name="{SCOPE}/mlp/mul"}}
  %wi = f32[77,64]{{1,0}} fusion(%gelu), metadata={{op_name="jit(f)/T5/0/layer/1/DenseReluDense/wi_0/dot_general"}}
  %t5 = f32[77,64]{{1,0}} fusion(%wi), metadata={{op_name="jit(f)/T5Encoder/0/layer/0/SelfAttention/reduce_max"}}
  %fc2 = f32[77,64]{{1,0}} custom-call(%t5), custom_call_target="__onednn$matmul", metadata={{op_name="{SCOPE}/add"}}
  %gemm_fusion.4 = f32[77,64]{{1,0}} fusion(%fc2), metadata={{op_name="{SCOPE}/self_attn/out_proj/add"}}
  %norm2 = f32[77,64]{{1,0}} fusion(%gemm_fusion.4), metadata={{op_name="{SCOPE}/layer_norm2/reduce_sum"}}
  %sums = f32[77,64]{{1,0}} custom-call(%heads), custom_call_target="__onednn$matmul"
  ROOT %o = f32[77,64]{{1,0}} custom-call(%t5), metadata={{op_name="jit(f)/T5/0/layer/0/SelfAttention/o/dot_general"}}
}}
"""


def test_operations_are_told_by_the_module_that_they_come_from():
    assert kinds(PROGRAM) == {
        "p": "the rest",
        "gather": "the rest",
        "norm": "norms",
        "scale.1": "around products",
        "dot.2": "products",
        "heads": "attention",
        "scores": "attention",
        "gelu": "activations",
        "wi": "products",
        "t5": "attention",
        "fc2": "products",
        "gemm_fusion.4": "products",
        "norm2": "norms",
        "sums": "attention",
        "o": "products",
    }


def test_time_is_divided_among_what_runs():
    call = Span(100, 200, "one call")
    operations = [
        Span(110, 150, "dot"),
        Span(140, 150, "norm"),  # beside it
        Span(160, 170, "custom-call.1.clone__onednn$matmul"),
        Span(180, 230, "unheard of"),  # and longer than the call
    ]
    names = {"dot": "products", "norm": "norms", "custom-call.1.clone": "products"}
    assert shares(call, operations, names) == {
        "products": 30 + 5 + 10,
        "around products": 0,
        "attention": 0,
        "norms": 5,
        "activations": 0,
        "the rest": 20,
        BETWEEN: 10 + 10 + 10,
    }


def test_slow_and_fast_calls_are_left_out():
    calls = [{"products": time, BETWEEN: 1.0} for time in (900.0, 2.0, 4.0, 0.0)]
    assert middle(calls) == {"products": 3.0, BETWEEN: 1.0}


def test_other_platforms_are_refused(monkeypatch):
    monkeypatch.setattr(profile, "device_facts", lambda: {"platform": "tpu", "name": "TPU v4"})
    with pytest.raises(SystemExit, match="is for cpu and gpu, found tpu"):
        profile.main([])


def test_what_one_program_cannot_do_loses_nothing_of_the_others(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(profile, "device_facts", lambda: {"platform": "gpu", "name": "Abacus"})
    monkeypatch.setattr(profile, "_measure", lambda preset, name, _: measured[name]())
    case = {"preset": "sd15", "program": "bfloat16", "other_cores": 0.0}

    def no_cudnn():
        raise RuntimeError("no cuDNN here\nand much more")

    measured = {"bfloat16": lambda: case, "bfloat16, cuDNN": no_cudnn, "int8": lambda: case}
    profile.main(["--programs", *measured, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "profile-abacus.json").read_text())
    assert result["profile"] == [case, case]
    assert result["left_out"] == {"sd15 bfloat16, cuDNN": "no cuDNN here"}
    assert "sd15 bfloat16, cuDNN is left out: no cuDNN here" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="names of operations are those of Linux' CPUs")
def test_a_small_encoder_is_profiled(encoder, monkeypatch):
    monkeypatch.setattr(profile, "_CALLS", 3)
    tokens = encoder.tokenize("a cat", negative_prompt="blurry")
    run, text = compiled(encoder, tokens, frozen=False)
    run()
    calls = profiled(run)
    assert len(calls) == 3
    found = shares(*calls[0], kinds(text))
    assert sum(found.values()) == pytest.approx(calls[0][0].end - calls[0][0].begin)
    assert all(found[kind] > 0 for kind in KINDS if kind != "around products")
