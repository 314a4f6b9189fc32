"""Writes weights as torch does, and runs our side of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import transformers

import clip_jax

CLIP_MODELS = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
TOLERANCE = 2e-5
PROMPT = ["a photograph of a cat", "two dogs"]
Arrays = dict[str, torch.Tensor]


def tensors(state: Mapping[str, np.ndarray]) -> Arrays:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}


def write_bin(path: Path, state: Arrays) -> Path:
    torch.save(state, path)
    return path


def write_legacy(path: Path, state: Arrays) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def write_safetensors(path: Path, state: Arrays) -> Path:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def conditioning(encoder: clip_jax.TextEncoder) -> tuple[dict[str, torch.Tensor], clip_jax.TextEmbeddings]:
    """The ids of every tower, and what the encoder makes of them."""
    length = {"max_sequence_length": 32} if encoder.family.max_sequence_length else {}
    tokens = encoder.tokenize(PROMPT, guidance=False, **length)
    ids = {name: torch.from_numpy(np.asarray(row)).long() for name, row in tokens.cond.items()}
    return ids, clip_jax.text_embeddings(encoder.params, tokens, family=encoder.family)
