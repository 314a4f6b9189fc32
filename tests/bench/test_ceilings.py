"""What is counted; what is timed is only seen to be there."""

import json

import jax.numpy as jnp
import pytest

from bench import ceilings


def test_operations_of_a_pair():
    # Two rows of 77 tokens through the kernels of 12 layers, at two operations each; attention is a few percent more.
    kernels = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert 1 < ceilings.pair_flops("sd15", 1) / (2 * 2 * 77 * kernels) < 1.05


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_products(dtype, monkeypatch):
    monkeypatch.setattr(ceilings, "_SECONDS", 0.01)
    assert ceilings.matmul_gops(8, dtype) > 0


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(ceilings, "_SECONDS", 0.01)
    monkeypatch.setattr(ceilings, "_SIZES", {"cpu": (8, 16)})
    monkeypatch.setattr(ceilings, "_COPY_BYTES", 2**12)
    monkeypatch.setattr(ceilings, "pair_flops", lambda family, pairs: [family, pairs])
    ceilings.main(["sd15:1", "sdxl:8"])
    found = json.loads(capsys.readouterr().out)
    assert set(found["matmul_gops"]) == {"float32", "bfloat16", "int8"}
    assert found["flops"] == {"sd15:1": ["sd15", 1], "sdxl:8": ["sdxl", 8]}
