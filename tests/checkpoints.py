"""Writes small checkpoints in the real file formats, without torch; the same weights on every machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from clip_jax import FAMILIES, ClipTextConfig, Family, T5EncoderConfig, TextEncoder, load
from clip_jax.config import TowerConfig
from clip_jax.families import Tower
from clip_jax.tokenizers import ClipTokenizer
from clip_jax.tokenizers.stand_in import stand_in_t5_tokenizer

TINY = ClipTextConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, hidden_act="quick_gelu"
)
TINY_H = ClipTextConfig(
    hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, hidden_act="gelu"
)


def hf_state(config: ClipTextConfig, *, prefix: str = "text_model.", seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict in the keys of transformers, in the layout of torch ([out, in]), float32.

    The names are spelt out here rather than taken from `clip_jax.convert`, which is what they test. Norms and
    biases are far from the identity, so that two of them swapped do not go unnoticed.
    """
    rng = np.random.RandomState(seed)  # the legacy generator: its streams never change
    d, f = config.hidden_size, config.intermediate_size

    def matrix(rows: int, columns: int, std: float) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * std).astype(np.float32)

    def vector(size: int, mean: float) -> np.ndarray:
        return (mean + 0.2 * rng.standard_normal(size)).astype(np.float32)

    state = {
        f"{prefix}embeddings.token_embedding.weight": matrix(config.vocab_size, d, 0.5),
        f"{prefix}embeddings.position_embedding.weight": matrix(config.max_position_embeddings, d, 0.5),
    }
    for i in range(config.num_hidden_layers):
        layer = f"{prefix}encoder.layers.{i}."
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            state[f"{layer}{name}.weight"] = matrix(d, d, d**-0.5)
            state[f"{layer}{name}.bias"] = vector(d, 0)
        for name in ("layer_norm1", "layer_norm2"):
            state[f"{layer}{name}.weight"] = vector(d, 1)
            state[f"{layer}{name}.bias"] = vector(d, 0)
        state[f"{layer}mlp.fc1.weight"] = matrix(f, d, d**-0.5)
        state[f"{layer}mlp.fc1.bias"] = vector(f, 0)
        state[f"{layer}mlp.fc2.weight"] = matrix(d, f, f**-0.5)
        state[f"{layer}mlp.fc2.bias"] = vector(d, 0)
    state[f"{prefix}final_layer_norm.weight"] = vector(d, 1)
    state[f"{prefix}final_layer_norm.bias"] = vector(d, 0)
    if config.projection_dim is not None:
        state["text_projection.weight"] = matrix(config.projection_dim, d, d**-0.5)
    return state


def load_as_sd15(folder: Path, config: ClipTextConfig) -> TextEncoder:
    """Loads a folder under an "sd15" that is made for `config`, with a projection if it has one."""
    sd15 = FAMILIES["sd15"]
    towers = (dataclasses.replace(sd15.towers[0], config=config),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "sd15", dataclasses.replace(sd15, towers=towers))
        return load(folder, family="sd15")


def write_text_encoder(folder: Path, config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> Path:
    """Writes config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> Path:
    """Writes config.json, two shards and their index, as `save_pretrained(max_shard_size=...)` does."""
    write_text_encoder(folder, config, {})
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(state)}
    for shard in set(weight_map.values()):
        part = {name: np.ascontiguousarray(a) for name, a in state.items() if weight_map[name] == shard}
        save_file(part, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_clip_model(folder: Path, config: ClipTextConfig, state: Mapping[str, np.ndarray]) -> Path:
    """Writes a whole CLIPModel: the text model, a projection, and stubs of all that is not the text model."""
    others = {
        "logit_scale": np.float32(2.6592).reshape(()),
        "text_projection.weight": np.ones((16, config.hidden_size), np.float32),
        "visual_projection.weight": np.ones((16, 8), np.float32),
        "text_model.embeddings.position_ids": np.arange(config.max_position_embeddings)[None],
        "vision_model.embeddings.class_embedding": np.ones(8, np.float32),
        "vision_model.encoder.layers.0.mlp.fc1.weight": np.ones((8, 8), np.float32),
    }
    whole = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": 16,
        "text_config": config.to_hf(),
        "vision_config": {"hidden_size": 8},
    }
    return write_text_encoder(folder, whole, {**state, **others})


def digests(folder: Path) -> dict[str, str]:
    """Path below `folder` -> sha256 of every file, "" for a folder: equal if nothing changed."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def write_pipeline(
    folder: Path,
    config: ClipTextConfig = TINY,
    state: Mapping[str, np.ndarray] | None = None,
    *,
    pad_token: str = "<|endoftext|>",
    class_name: str = "StableDiffusionPipeline",
) -> Path:
    """Writes the text side of a diffusers pipeline: model_index.json, text_encoder/ and tokenizer/."""
    write_text_encoder(folder / "text_encoder", config.to_hf(), hf_state(config) if state is None else state)
    ClipTokenizer.packaged(pad_token).save(folder / "tokenizer")
    index = {
        "_class_name": class_name,
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


TINY_G = dataclasses.replace(TINY_H, num_hidden_layers=4, projection_dim=40)
TINY_T5 = T5EncoderConfig(d_model=104, d_kv=8, d_ff=72, num_layers=3, num_heads=5)


def t5_state(config: T5EncoderConfig, *, seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict of T5EncoderModel, as `hf_state` makes one of a CLIP text model."""
    rng = np.random.RandomState(seed)
    d, f, inner = config.d_model, config.d_ff, config.num_heads * config.d_kv

    def matrix(rows: int, columns: int, std: float) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * std).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(d)).astype(np.float32)

    state = {"shared.weight": matrix(config.vocab_size, d, 0.5)}
    for i in range(config.num_layers):
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        state[f"{attention}.SelfAttention.q.weight"] = matrix(inner, d, (d * config.d_kv) ** -0.5)
        state[f"{attention}.SelfAttention.k.weight"] = matrix(inner, d, d**-0.5)
        state[f"{attention}.SelfAttention.v.weight"] = matrix(inner, d, d**-0.5)
        state[f"{attention}.SelfAttention.o.weight"] = matrix(d, inner, inner**-0.5)
        if i == 0:
            name = f"{attention}.SelfAttention.relative_attention_bias.weight"
            state[name] = matrix(config.relative_attention_num_buckets, config.num_heads, 0.5)
        state[f"{attention}.layer_norm.weight"] = norm()
        state[f"{mlp}.DenseReluDense.wi_0.weight"] = matrix(f, d, d**-0.5)
        state[f"{mlp}.DenseReluDense.wi_1.weight"] = matrix(f, d, d**-0.5)
        state[f"{mlp}.DenseReluDense.wo.weight"] = matrix(d, f, f**-0.5)
        state[f"{mlp}.layer_norm.weight"] = norm()
    state["encoder.final_layer_norm.weight"] = norm()
    return state


def tiny_config(tower: Tower) -> TowerConfig:
    """A small architecture of the kind of a tower's."""
    if isinstance(tower.config, T5EncoderConfig):
        return TINY_T5
    small = {"clip_l": TINY, "clip_h": TINY_H, "clip_g": TINY_G}[tower.name]
    projection = None if tower.config.projection_dim is None else small.projection_dim or 24
    return dataclasses.replace(small, projection_dim=projection)


def write_family(folder: Path, family: Family, *, leave_out: Collection[str] = ()) -> Path:
    """Writes the text side of a pipeline of any family, small, with other weights in every tower."""
    index: dict[str, Any] = {"_class_name": min(family.pipelines, key=len)}
    if family.zero_negative or family.name == "sdxl_refiner":
        index["force_zeros_for_empty_prompt"] = family.zero_negative
    for seed, tower in enumerate(family.towers, start=1):
        if tower.name in leave_out:
            index[tower.folder] = [None, None]
            continue
        config = tiny_config(tower)
        is_t5 = isinstance(config, T5EncoderConfig)
        state = t5_state(config, seed=seed) if is_t5 else hf_state(config, seed=seed)
        write_text_encoder(folder / tower.folder, config.to_hf(), state)
        tokenizer = stand_in_t5_tokenizer() if is_t5 else ClipTokenizer.packaged(tower.pad_token)
        tokenizer.save(folder / tower.tokenizer_folder)
        index[tower.folder] = ["transformers", config.to_hf()["architectures"][0]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
