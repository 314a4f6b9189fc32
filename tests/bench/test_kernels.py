"""What is counted in XLA's lists of thunks."""

from bench.kernels import Kernels, kernels

GRAPH = """\
000: kCommandBuffer [source | sink]
    001: kCustomKernel [source       | next=002 (1)] loop_add_fusion_11 grid: [924, 1, 1] threads: [128, 1, 1]
    002: kCustomKernel [prev=001 (1) | next=003 (1)] gemm_fusion_dot_216 grid: [11520, 1, 1] threads: [64, 1, 1]
    003: kCuDnn        [prev=002 (1) | next=004 (1)] kCuDnn
    004: kGemm         [prev=003 (1) | sink        ] cublas-gemm
"""
ALONE = "005: kCustomKernel [source | sink] gemm_fusion_dot_9 grid: [1, 1, 1] threads: [64, 1, 1]\n"


def test_kernels_of_a_graph():
    assert kernels(GRAPH) == Kernels(all=4, products=2, cudnn=1, graphs=1, outside=0)


def test_kernels_outside_of_graphs():
    assert kernels(GRAPH + ALONE) == Kernels(all=5, products=3, cudnn=1, graphs=1, outside=1)
    assert kernels(ALONE) == Kernels(all=1, products=1, cudnn=0, graphs=0, outside=1)
