"""Programs of the full size, compiled for an H100 that is only described: what a GPU would be given. Nothing is run.

Wants jax's CUDA plugin, and no GPU (`bench/kernels.py`).
"""

import re

import pytest

from bench.kernels import compiled
from clip_jax import FAMILIES
from clip_jax.params.quantize import SCHEMES

LAYERS = FAMILIES["sd15"].tower("clip_l").config.num_hidden_layers


@pytest.mark.parametrize("attention", ["xla", "cudnn"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_is_one_cuda_graph(name, attention):
    _, kernels = compiled(FAMILIES[name], attention=attention)
    assert (kernels.graphs, kernels.outside) == (1, 0)


def test_many_prompts_are_one_cuda_graph():
    _, kernels = compiled(FAMILIES["sdxl"], attention="cudnn", pairs=4)
    assert (kernels.graphs, kernels.outside) == (1, 0)


def test_query_key_and_value_are_one_product():
    _, kernels = compiled(FAMILIES["sd15"])
    of_a_block = ["q, k and v", "scores", "weighted sum", "out_proj", "fc1", "fc2"]
    assert kernels.products == LAYERS * len(of_a_block)


def test_cudnn_takes_attention_in_one_kernel_that_keeps_the_scores():
    plain, _ = compiled(FAMILIES["flux"])
    fused, kernels = compiled(FAMILIES["flux"], attention="cudnn")
    clip, t5 = (tower.config for tower in FAMILIES["flux"].towers)
    # In the last block of CLIP-L there is one row.
    assert kernels.cudnn == clip.num_hidden_layers - 1 + t5.num_layers
    scores = t5.num_heads * 512**2 * 4  # bytes
    taken = [program.memory_analysis().temp_size_in_bytes for program in (plain, fused)]
    assert taken[0] - taken[1] > scores


def operands(text):
    """The dtypes of both operands of each product in a compiled program."""
    dtypes = {}  # of what was named last: computations reuse names
    for line in text.splitlines():
        if found := re.match(r"\s+(?:ROOT )?(%\S+) = (\w+)\[", line):
            dtypes[found[1]] = found[2]
        if found := re.search(r" dot\((%[\w.-]+), (%[\w.-]+)\)", line):
            yield dtypes[found[1]], dtypes[found[2]]


@pytest.mark.parametrize(("scheme", "dtype"), [("int8", "s8"), ("fp8", "f8e4m3fn")])
def test_products_are_in_what_the_kernels_are_quantised_to(scheme, dtype):
    program, kernels = compiled(FAMILIES["sd15"], SCHEMES[scheme])
    # q, k and v as one, out_proj, fc1 and fc2; those of attention are in bfloat16.
    assert list(operands(program.as_text())).count((dtype, dtype)) == 4 * LAYERS
    assert (kernels.graphs, kernels.outside) == (1, 0)
