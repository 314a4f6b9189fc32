"""Run by `test_sharding.py` with eight simulated devices: loads, encodes and measures; prints JSON."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import clip_jax
import clip_jax.encoder
from clip_jax.compat import FlaxCLIPTextModel, FlaxT5EncoderModel, T5TextEncoder
from clip_jax.convert.foreign import ForeignCheckpoint, open_foreign
from clip_jax.convert.tower import ForeignTower
from clip_jax.params import checkpoint as ckpt
from clip_jax.params.quantize import SCHEMES
from clip_jax.params.shapes import flatten, unflatten
from clip_jax.params.shard import Index, param_shardings, placed_by, sharded_array
from tests.sharding.small import (
    CLIP,
    PROMPTS,
    T5,
    bytes_by_device,
    collectives,
    device_bytes,
    encode,
    largest_error,
    same_parts,
)

jax.config.update("jax_default_matmul_precision", "float32")

# maxdiffusion's, for SDXL: rules for names that are not ours are passed over.
MAXDIFFUSION = (
    ("batch", "data"),
    ("activation_heads", "fsdp"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("conv_batch", ["data", "fsdp"]),
)

# Name -> source, mesh, rules, number of prompts: 3 are padded to 4.
CASES: dict[str, tuple[str, dict[str, int], Any, int]] = {
    "clip, data": ("sd15", {"data": 4}, None, 4),
    "clip, tensor": ("sd15", {"tensor": 8}, None, 4),
    "clip, both": ("sd15", {"data": 4, "tensor": 2}, None, 3),
    "flux, both": ("flux orbax", {"data": 2, "tensor": 4}, None, 4),
    "flux, fsdp": ("flux", {"fsdp": 8}, None, 4),
    "sdxl, both": ("sdxl", {"data": 2, "tensor": 4}, None, 4),
    "sdxl, maxdiffusion": ("sdxl", {"data": 1, "fsdp": 4, "tensor": 2}, MAXDIFFUSION, 4),
}


def main(sources: Path) -> None:
    programs = record_programs()
    whole = {name: open_foreign([sources / name], family=name).read_params(None) for name in ("sd15", "flux", "sdxl")}
    encoders, results = {}, {}
    for case, (source, axes, rules, size) in CASES.items():
        family, mesh = source.split()[0], mesh_of(axes)
        encoder = encoders[case] = clip_jax.load(sources / source, family=family, mesh=mesh, rules=rules)
        out = encode(encoder, PROMPTS[:size])
        results[case] = {
            "error": largest_error(out, reference(sources / f"{family}.npz", size)),
            "same params": same_parts(encoder.params, whole[family]),
            "bytes": bytes_by_device(encoder.params),
            "predicted": device_bytes(encoder.config, param_shardings(encoder.config, mesh, rules), "float32"),
            "arguments": programs[-1].memory_analysis().argument_size_in_bytes,
            "collectives": collectives(programs[-1].as_text()),
        }
    one = encode(encoders["clip, both"], PROMPTS[:1])
    results["one prompt"] = {"error": largest_error(one, reference(sources / "sd15.npz", 1))}
    results["moved"] = moved(sources)
    results["pickled"] = pickled(sources)
    results["default"] = default(sources)
    results["explicit"] = explicit(sources)
    results["warmed"] = warmed(sources, programs)
    results["meshes"] = meshes(sources)
    results["saved"] = saved(encoders["flux, both"], whole["flux"], sources / "saved")
    results["low"] = low(sources, whole["flux"])
    results["quantized"] = {name: quantized(sources / "sd15", name) for name in SCHEMES}
    results["compat"] = compat(sources / "flux", whole["flux"])
    results["reads"] = reads(open_foreign([sources / "sdxl"]))
    results["controls"] = controls(encoders["flux, both"], programs)
    results["copies"] = copies(sources / "sd15", sources / "overwritten", whole["sd15"])
    print(json.dumps(results))


def mesh_of(axes: Mapping[str, int]) -> jax.sharding.Mesh:
    """As `jax.make_mesh` makes it, with explicit axes; of as many devices as it takes."""
    return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[: math.prod(axes.values())])


def record_programs() -> list[Any]:
    """The compiled programs that `TextEncoder` runs from now on."""
    programs: list[Any] = []
    function = clip_jax.text_embeddings

    def recorded(params: Any, tokens: Any, **static: Any) -> Any:
        programs.append(function.lower(params, tokens, **static).compile())
        return programs[-1](params, tokens)

    clip_jax.embed.text_embeddings = recorded  # type: ignore[assignment]
    return programs


def reference(path: Path, size: int) -> dict[str, np.ndarray]:
    """What one device makes of the first prompts, guidance rows [2, 4] included where there are some."""
    arrays = dict(np.load(path))
    rows = {name: array.reshape(-1, len(PROMPTS), *array.shape[1:])[:, :size] for name, array in arrays.items()}
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in rows.items()}


def moved(sources: Path) -> float:
    """Params that were on a mesh, on one device: rows, which would divide, go there too."""
    encoder = clip_jax.load(sources / "sd15", family="sd15", mesh=mesh_of({"data": 2, "tensor": 4}), cache_bytes=0)
    encoder.params = jax.device_put(encoder.params, jax.devices()[3])
    return largest_error(encode(encoder, PROMPTS[:2]), reference(sources / "sd15.npz", 2))


def pickled(sources: Path) -> dict[str, Any]:
    """An encoder with its params on a mesh, by way of bytes; and a copy, which shares them."""
    encoder = clip_jax.load(sources / "sd15", family="sd15", mesh=mesh_of({"data": 2, "tensor": 4}))
    found = {"pickled": pickle.loads(pickle.dumps(encoder)), "copied": copy.copy(encoder)}
    wanted = reference(sources / "sd15.npz", 2)
    return {
        "errors": {name: largest_error(encode(each, PROMPTS[:2]), wanted) for name, each in found.items()},
        "rows": found["copied"].batch_sharding == encoder.batch_sharding,
    }


def default(sources: Path) -> list[str]:
    """Where embeddings are computed with params that were loaded, or set, under a default device of then."""
    with jax.default_device(jax.devices()[3]):
        loaded = clip_jax.load(sources / "sd15", family="sd15", cache_bytes=0)
        drawn = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), loaded.params)
    found = [encode(loaded, PROMPTS[:1])]
    loaded.params = drawn
    found.append(encode(loaded, PROMPTS[:1]))
    return [str(out.prompt_embeds.devices()) for out in found]


def warmed(sources: Path, programs: list[Any]) -> list[int]:
    """How many programs are run by a warmup on a mesh, and by the call that it was for."""
    encoder = clip_jax.load(sources / "sd15", family="sd15", mesh=mesh_of({"data": 2, "tensor": 4}))
    before = len(programs)
    encoder.warmup((2,))
    between = len(programs)
    encoder(PROMPTS[:2])
    return [between - before, len(programs) - between]


def meshes(sources: Path) -> list[bool]:
    """Whether the same call is computed on the devices of the mesh that is in force."""
    encoder = clip_jax.load(sources / "sd15", family="sd15")
    found = []
    for devices in (jax.devices()[:2], jax.devices()[2:4]):
        with jax.set_mesh(jax.sharding.Mesh(np.array(devices), "data")):
            found.append(encoder(PROMPTS[0]).prompt_embeds.devices() == set(devices))
    return found


def explicit(sources: Path) -> dict[str, Any]:
    """Within a mesh with explicit axes; and when the params have left it."""
    mesh = mesh_of({"data": 2, "tensor": 4})
    with jax.set_mesh(mesh):
        encoder = clip_jax.load(sources / "sd15", family="sd15", mesh=mesh)
        encoder.warmup((2,))
        out = encode(encoder, PROMPTS[:2])
        odd = encode(encoder, PROMPTS[:3])
        half = clip_jax.load(sources / "sd15", family="sd15", mesh=mesh, dtype="float16")(PROMPTS[0])
        clip_jax.load(sources / "sd15", family="sd15", mesh=mesh, quantize="int8")(PROMPTS[0])
    assert np.isfinite(half.prompt_embeds).all()
    encoder.params = jax.device_put(encoder.params, jax.devices()[0])
    encoder.export(sources / "exported")
    exported = encode(clip_jax.load_exported(sources / "exported"), PROMPTS[:2])
    found = {"within": (out, 2), "odd": (odd, 3), "exported": (exported, 2)}
    return {name: largest_error(each, reference(sources / "sd15.npz", size)) for name, (each, size) in found.items()}


def saved(encoder: clip_jax.TextEncoder, whole: Any, path: Path) -> dict[str, bool]:
    """Sharded params written, and read again: on one device, and split in another way."""
    encoder.save(path)
    specs, shardings = ckpt.read_specs(path, encoder.config), param_shardings(encoder.config, mesh_of({"tensor": 8}))
    return {
        "whole": same_parts(ckpt.read_params(path, specs, None), whole),
        "split": same_parts(ckpt.read_params(path, specs, None, placement=placed_by(shardings)), whole),
    }


def low(sources: Path, whole: Any) -> dict[str, Any]:
    """Casting part by part is casting the whole."""
    bfloat16 = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), whole)
    opened = open_foreign([sources / "flux"])
    configs = {tower.name: tower.config for tower in opened.family.towers}
    shardings = param_shardings(configs, mesh_of({"data": 2, "tensor": 4}))
    stored = ckpt.read_specs(sources / "flux orbax", configs)
    read: dict[str, Callable[..., Any]] = {
        "flux": opened.read_params,
        "flux orbax": lambda dtype, placement: ckpt.read_params(
            sources / "flux orbax", stored, dtype, placement=placement
        ),
    }
    split = {name: function(jnp.dtype("bfloat16"), placement=placed_by(shardings)) for name, function in read.items()}
    return {
        "predicted": device_bytes(configs, shardings, "bfloat16"),
        **{name: [same_parts(params, bfloat16), bytes_by_device(params)[0]] for name, params in split.items()},
    }


def quantized(source: Path, name: str) -> dict[str, Any]:
    """Quantised on one device, part by part while a foreign checkpoint is read, and from a checkpoint."""
    whole = clip_jax.load(source, family="sd15", quantize=name)
    whole.save(source.parent / f"sd15 {name}")
    mesh = mesh_of({"data": 2, "fsdp": 2, "tensor": 2})
    made = clip_jax.load(source, family="sd15", quantize=name, mesh=mesh)
    read = clip_jax.load(source.parent / f"sd15 {name}", mesh=mesh)

    def embeds(encoder: clip_jax.TextEncoder) -> np.ndarray:
        # Not by `encoder.encode`, of which programs are recorded: jax 0.10 takes no sharded int4 in `compiled(...)`.
        tokens = encoder.tokenize(PROMPTS)
        return np.asarray(clip_jax.text_embeddings(encoder.params, tokens, family=encoder.family).prompt_embeds)

    exact = embeds(clip_jax.load(source, family="sd15"))
    out = {key: embeds(each) for key, each in (("one", whole), ("made", made), ("read", read))}
    return {
        "same params": same_parts(made.params, whole.params) and same_parts(read.params, whole.params),
        "same shardings": all(
            leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)
            for leaf, other in zip(jax.tree.leaves(made.params), jax.tree.leaves(read.params), strict=True)
        ),
        "bytes": [bytes_by_device(each.params) for each in (made, read)],
        "errors": {key: float(np.linalg.norm(array - exact) / np.linalg.norm(exact)) for key, array in out.items()},
    }


def compat(source: Path, whole: Any) -> dict[str, Any]:
    """A pipeline that shards the drop-in classes by its own rules: read straight to their parts, and called."""
    mesh = mesh_of({"fsdp": 2, "tensor": 4})
    rules = (("embed", "fsdp"), ("heads", "tensor"), ("mlp", "tensor"))
    ids = np.arange(24).reshape(2, 12)
    found: dict[str, Any] = {}
    for tower, cls, config, folder in (
        ("clip_l", FlaxCLIPTextModel, CLIP, "text_encoder"),
        ("t5", FlaxT5EncoderModel, T5, "text_encoder_2"),
    ):
        model = cls(config, _do_init=False)
        abstract = model.init_weights(jax.random.key(0), (2, 12), eval_only=True)
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, rules)
        split = cls.from_pretrained(source, subfolder=folder, shardings=shardings)
        wanted = model(ids, params=whole[tower])
        found[tower] = {
            "error": float(np.abs(np.asarray(split(ids)[0]) - np.asarray(wanted[0])).max()),
            "bytes": bytes_by_device(split.params),
            "same params": same_parts(split.params, whole[tower]),
        }
    found["placed"] = placed(T5TextEncoder(cls.from_pretrained(source, subfolder=folder)), ids, mesh)
    return found


def placed(encoder: T5TextEncoder, ids: np.ndarray, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """A wrapper whose params go to a mesh, and back to the host."""
    wanted = np.asarray(encoder(ids))
    encoder.place_params(NamedSharding(mesh, PartitionSpec()))
    there = encoder(ids)
    encoder.offload_params()
    here = encoder(ids)
    return {
        "devices": [len(array.devices()) for array in (there, here)],
        "error": max(float(np.abs(np.asarray(array) - wanted).max()) for array in (there, here)),
    }


def reads(opened: ForeignCheckpoint) -> dict[str, Any]:
    """How much of a foreign checkpoint is read for a mesh that holds every part twice."""
    sizes: list[tuple[str, int]] = []
    reader = ForeignTower.reader

    def counted(tower: ForeignTower, path: str, dtype: Any, scheme: Any) -> Callable[[Index], np.ndarray]:
        def part(index: Index) -> np.ndarray:
            array = reader(tower, path, dtype, scheme)(index)
            sizes.append((path, array.size))
            return array

        return part

    ForeignTower.reader = counted  # type: ignore[method-assign]
    configs = {tower.name: tower.config for tower in opened.family.towers}
    shardings = param_shardings(configs, mesh_of({"data": 2, "tensor": 4}))
    params = opened.read_params(None, placement=placed_by(shardings))
    ForeignTower.reader = reader  # type: ignore[method-assign]
    return {
        "numbers": sum(size for _, size in sizes),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "fc1": sorted({size for path, size in sizes if path.endswith("layers/0/mlp/fc1/kernel")}),
    }


def controls(encoder: clip_jax.TextEncoder, programs: list[Any]) -> dict[str, Any]:
    """What is measured of params of which one kernel is split in another way than it should be."""
    leaves = flatten(encoder.params["t5"])
    kernel = "encoder/block/0/layer/1/DenseReluDense/wo/kernel"
    mesh = leaves[kernel].sharding.mesh
    found: dict[str, Any] = {}
    for name, spec in {"whole": (None, None), "columns": (None, "tensor")}.items():
        wrong = jax.device_put(leaves[kernel], NamedSharding(mesh, PartitionSpec(*spec)))
        encoder.params = {**encoder.params, "t5": unflatten({**leaves, kernel: wrong})}
        found[name] = {"bytes": bytes_by_device(encoder.params)[0]}
    encode(encoder, PROMPTS)
    found["columns"]["collectives"] = collectives(programs[-1].as_text())
    return found


def copies(source: Path, copy: Path, whole: Mapping[str, Any]) -> dict[str, Any]:
    """A part that several devices hold is read once, and is a copy of a file that changes later."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    numbers, asked = np.arange(4096, dtype=np.float32).reshape(64, 64), []

    def read(index: Index) -> np.ndarray:
        asked.append(index)
        return numbers[index]

    sharded_array(numbers.shape, NamedSharding(mesh, PartitionSpec("tensor")), read)

    shutil.copytree(source, copy)
    for file in copy.rglob("*.safetensors"):
        align(file)
    opened = open_foreign([copy], family="sd15")
    configs = {tower.name: tower.config for tower in opened.family.towers}
    params = opened.read_params(None, placement=placed_by(param_shardings(configs, mesh)))
    for file in copy.rglob("*.safetensors"):
        with file.open("r+b") as weights:
            weights.write(bytes(file.stat().st_size))
    return {"asked": len(asked), "same": same_parts(params, whole)}


def align(file: Path) -> None:
    """Has the tensors begin where a device would take them as they are."""
    data = file.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    padded = header + b" " * (-(8 + len(header)) % 64)
    file.write_bytes(len(padded).to_bytes(8, "little") + padded + data[8 + len(header) :])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
