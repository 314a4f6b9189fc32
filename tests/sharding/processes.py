"""Run by `test_sharding.py`, twice at once: two processes with two devices each share a mesh; each prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import clip_jax
from clip_jax.errors import CheckpointError
from clip_jax.params import checkpoint as ckpt
from clip_jax.params.shard import param_shardings, placed_by
from tests.sharding.small import PROMPTS, bytes_by_device, encode, largest_error, same_parts

jax.config.update("jax_default_matmul_precision", "float32")
jax.config.update("jax_cpu_collectives_implementation", "gloo")


def main(sources: Path, process: int, port: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    # Every pair of devices that splits a parameter is in both processes.
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2).T, ("data", "tensor"))
    reference = dict(np.load(sources / "flux.npz"))
    whole = clip_jax.load(sources / "flux")
    results: dict[str, Any] = {"devices": [jax.device_count(), jax.local_device_count()]}
    for source in ("flux", "flux orbax"):
        encoder = clip_jax.load(sources / source, mesh=mesh)
        results[source] = {
            "error": largest_error(encode(encoder, PROMPTS), reference),
            "same params": same_parts(encoder.params, whole.params),
            "bytes": bytes_by_device(encoder.params),
        }
    results["read"] = bytes_read(sources / "flux orbax", mesh)
    one = {name: array[:1] for name, array in reference.items()}
    results["one prompt"] = largest_error(encode(encoder, PROMPTS[:1]), one)
    try:
        encoder.save(sources / "never")
    except CheckpointError as error:
        results["save"] = str(error)
    print(json.dumps(results))


def bytes_read(path: Path, mesh: jax.sharding.Mesh) -> int | None:
    """What this process reads of files while it loads its parts; None where the kernel does not tell."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        return None
    configs = ckpt.read_metadata(path).configs
    specs, placement = ckpt.read_specs(path, configs), placed_by(param_shardings(configs, mesh))
    before = _counted(counters)
    ckpt.read_params(path, specs, None, placement=placement)
    return _counted(counters) - before


def _counted(counters: Path) -> int:
    return int(counters.read_text().split("rchar:")[1].split()[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
