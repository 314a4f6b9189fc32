"""Families whose heads divide by eight, small enough for eight simulated devices, and what can be measured of a run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.typing
import numpy as np

from clip_jax import FAMILIES, ClipTextConfig, T5EncoderConfig, TextEmbeddings, TextEncoder
from clip_jax.config import TowerConfig
from clip_jax.params.cast import float_dtype, param_dtype
from clip_jax.params.shapes import param_shapes
from clip_jax.params.shard import Shardings
from clip_jax.tokenizers import ClipTokenizer
from clip_jax.tokenizers.stand_in import stand_in_t5_tokenizer
from tests.checkpoints import hf_state, t5_state, write_text_encoder

CLIP = ClipTextConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, hidden_act="quick_gelu"
)
T5 = T5EncoderConfig(d_model=64, d_kv=8, d_ff=96, num_layers=2, num_heads=8)

PROMPTS = ["a cat on a windowsill", "two dogs", "", "a boat at night"]

_COLLECTIVE = re.compile(
    r"^\s*(?:ROOT )?\S+ = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", re.M
)


def device_bytes(configs: Mapping[str, TowerConfig], shardings: Shardings, dtype: jax.typing.DTypeLike) -> int:
    """Bytes of params on each device, for towers that are loaded in `dtype`."""
    kept = float_dtype(dtype)
    return sum(
        math.prod(shardings[tower][path].shard_shape(shape)) * param_dtype(path, kept).itemsize
        for tower, config in configs.items()
        for path, shape in param_shapes(config).items()
    )


def write_small(folder: Path, name: str) -> Path:
    """Writes the text side of a pipeline of a family as diffusers does."""
    family = FAMILIES[name]
    index: dict[str, Any] = {"_class_name": min(family.pipelines, key=len)}
    for seed, tower in enumerate(family.towers):
        if isinstance(tower.config, T5EncoderConfig):
            config, state, tokenizer = T5, t5_state(T5, seed=seed), stand_in_t5_tokenizer()
        else:
            config = dataclasses.replace(CLIP, projection_dim=tower.config.projection_dim and 48)
            state, tokenizer = hf_state(config, seed=seed), ClipTokenizer.packaged(tower.pad_token)
        write_text_encoder(folder / tower.folder, config.to_hf(), state)
        tokenizer.save(folder / tower.tokenizer_folder)
        index[tower.folder] = ["transformers", config.to_hf()["architectures"][0]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def encode(encoder: TextEncoder, prompts: list[str]) -> TextEmbeddings:
    """The embeddings of prompts, with few tokens for T5."""
    return encoder(prompts, max_sequence_length=32 if "t5" in encoder.config else None)


def outputs(embeddings: TextEmbeddings) -> dict[str, jax.Array]:
    """The arrays of a result by name."""
    found = {"embeds": embeddings.prompt_embeds, "pooled": embeddings.pooled_prompt_embeds}
    return {name: array for name, array in found.items() if array is not None}


def largest_error(embeddings: TextEmbeddings, reference: Mapping[str, np.ndarray]) -> float:
    """The largest difference to a reference, over the parts that this process has."""
    found = outputs(embeddings)
    assert {name: array.shape for name, array in found.items()} == {n: a.shape for n, a in reference.items()}
    return max(
        float(np.abs(np.asarray(part.data) - reference[name][part.index]).max())
        for name, array in found.items()
        for part in array.addressable_shards
    )


def bytes_by_device(params: Any) -> list[int]:
    """Bytes of params on each device of this process."""
    held: Counter[int] = Counter()
    for leaf in jax.tree.leaves(params):
        for part in leaf.addressable_shards:
            held[part.device.id] += part.data.nbytes
    return list(held.values())


def same_parts(params: Any, reference: Any) -> bool:
    """Whether every part that this process has is, bit for bit, that of the whole params."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(reference), strict=True)
    return all(
        np.array_equal(np.asarray(part.data), np.asarray(whole)[part.index])
        for leaf, whole in pairs
        for part in leaf.addressable_shards
    )


def collectives(program: str) -> dict[str, int]:
    """Kind -> how many arrays a compiled program sends that way; XLA may join several of them in one message."""
    sent: Counter[str] = Counter()
    for match in _COLLECTIVE.finditer(program):
        sent[match[2]] += len(re.findall(r"\w+\[[\d,]*\]", match[1]))
    return dict(sent)
