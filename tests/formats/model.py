"""The model that every layout holds, and its diffusers folder."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax import FAMILIES, T5EncoderConfig
from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.tokenizers import ClipTokenizer
from clip_jax.tokenizers.stand_in import stand_in_t5_tokenizer
from tests.checkpoints import TINY, TINY_H, hf_state, t5_state, write_text_encoder

State = dict[str, np.ndarray]

#: Tower name -> architecture. The projection is square as the real one is, and T5's rows fill blocks of 32.
CONFIGS: Mapping[str, TowerConfig] = {
    "clip_l": dataclasses.replace(TINY, hidden_size=16, intermediate_size=32, num_hidden_layers=2),
    "clip_h": dataclasses.replace(TINY_H, hidden_size=24, num_hidden_layers=3),
    "clip_g": dataclasses.replace(TINY_H, hidden_size=32, num_attention_heads=4, projection_dim=32),
    "t5": T5EncoderConfig(d_model=96, d_kv=16, d_ff=160, num_layers=2, num_heads=4, vocab_size=320),
}


#: What SD 2 uses of H.
SD2_H = dataclasses.replace(TINY_H, hidden_size=24)


@functools.cache
def model(tower: str) -> State:
    """The float32 weights of a tower, under transformers' names; H with what SD 2 leaves out of it."""
    config, seed = CONFIGS[tower], list(CONFIGS).index(tower)
    if isinstance(config, T5EncoderConfig):
        return t5_state(config, seed=seed)
    if tower == "clip_h":
        config = dataclasses.replace(config, projection_dim=config.hidden_size)
    return hf_state(config, seed=seed)


def used(tower: str) -> State:
    """What of `model` a pipeline uses."""
    if tower != "clip_h":
        return model(tower)
    extra = ("text_model.encoder.layers.2.", "text_projection.")
    return {name: array for name, array in model(tower).items() if not name.startswith(extra)}


def configs_of(family: str) -> dict[str, TowerConfig]:
    """Of the CLIP towers of a family: these widths are no one's, so that they have to be given."""
    return {tower.name: CONFIGS[tower.name] for tower in FAMILIES[family].towers if tower.name != "t5"}


def write_pipeline_folder(folder: Path, family: str, states: Mapping[str, State]) -> Path:
    """Writes the diffusers folder of these weights."""
    index: dict[str, Any] = {"_class_name": min(FAMILIES[family].pipelines, key=len)}
    if family == "sdxl_refiner":
        index["force_zeros_for_empty_prompt"] = False
    for tower in FAMILIES[family].towers:
        config, state = SD2_H if tower.name == "clip_h" else CONFIGS[tower.name], states[tower.name]
        if tower.identity_projection and isinstance(config, ClipTextConfig):
            config = dataclasses.replace(config, projection_dim=config.hidden_size)
            state = {**state, "text_projection.weight": np.eye(config.hidden_size, dtype=np.float32)}
        write_text_encoder(folder / tower.folder, config.to_hf(), state)
        tokenizer = stand_in_t5_tokenizer() if tower.name == "t5" else ClipTokenizer.packaged(tower.pad_token)
        tokenizer.save(folder / tower.tokenizer_folder)
        index[tower.folder] = ["transformers", config.to_hf()["architectures"][0]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
