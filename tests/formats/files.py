"""Writers of files, one a format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import serialization, traverse_util
from safetensors.numpy import save_file

from tests.formats.model import State
from tests.formats.torch_zip import Global, write_torch_zip
from tests.formats.values import is_quantisable

Writer = Callable[[Path, State], Path]


def write_safetensors(path: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path, metadata)
    return path


def write_msgpack(path: Path, state: State) -> Path:
    arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
    path.write_bytes(serialization.msgpack_serialize(traverse_util.unflatten_dict(arrays, sep="/")))
    return path


def write_lightning(path: Path, state: State) -> Path:
    """A .ckpt of SD 1's training: a state dict among the rest of a run."""
    run = {
        "epoch": 3,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {
            Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): {"best_model_path": "a.ckpt"}
        },
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    return write_torch_zip(path, run)


def write_sharded(folder: Path, state: State, write: Writer, name: str, suffix: str) -> Path:
    """Two shards and their index, as `save_pretrained(max_shard_size=...)` writes them; returns the index."""
    folder.mkdir()
    weight_map = {key: f"{name}-{i % 2 + 1:05}-of-00002.{suffix}" for i, key in enumerate(state)}
    for shard in set(weight_map.values()):
        write(folder / shard, {key: state[key] for key in state if weight_map[key] == shard})
    index = folder / f"{name}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def write_gguf(path: Path, state: State, kind: str, architecture: str = "t5encoder") -> Path:
    """A GGUF file with its matrices of a kind, and what does not fill blocks of 32 in float32, as llama.cpp does."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for name, array in state.items():
        this = gguf.GGMLQuantizationType[kind if is_quantisable(array) else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), this), raw_dtype=this)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
