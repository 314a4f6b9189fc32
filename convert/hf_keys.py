"""The keys of HF transformers' text encoders, and where they go in the parameter tree.

Reference: the state dicts of transformers `CLIPTextModel`, `CLIPTextModelWithProjection`, `CLIPModel` and
`T5EncoderModel`. transformers 5.6 and later writes a fresh `CLIPTextModel` without the `text_model.` prefix; both
spellings are read. A torch `Linear.weight` is [out, in], a Flax kernel its transpose; nothing else is transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.convert.safetensors import TensorInfo
from clip_jax.errors import CheckpointError
from clip_jax.params.shapes import check_shapes, list_faults, param_shapes

# Flax leaf -> torch name, and whether it is transposed.
_LEAVES = {
    "kernel": ("weight", True),
    "scale": ("weight", False),
    "weight": ("weight", False),
    "embedding": ("weight", False),
    "bias": ("bias", False),
}

_READABLE = ("float16", "bfloat16", "float32")

_CLIP_ANCHOR = "embeddings.token_embedding.weight"
_T5_ANCHOR = "encoder.block.0.layer.0.SelfAttention.q.weight"
_T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")

# Known to have no part in the text encoder: named, so that anything else left over is an error.
_CLIP_IGNORED = r"(.*\.)?position_ids|logit_scale|vision_model\..*|visual_projection\.weight"
_T5_IGNORED = r"decoder\..*|lm_head\.weight"

# What other models' state dicts are recognised by, for the message.
_OTHER_MODELS = {
    "encoder.block.0.layer.1.DenseReluDense.wi.weight": "a T5 v1.0, which is not gated (T5 v1.1 is)",
    "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": "a UMT5 (a position bias in each block)",
    _T5_ANCHOR: "a T5 encoder",
    "text_model." + _CLIP_ANCHOR: "a CLIP text model",
    _CLIP_ANCHOR: "a CLIP text model",
    "transformer.resblocks.0.attn.in_proj_weight": "an OpenCLIP model",
    "model.diffusion_model.input_blocks.0.0.weight": "a single-file SD checkpoint",
    "vision_model.embeddings.patch_embedding.weight": "a CLIP image encoder",
    "down_blocks.0.resnets.0.conv1.weight": "a diffusers UNet",
    "encoder.conv_in.weight": "a diffusers VAE",
    "embeddings.word_embeddings.weight": "a BERT model",
}


class KeyMap(NamedTuple):
    """Where the parameters of a tower are in its source, one to one.

    Attributes:
        keys: Parameter path -> (source key, whether to transpose).
        ignored: Source keys that are left aside by name.
        twins: Pairs of source keys of which the first is read, and the second has to be equal to it.
    """

    keys: Mapping[str, tuple[str, bool]]
    ignored: list[str]
    twins: list[tuple[str, str]]


def map_keys(
    tensors: Mapping[str, TensorInfo], config: TowerConfig, what: str, *, source_blocks: int | None = None
) -> KeyMap:
    """Pairs every parameter with its source tensor.

    Args:
        tensors: What the source holds.
        config: The architecture to fill. For CLIP with `projection_dim` None, `text_projection.weight` is left
            aside.
        what: The source, for messages.
        source_blocks: How many blocks the source has; those that `config` has no use for are left aside.

    Raises:
        CheckpointError: Another model, or tensors that are missing, left over, of the wrong shape, or not
            floating point. All faults are reported at once.
    """
    if isinstance(config, ClipTextConfig):
        prefix = _find_clip_prefix(tensors, what)
        rename = {"text_model.": prefix}
        aside = [_CLIP_IGNORED, *([r"text_projection\.weight"] if config.projection_dim is None else [])]
        blocks = range(config.num_hidden_layers, source_blocks or 0)
        aside += [rf"{re.escape(prefix)}encoder\.layers\.{block}\..*" for block in blocks]
        twins: list[tuple[str, str]] = []
    else:
        embeddings = _find_t5_embeddings(tensors, what)
        rename = {"shared.weight": embeddings[0]}
        aside = [_T5_IGNORED, *map(re.escape, embeddings[1:])]
        twins = [(embeddings[0], other) for other in embeddings[1:]]

    keys = {path: _hf_key(path, rename) for path in param_shapes(config)}
    used = {key for key, _ in keys.values()}
    ignored = sorted(key for key in tensors if key not in used and re.fullmatch("|".join(aside), key))
    unreadable = [
        f"{key} is {tensors[key].dtype}" for key in used & tensors.keys() if tensors[key].dtype.name not in _READABLE
    ]
    if unreadable:
        raise CheckpointError(
            f"{what} holds tensors of dtypes that are not read: expected one of {', '.join(_READABLE)}. "
            + " ".join(list_faults("found", unreadable))
        )
    expected = {
        key: shape[::-1] if transposed else shape
        for (key, transposed), shape in zip(keys.values(), param_shapes(config).values(), strict=True)
    }
    check_shapes(expected, {key: tensors[key].shape for key in tensors.keys() - set(ignored)}, what)
    return KeyMap(keys, ignored, twins)


def to_flax(array: np.ndarray, transposed: bool) -> np.ndarray:
    """A source tensor in the layout of its parameter; a view."""
    return array.T if transposed else array


def _hf_key(path: str, rename: Mapping[str, str]) -> tuple[str, bool]:
    module, _, leaf = path.rpartition("/")
    name, transposed = _LEAVES[leaf]
    key = f"{module.replace('/', '.')}.{name}"
    for start, other in rename.items():
        if key.startswith(start):
            key = other + key.removeprefix(start)
    return key, transposed


def _find_clip_prefix(tensors: Mapping[str, TensorInfo], what: str) -> str:
    for prefix in ("text_model.", ""):
        if prefix + _CLIP_ANCHOR in tensors:
            return prefix
    raise _another_model(
        tensors,
        f"{what} is not a CLIP text model: expected a tensor text_model.{_CLIP_ANCHOR} or {_CLIP_ANCHOR}",
    )


def _find_t5_embeddings(tensors: Mapping[str, TensorInfo], what: str) -> list[str]:
    """The keys of the token embedding, of which checkpoints hold either or both."""
    found = [key for key in _T5_EMBEDDINGS if key in tensors]
    v1_0, umt5, *_ = _OTHER_MODELS
    if found and _T5_ANCHOR in tensors and v1_0 not in tensors and umt5 not in tensors:
        return found
    raise _another_model(
        tensors, f"{what} is not a T5 v1.1 encoder: expected tensors {_T5_EMBEDDINGS[0]} and {_T5_ANCHOR}"
    )


def _another_model(tensors: Mapping[str, TensorInfo], expected: str) -> CheckpointError:
    looks_like = next((model for key, model in _OTHER_MODELS.items() if key in tensors), None)
    found = f"the tensors of {looks_like}" if looks_like else ", ".join(sorted(tensors)[:5]) or "no tensors"
    return CheckpointError(f"{expected}, found {found}.")
