"""Peak memory of converting and loading FLUX's text encoders at full size: `python -m bench.memory`.

Writes random bfloat16 weights as a diffusers folder (CLIP-L and T5-XXL, 9.8 GB), converts it, loads what came out,
each in a process of its own, and deletes everything. Needs 25 GB of disk and 16 GB of memory, on Linux.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.host import host_facts, stamp

_MIB = 2**20
_STEPS = ("convert", "load")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/memory.json"))
    parser.add_argument("--scratch", type=Path, help="where to put 25 GB (default: the temporary folder)")
    parser.add_argument("--step", choices=_STEPS, help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(_measured(arguments.step, *arguments.paths)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        source, converted = Path(folder) / "flux", Path(folder) / "converted"
        parameters = _write_flux(source)
        peaks = {step: _run(step, source, converted) for step in _STEPS}
    result = {
        **stamp(),
        "host": host_facts(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint", "numpy")},
        "model": {"family": "flux", "dtype": "bfloat16", "parameters": parameters, "mib": 2 * parameters / _MIB},
        "peaks": peaks,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(peaks, indent=2))


def _run(step: str, *paths: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.memory", "--step", step, *map(str, paths)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measured(step: str, source: Path, converted: Path) -> dict[str, float]:
    """Runs a step and samples the memory that is this process's own: neither files' pages nor shared ones."""
    import jax

    import clip_jax
    from clip_jax.convert import convert

    jax.devices()
    before = anonymous_mib()
    after: dict[str, float] = {}

    def run() -> None:
        if step == "convert":
            convert(source, converted)
        else:
            encoder = clip_jax.load(converted, dtype="bfloat16")
            after["params_mib"] = sum(leaf.nbytes for leaf in jax.tree.leaves(encoder.params)) / _MIB

    return {"before_mib": before, "peak_mib": peak_while(run), **after}


def peak_while(run: Callable[[], object]) -> float:
    """The most anonymous memory that this process has while `run` runs, in MiB."""
    peak = anonymous_mib()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous_mib())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        run()
    finally:
        done.set()
        sampler.join()
    return peak


def anonymous_mib() -> float:
    """The memory of this process that is neither files' pages nor shared, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this kernel does not tell RssAnon")


def _write_flux(folder: Path) -> int:
    """Writes the text side of a FLUX pipeline; returns its number of parameters."""
    from clip_jax import FAMILIES
    from clip_jax.loading import load_tokenizers
    from clip_jax.params.shapes import param_shapes

    family = FAMILIES["flux"]
    tokenizers = load_tokenizers("random:flux")
    index: dict[str, Any] = {"_class_name": "FluxPipeline"}
    count = 0
    for tower in family.towers:
        index[tower.folder] = ["transformers", tower.config.to_hf()["architectures"][0]]
        tokenizers[tower.name].save(folder / tower.tokenizer_folder)
        (folder / tower.folder).mkdir(parents=True)
        (folder / tower.folder / "config.json").write_text(json.dumps(tower.config.to_hf()))
        shapes = dict(hf_shapes(param_shapes(tower.config)))
        count += _write_safetensors(folder / tower.folder / "model.safetensors", shapes)
    (folder / "model_index.json").write_text(json.dumps(index))
    return count


def hf_shapes(shapes: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of torch for those of Flax."""
    for path, shape in shapes.items():
        module, _, leaf = path.rpartition("/")
        name = f"{module.replace('/', '.')}.{'bias' if leaf == 'bias' else 'weight'}"
        yield name, shape[::-1] if leaf == "kernel" else shape


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """Streams random bfloat16 tensors into a file; the same few million values again and again will do."""
    import math

    import ml_dtypes
    import numpy as np

    values = (np.random.default_rng(0).standard_normal(2**23, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = math.prod(shape)
            while left:
                file.write(values[:left].tobytes())
                left -= min(left, values.size)
    return end // 2


if __name__ == "__main__":
    main()
