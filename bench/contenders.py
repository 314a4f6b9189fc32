"""Who is timed, as frozen data: a new peer is an entry here, and a module in `bench/workers/`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from bench.presets import COMPAT, LARGE_PRESETS, PRESETS


class Export(NamedTuple):
    """The file that a contender reads, and who writes it.

    Attributes:
        module: Run as `python -m MODULE CHECKPOINT ROWS PRECISION FILE ARGUMENTS`, in the contender's environment.
        name: Of the file; others may be written beside it.
        arguments: More of them.
    """

    module: str
    name: str
    arguments: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Contender:
    """One contender.

    Attributes:
        name: As in the results.
        worker: The module of its worker.
        environment: Name of the Python environment that runs it (`--python NAME=PATH`).
        packages: What that has to have, by the names they are imported under.
        presets: What it can encode.
        precisions: In which precisions.
        platforms: Of jax, on whose machines it is worth a comparison.
        ours: Whether it is ours: one such, and any more that can, take turns with each peer.
        options: For its worker.
        export: What is made for it from the shared checkpoint; None reads that itself.
    """

    name: str
    worker: str
    environment: str
    packages: tuple[str, ...]
    presets: tuple[str, ...] = PRESETS
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    ours: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    export: Export | None = None


_CLIP_JAX: Mapping[str, Any] = {
    "environment": "clip_jax",
    "packages": ("clip_jax", "jax", "flax"),
    "ours": True,
}
_ALL = (*PRESETS, *LARGE_PRESETS)
_TORCH = ("torch", "transformers")
_OPENVINO = {
    "worker": "bench.workers.encode_openvino",
    "environment": "openvino",
    "packages": ("openvino", "nncf", *_TORCH),
    "platforms": ("cpu",),
}
_COMPAT = {"presets": tuple(COMPAT), "precisions": ("float32",)}
_FLAX4 = {
    "worker": "bench.workers.compat_flax4",
    "environment": "flax4",
    "packages": ("transformers", "jax", "flax"),
    **_COMPAT,
}
_TORCHAX = {
    "worker": "bench.workers.compat_torchax",
    "environment": "torchax",
    "packages": ("torchax", *_TORCH),
    **_COMPAT,
}

#: Benchmark -> its contenders; the first is ours.
CONTENDERS: dict[str, tuple[Contender, ...]] = {
    "encode": (
        Contender(
            name="clip_jax",
            worker="bench.workers.encode_clip_jax",
            presets=_ALL,
            precisions=("float32", "bfloat16", "int8"),
            options={"freeze": False, "attention": "xla"},
            **_CLIP_JAX,
        ),
        Contender(
            name="clip_jax, cuDNN",
            worker="bench.workers.encode_clip_jax",
            presets=_ALL,
            precisions=("bfloat16",),
            platforms=("gpu",),
            options={"freeze": False, "attention": "cudnn"},
            **_CLIP_JAX,
        ),
        Contender(
            name="clip_jax, frozen",
            worker="bench.workers.encode_clip_jax",
            platforms=("cpu",),
            options={"freeze": True, "attention": "xla"},
            **_CLIP_JAX,
        ),
        Contender(
            name="torch eager",
            worker="bench.workers.encode_torch",
            environment="torch",
            packages=_TORCH,
            presets=_ALL,
            options={"modes": {}},
        ),
        Contender(
            name="torch compiled",
            worker="bench.workers.encode_torch",
            environment="torch",
            packages=_TORCH,
            presets=_ALL,
            options={"modes": {"cpu": "default", "gpu": "reduce-overhead"}},
        ),
        Contender(
            name="torch autotuned",
            worker="bench.workers.encode_torch",
            environment="torch",
            packages=_TORCH,
            presets=_ALL,
            platforms=("gpu",),
            options={"modes": {"gpu": "max-autotune"}},
        ),
        Contender(
            name="onnxruntime",
            worker="bench.workers.encode_onnxruntime",
            environment="onnxruntime",
            packages=("onnxruntime", "onnx", "onnxscript", *_TORCH),
            precisions=("float32", "int8"),
            platforms=("cpu",),
            export=Export("bench.workers.export_onnx", "model.onnx"),
        ),
        Contender(
            name="OpenVINO",
            precisions=("float32", "bfloat16"),
            export=Export("bench.workers.export_openvino", "model.xml"),
            **_OPENVINO,
        ),
        Contender(
            name="OpenVINO, calibrated",
            precisions=("int8",),
            export=Export("bench.workers.export_openvino", "model.xml", ("calibrated",)),
            **_OPENVINO,
        ),
        Contender(
            name="OpenVINO, dynamic",
            precisions=("int8",),
            export=Export("bench.workers.export_openvino", "model.xml", ("dynamic",)),
            **_OPENVINO,
        ),
    ),
    "compat": (
        Contender(
            name="clip_jax.compat",
            worker="bench.workers.compat_clip_jax",
            **_CLIP_JAX,
            **_COMPAT,
        ),
        Contender(name="transformers 4 Flax", options={"jitted": False}, **_FLAX4),
        Contender(name="transformers 4 Flax, jitted", options={"jitted": True}, **_FLAX4),
        Contender(name="torchax", options={"jitted": False}, **_TORCHAX),
        Contender(name="torchax, jitted", options={"jitted": True}, **_TORCHAX),
    ),
}

#: Names of the environments, for `--python`.
ENVIRONMENTS = tuple(dict.fromkeys(one.environment for group in CONTENDERS.values() for one in group))
