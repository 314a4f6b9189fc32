"""What a GPU is given: the kernels of each family's program, compiled for an H100 where there is none.

`python -m bench.kernels`, with jax's CUDA plugin in the version of jax and no GPU: XLA compiles for the description of
one. It tells how many kernels a call starts, and not how long they take. On a real GPU XLA times the kernels that it
may choose from, and others may be chosen there. The plugin: `pip install --no-deps jax-cuda12-pjrt jax-cuda12-plugin`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies
from tqdm import tqdm

from bench.families import abstract_params
from bench.host import stamp, versions
from clip_jax import FAMILIES, Family, Tokens
from clip_jax.handover import pack, program
from clip_jax.models import Attention
from clip_jax.params.quantize import PLAIN, SCHEMES, Scheme
from clip_jax.params.shapes import flatten, unflatten

_TARGET = "NVIDIA H100 80GB HBM3"
# As XLA tells of one (`xla/backends/gpu/target_config`).
_H100 = f"""
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84929347584
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{_TARGET}"
"""
_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_dump_hlo_as_text": True}

#: Families that are compiled with quantised params too; those have XLA's attention alone.
_QUANTIZED = ("sd15", "sdxl", "flux")

_THUNK = re.compile(r"^(?P<indent> *)\d+: k(?P<kind>\w+)(?: *\[.*?\] (?P<name>\S+))?", re.MULTILINE)


class Kernels(NamedTuple):
    """What a call starts.

    Attributes:
        all: All kernels.
        products: Matrix products among them.
        cudnn: Attentions of cuDNN among them.
        graphs: CUDA graphs ("command buffers"), each started at once.
        outside: Kernels that are in no such graph, and are started one by one.
    """

    all: int
    products: int
    cudnn: int
    graphs: int
    outside: int


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/kernels.json"))
    arguments = parser.parse_args()
    result = {
        **stamp(),
        "target": _TARGET,
        "versions": versions("jax", "jaxlib", "jax-cuda12-pjrt", "flax"),
        "kernels": [_describe(*case) for case in tqdm(list(_cases()), disable=None, desc="Compiling")],
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def h100() -> jax.Device:
    """A device to compile for, and not to run on."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # of libraries that only a GPU needs
    return topologies.get_topology_desc("h100", platform="cuda", target_config=_H100, topology="1x1x1").devices[0]


def compiled(
    family: Family, scheme: Scheme = PLAIN, attention: Attention = "xla", pairs: int = 1
) -> tuple[jax.stages.Compiled, Kernels]:
    """What an encoder of a family runs in bfloat16, full size, compiled for an H100; and what it starts.

    Args:
        family: Its negative prompts are encoded, where it has guidance.
        scheme: Of the params.
        attention: What computes it.
        pairs: Prompts, or pairs of a prompt and its negative.
    """
    device = jax.sharding.SingleDeviceSharding(h100())

    def on_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)

    ids = {t.name: jax.ShapeDtypeStruct((pairs, family.row_length(t, 77)), np.int32) for t in family.towers}
    tokens = Tokens(cond=ids, uncond=ids if family.guidance else None)
    params, tokens = jax.tree.map(on_device, (_params(family, scheme), tokens))
    packed, layout = pack(params)
    with pretended_cudnn():
        run = program(layout, family, np.dtype(jnp.bfloat16), attention, (None, None))
        lowered = run.lower(packed, tokens)
    with tempfile.TemporaryDirectory() as folder:
        executable = lowered.compile(compiler_options={**_OPTIONS, "xla_dump_to": folder})
        (thunks,) = Path(folder).glob("*.thunk_sequence_after_thunk_passes.txt")
        return executable, kernels(thunks.read_text())


def pretended_cudnn() -> contextlib.AbstractContextManager[object]:
    """JAX asks the GPU at hand what its cuDNN can do; in this context it need not have one."""
    return mock.patch.multiple(
        fused_attention_stablehlo,
        check_cudnn_version=lambda: 91000,
        check_compute_capability=lambda _: True,
        is_cuda_compute_capability_equal=lambda _: False,
    )


def kernels(thunks: str) -> Kernels:
    """Counts what XLA's list of thunks has; what belongs to a graph is indented below it."""
    found = list(_THUNK.finditer(thunks))
    graphs = sum(one["kind"] == "CommandBuffer" for one in found)
    started = [one for one in found if one["kind"] != "CommandBuffer"]
    return Kernels(
        all=len(started),
        products=sum((one["name"] or "").startswith("gemm_") or "Gemm" in one["kind"] for one in started),
        cudnn=sum(one["kind"] == "CuDnn" for one in started),
        graphs=graphs,
        outside=sum(not one["indent"] for one in started),
    )


def _cases() -> Iterator[tuple[Family, Scheme, Attention]]:
    for name, family in FAMILIES.items():
        yield family, PLAIN, "xla"
        yield family, PLAIN, "cudnn"
        if name in _QUANTIZED:
            for scheme in SCHEMES.values():
                yield family, scheme, "xla"


def _describe(family: Family, scheme: Scheme, attention: Attention) -> dict[str, Any]:
    executable, found = compiled(family, scheme, attention)
    return {
        "family": family.name,
        "params": scheme.name or "bfloat16",
        "attention": attention,
        **found._asdict(),
        "temporary_mib": round(executable.memory_analysis().temp_size_in_bytes / 2**20, 1),
    }


def _params(family: Family, scheme: Scheme) -> dict[str, Any]:
    """Shapes and dtypes of params in bfloat16, or quantised."""

    def leaf(path: str, shape: jax.ShapeDtypeStruct) -> Any:
        return jax.eval_shape(
            lambda array: scheme.quantize(path, array), jax.ShapeDtypeStruct(shape.shape, jnp.bfloat16)
        )

    towers = abstract_params(family).items()
    return {
        name: unflatten({path: leaf(path, shape) for path, shape in flatten(tree).items()}) for name, tree in towers
    }


if __name__ == "__main__":
    main()
