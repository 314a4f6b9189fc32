"""Peak memory of converting each format at full size: `python -m bench.formats`.

Writes random weights in the real file formats, one after the other, converts each in a process of its own, and deletes
them. Memory is that of the process alone: neither files' pages nor shared ones. Needs Linux, 25 GB of disk, 16 GB of
memory, and torch and gguf to write their files with.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from tqdm import tqdm

from bench.host import host_facts, stamp
from bench.memory import anonymous_mib, hf_shapes, peak_while

_MIB = 2**20


class Case(NamedTuple):
    """A format, and a model in it.

    Attributes:
        write: Writes it into a folder; returns the paths to convert.
        family: What it is.
    """

    write: Callable[[Path], list[Path]]
    family: str


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.formats", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/formats.json"))
    parser.add_argument("--scratch", type=Path, help="where to put 25 GB (default: the temporary folder)")
    parser.add_argument("--only", choices=CASES, help="one case, printed and not written")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        family, out, *sources = arguments.step
        print(json.dumps(_measured(family, Path(out), [Path(source) for source in sources])))
        return
    names = [arguments.only] if arguments.only else list(CASES)
    formats = {name: _run(CASES[name], arguments.scratch) for name in tqdm(names, disable=None, desc="Converting")}
    print(json.dumps(formats, indent=2))
    if arguments.only:
        return
    result = {
        **stamp(),
        "host": host_facts(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint", "numpy", "torch", "gguf")},
        "formats": formats,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def _run(case: Case, scratch: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        sources = case.write(Path(folder))
        files = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / _MIB
        command = [sys.executable, "-m", "bench.formats", "--step", case.family, str(Path(folder) / "out")]
        done = subprocess.run([*command, *map(str, sources)], check=True, stdout=subprocess.PIPE, text=True)
    return {"family": case.family, "files_mib": files, **json.loads(done.stdout.splitlines()[-1])}


def _measured(family: str, out: Path, sources: list[Path]) -> dict[str, float]:
    import jax

    import clip_jax
    from clip_jax.convert import convert

    jax.devices()
    before = anonymous_mib()
    peak = peak_while(lambda: convert(sources, out, family=family, progress=False))
    towers = clip_jax.info(out).towers.values()
    return {"before_mib": before, "peak_mib": peak, "params_mib": sum(tower.nbytes for tower in towers) / _MIB}


# --- weights


def _values(dtype: Any) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(2**20, np.float32) * 0.02).astype(dtype)


def _array(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Random enough: the same million values again and again."""
    return np.resize(_values(dtype), shape)


def _shapes(family: str, tower: str) -> dict[str, tuple[int, ...]]:
    """Transformers' names and shapes of a tower."""
    from clip_jax import FAMILIES
    from clip_jax.params.shapes import param_shapes

    return dict(hf_shapes(param_shapes(FAMILIES[family].tower(tower).config)))


def _hf(family: str, tower: str, prefix: str = "", dtype: Any = np.float16) -> dict[str, np.ndarray]:
    return {f"{prefix}{name}": _array(shape, dtype) for name, shape in _shapes(family, tower).items()}


def _open_clip(family: str, tower: str, prefix: str = "") -> dict[str, np.ndarray]:
    """The same under OpenCLIP's names."""
    state: dict[str, np.ndarray] = {}
    for name, shape in _shapes(family, tower).items():
        parts = name.removeprefix("text_model.").split(".")
        if name == "text_projection.weight":
            state["text_projection"] = _array(shape, np.float16)
        elif parts[0] == "embeddings":
            token = parts[1] == "token_embedding"
            state["token_embedding.weight" if token else "positional_embedding"] = _array(shape, np.float16)
        elif parts[0] == "final_layer_norm":
            state[f"ln_final.{parts[1]}"] = _array(shape, np.float16)
        elif parts[3] == "self_attn" and parts[4] != "out_proj":
            key = f"transformer.resblocks.{parts[2]}.attn.in_proj_{parts[5]}"
            state[key] = _array((3 * shape[0], *shape[1:]), np.float16)
        else:
            names = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
            names |= {"layer_norm1": "ln_1", "layer_norm2": "ln_2"}
            state[f"transformer.resblocks.{parts[2]}.{names['.'.join(parts[3:-1])]}.{parts[-1]}"] = _array(
                shape, np.float16
            )
    return {f"{prefix}{name}": array for name, array in state.items()}


def _sdxl() -> dict[str, np.ndarray]:
    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    return {**_hf("sdxl", "clip_l", first), **_open_clip("sdxl", "clip_g", second)}


# --- files


def _torch(state: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array) for name, array in state.items()}


def _safetensors_file(path: Path, state: dict[str, np.ndarray]) -> list[Path]:
    from safetensors.numpy import save_file

    save_file(state, path)
    return [path]


def _torch_file(path: Path, state: dict[str, np.ndarray], *, as_zip: bool) -> list[Path]:
    import torch

    torch.save({"state_dict": _torch(state)}, path, _use_new_zipfile_serialization=as_zip)
    return [path]


def _torchscript_file(path: Path) -> list[Path]:
    """Nested modules with bare parameters, as OpenAI's archive has them."""
    import torch

    root = torch.nn.Module()
    for name, tensor in _torch(_open_clip("sd15", "clip_l")).items():
        *modules, leaf = name.split(".")
        module = root
        for part in modules:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
    torch.jit.save(torch.jit.script(root), str(path))
    return [path]


def _msgpack_file(path: Path) -> list[Path]:
    import flax.serialization

    from clip_jax import FAMILIES
    from clip_jax.params.shapes import param_shapes, unflatten

    shapes = param_shapes(FAMILIES["sdxl_refiner"].tower("clip_g").config)
    tree = unflatten({name: _array(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()})
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    return [path]


def _shards(folder: Path) -> list[Path]:
    state = list(_hf("sdxl_refiner", "clip_g").items())
    weight_map = {}
    for shard in range(4):
        name = f"model-{shard + 1:05}-of-00004.safetensors"
        part = dict(state[shard::4])
        _safetensors_file(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [folder / "model.safetensors.index.json"]


def _with_clip_l(folder: Path, t5: Path) -> list[Path]:
    """FLUX's other text encoder, and a tokenizer for T5, beside T5."""
    from clip_jax.tokenizers.stand_in import stand_in_t5_tokenizer

    stand_in_t5_tokenizer().save(folder)
    return [*_safetensors_file(folder / "clip_l.safetensors", _hf("flux", "clip_l")), t5]


def _fp8_scaled(folder: Path) -> list[Path]:
    """ComfyUI's scaled fp8: matrices of blocks in 8 bits with a scale each, the rest in 16."""
    state: dict[str, np.ndarray] = {"scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn)}
    for name, shape in _shapes("flux", "t5").items():
        scaled = len(shape) == 2 and ".block." in name and "relative_attention_bias" not in name
        state[name] = _array(shape, ml_dtypes.float8_e4m3fn if scaled else np.float16)
        if scaled:
            state[name.removesuffix("weight") + "scale_weight"] = np.array(0.01, np.float32)
    (path,) = _safetensors_file(folder / "t5xxl.safetensors", state)
    return _with_clip_l(folder, path)


def _gguf(folder: Path, kind: str) -> list[Path]:
    """T5 as llama.cpp names it, with blocks of random bits and small scales."""
    import gguf

    quantisation = gguf.GGMLQuantizationType[kind]
    values, nbytes = gguf.GGML_QUANT_SIZES[quantisation]
    scales = np.full(2 if kind == "Q4_K" else 1, 0.001, np.float16).tobytes()
    block = np.frombuffer(scales + np.random.default_rng(0).bytes(nbytes - len(scales)), np.uint8)
    writer = gguf.GGUFWriter(folder / "t5.gguf", "t5encoder")
    for name, shape in _gguf_shapes():
        if len(shape) == 2 and "rel_b" not in name:
            data = np.broadcast_to(np.tile(block, shape[1] // values), (shape[0], shape[1] // values * nbytes))
            writer.add_tensor(name, data, raw_dtype=quantisation)
        else:
            writer.add_tensor(name, _array(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _with_clip_l(folder, folder / "t5.gguf")


def _gguf_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    names = {
        "SelfAttention.relative_attention_bias": "attn_rel_b",
        "0.layer_norm": "attn_norm",
        "1.layer_norm": "ffn_norm",
    }
    names |= {f"SelfAttention.{part}": f"attn_{part}" for part in "qkvo"}
    names |= {"DenseReluDense.wi_0": "ffn_gate", "DenseReluDense.wi_1": "ffn_up", "DenseReluDense.wo": "ffn_down"}
    for name, shape in _shapes("flux", "t5").items():
        outside = {"shared.weight": "token_embd.weight", "encoder.final_layer_norm.weight": "enc.output_norm.weight"}
        if name in outside:
            yield outside[name], shape
            continue
        block = name.split(".")[2]
        (short,) = (short for long, short in names.items() if f"{long}.weight" in name)
        yield f"enc.blk.{block}.{short}.weight", shape


CASES = {
    "SDXL, single file of safetensors": Case(lambda f: _safetensors_file(f / "x.safetensors", _sdxl()), "sdxl"),
    "SDXL, .ckpt of torch": Case(lambda f: _torch_file(f / "x.ckpt", _sdxl(), as_zip=True), "sdxl"),
    "SDXL, .ckpt of torch before 1.6": Case(lambda f: _torch_file(f / "x.ckpt", _sdxl(), as_zip=False), "sdxl"),
    "CLIP-L, TorchScript archive": Case(lambda f: _torchscript_file(f / "x.pt"), "sd15"),
    "bigG, OpenCLIP names, .bin": Case(
        lambda f: _torch_file(f / "x.bin", _open_clip("sdxl_refiner", "clip_g"), as_zip=True), "sdxl_refiner"
    ),
    "bigG, four shards of safetensors": Case(_shards, "sdxl_refiner"),
    "bigG, Flax msgpack": Case(lambda f: _msgpack_file(f / "x.msgpack"), "sdxl_refiner"),
    "FLUX, T5 in scaled fp8": Case(_fp8_scaled, "flux"),
    "FLUX, T5 in GGUF Q8_0": Case(lambda f: _gguf(f, "Q8_0"), "flux"),
    "FLUX, T5 in GGUF Q4_K": Case(lambda f: _gguf(f, "Q4_K"), "flux"),
}

if __name__ == "__main__":
    main()
