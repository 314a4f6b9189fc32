"""What workers on jax have in common."""

from __future__ import annotations

import json
import os
from typing import Any

from bench.host import cores, cpu_model, versions


def start_jax(precision: str, *packages: str) -> dict[str, Any]:
    """Sets jax up for a comparison, and returns what a result tells of it, with the versions of `packages`."""
    # On a GPU, jax would take most of the memory that the peer needs too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # the first call is to compile
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu" and precision != "bfloat16":  # what int8 leaves is float32
        # jax's default is less than float32 on accelerators, torch's is not. No difference on a CPU.
        jax.config.update("jax_default_matmul_precision", "highest")
    return {
        "platform": device.platform,
        "device": _name(device),
        "threads": cores(),
        "versions": versions(*packages, "jax", "jaxlib"),
    }


def device_facts() -> dict[str, str]:
    """What jax runs on here: `platform` and `name`."""
    import jax

    device = jax.devices()[0]
    return {"platform": device.platform, "name": _name(device)}


def _name(device: Any) -> str:
    return cpu_model() if device.platform == "cpu" else device.device_kind


if __name__ == "__main__":
    print(json.dumps(device_facts()))
