"""The keys of HF transformers' CLIP text models, and where they go in the parameter tree.

Reference: the state dicts of transformers `CLIPTextModel`, `CLIPTextModelWithProjection` and `CLIPModel`.
transformers 5.6 and later writes a fresh `CLIPTextModel` without the `text_model.` prefix; both spellings
are read. A torch `Linear.weight` is [out, in], a Flax kernel its transpose; nothing else is transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from clip_jax.config import ClipTextConfig
from clip_jax.convert.safetensors import TensorInfo
from clip_jax.errors import CheckpointError
from clip_jax.params.shapes import check_shapes, list_faults, param_shapes

_ANCHOR = "embeddings.token_embedding.weight"
# Flax leaf -> torch name, and whether it is transposed.
_LEAVES = {
    "kernel": ("weight", True),
    "scale": ("weight", False),
    "embedding": ("weight", False),
    "bias": ("bias", False),
}

# Known to have no part in the text model: named, so that anything else left over is an error.
_IGNORED = re.compile(r"(.*\.)?position_ids|logit_scale|vision_model\..*|visual_projection\.weight")
_READABLE = ("float16", "bfloat16", "float32")

# What other models' state dicts are recognised by, for the message.
_OTHER_MODELS = {
    "encoder.block.0.layer.0.SelfAttention.q.weight": "a T5 encoder",
    "transformer.resblocks.0.attn.in_proj_weight": "an OpenCLIP model",
    "model.diffusion_model.input_blocks.0.0.weight": "a single-file SD checkpoint",
    "vision_model.embeddings.patch_embedding.weight": "a CLIP image encoder",
    "down_blocks.0.resnets.0.conv1.weight": "a diffusers UNet",
    "encoder.conv_in.weight": "a diffusers VAE",
    "embeddings.word_embeddings.weight": "a BERT model",
}


def map_keys(
    tensors: Mapping[str, TensorInfo], config: ClipTextConfig, what: str, *, source_blocks: int | None = None
) -> tuple[dict[str, tuple[str, bool]], list[str]]:
    """Pairs every parameter with its source tensor, one to one.

    Args:
        tensors: What the source holds.
        config: The architecture to fill. With `projection_dim` None, `text_projection.weight` is left aside.
        what: The source, for messages.
        source_blocks: How many blocks the source has; those that `config` has no use for are left aside.

    Returns:
        Parameter path -> (source key, whether to transpose); and the source keys ignored by name.

    Raises:
        CheckpointError: Another model, or tensors that are missing, left over, of the wrong shape, or not
            floating point. All faults are reported at once.
    """
    prefix = _find_prefix(tensors, what)
    keys = {path: _hf_key(path, prefix) for path in param_shapes(config)}
    used = {key for key, _ in keys.values()}
    aside = [_IGNORED.pattern]
    if config.projection_dim is None:
        aside.append(r"text_projection\.weight")
    for block in range(config.num_hidden_layers, source_blocks or 0):
        aside.append(rf"{re.escape(prefix)}encoder\.layers\.{block}\..*")
    ignored = sorted(key for key in tensors if key not in used and re.fullmatch("|".join(aside), key))
    unreadable = [
        f"{key} is {tensors[key].dtype}"
        for key in used & tensors.keys()
        if tensors[key].dtype.name not in _READABLE
    ]
    if unreadable:
        raise CheckpointError(
            f"{what} holds tensors of dtypes that are not read: expected one of {', '.join(_READABLE)}. "
            + " ".join(list_faults("found", unreadable))
        )
    leftover = tensors.keys() - used - set(ignored)
    found = {key: tensors[key].shape for key in used & tensors.keys()} | {
        k: tensors[k].shape for k in leftover
    }
    expected = {
        key: shape[::-1] if transposed else shape
        for (key, transposed), shape in zip(keys.values(), param_shapes(config).values(), strict=True)
    }
    check_shapes(expected, found, what)
    return keys, ignored


def to_flax(array: np.ndarray, transposed: bool) -> np.ndarray:
    """A source tensor in the layout of its parameter; a view."""
    return array.T if transposed else array


def _hf_key(path: str, prefix: str) -> tuple[str, bool]:
    module, _, leaf = path.rpartition("/")
    name, transposed = _LEAVES[leaf]
    key = f"{module.replace('/', '.')}.{name}"
    if key.startswith("text_model."):
        key = prefix + key.removeprefix("text_model.")
    return key, transposed


def _find_prefix(tensors: Mapping[str, TensorInfo], what: str) -> str:
    for prefix in ("text_model.", ""):
        if prefix + _ANCHOR in tensors:
            return prefix
    looks_like = next((model for key, model in _OTHER_MODELS.items() if key in tensors), None)
    raise CheckpointError(
        f"{what} is not a CLIP text model: expected a tensor text_model.{_ANCHOR} or {_ANCHOR}, "
        + (
            f"found the tensors of {looks_like}."
            if looks_like
            else f"found {', '.join(sorted(tensors)[:5]) or 'no tensors'}."
        )
    )
