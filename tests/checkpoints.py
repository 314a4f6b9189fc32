"""Writes small checkpoints in the real file formats, without torch; the same weights on every machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from clip_jax import FAMILIES, ClipTextConfig, TextEncoder, load
from clip_jax.tokenizers import ClipTokenizer

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
    save_file(
        {name: np.ascontiguousarray(array) for name, array in state.items()}, folder / "model.safetensors"
    )
    return folder


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
