"""The keys of HF transformers' text encoders, and where they go in the parameter tree.

Reference: the state dicts of transformers `CLIPTextModel`, `CLIPTextModelWithProjection`, `CLIPModel` and
`T5EncoderModel`. A torch `Linear.weight` is [out, in], a Flax kernel its transpose; nothing else is transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.convert.state import StateDict
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

_READABLE = ("float16", "bfloat16", "float32", "float64")

_T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")

# Known to have no part in the text encoder: named, so that anything else left over is an error. `spiece_model` is T5's
# tokenizer, where ComfyUI saves it.
_CLIP_IGNORED = r"(.*\.)?position_ids|logit_scale|vision_model\..*|visual_projection\.weight"
_T5_IGNORED = r"decoder\..*|lm_head\.weight|logit_scale|spiece_model"

# Other architectures under T5's names.
_OTHER_T5 = {
    "encoder.block.0.layer.1.DenseReluDense.wi.weight": "a T5 v1.0, which is not gated (T5 v1.1 is)",
    "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": "a UMT5 (a position bias in each block)",
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


def map_keys(state: StateDict, config: TowerConfig, what: str, *, source_blocks: int | None = None) -> KeyMap:
    """Pairs every parameter with its source tensor.

    Args:
        state: The text encoder under transformers' names, those of CLIP with `text_model.`
        config: The architecture to fill. For CLIP with `projection_dim` None, `text_projection.weight` is left
            aside.
        what: The source, for messages.
        source_blocks: How many blocks the source has; those that `config` has no use for are left aside.

    Raises:
        CheckpointError: Another model, or tensors that are missing, left over, of the wrong shape, or not
            floating point. All faults are reported at once.
    """
    if isinstance(config, ClipTextConfig):
        aside = [_CLIP_IGNORED, *([r"text_projection\.weight"] if config.projection_dim is None else [])]
        blocks = range(config.num_hidden_layers, source_blocks or 0)
        aside += [rf"text_model\.encoder\.layers\.{block}\..*" for block in blocks]
        rename: dict[str, str] = {}
        twins: list[tuple[str, str]] = []
    else:
        embeddings = find_t5_embeddings(state, what)
        rename = {"shared.weight": embeddings[0]}
        aside = [_T5_IGNORED, *map(re.escape, embeddings[1:])]
        twins = [(embeddings[0], other) for other in embeddings[1:]]

    keys = {}
    for path in param_shapes(config):
        key, transposed = hf_key(path)
        keys[path] = (rename.get(key, key), transposed)
    used = {key for key, _ in keys.values()}
    ignored = sorted(key for key in state if key not in used and re.fullmatch("|".join(aside), key))
    unreadable = [
        f"{state[key].key} is {state[key].stored or state[key].dtype}"
        for key in used & state.keys()
        if state[key].dtype.name not in _READABLE
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
    check_shapes(expected, {key: state[key].shape for key in state.keys() - set(ignored)}, what)
    return KeyMap(keys, sorted({state[key].key for key in ignored}), twins)


def to_flax(array: np.ndarray, transposed: bool) -> np.ndarray:
    """A source tensor in the layout of its parameter; a view."""
    return array.T if transposed else array


def hf_key(path: str) -> tuple[str, bool]:
    """What transformers calls a parameter, and whether it is its transpose there."""
    module, _, leaf = path.rpartition("/")
    name, transposed = _LEAVES[leaf]
    return f"{module.replace('/', '.')}.{name}", transposed


def find_t5_embeddings(state: StateDict, what: str) -> list[str]:
    """The keys of the token embedding of a T5 v1.1, of which checkpoints hold either or both.

    Raises:
        CheckpointError: There is none, or the tensors are those of another T5.
    """
    other = next((model for key, model in _OTHER_T5.items() if key in state), None)
    found = [key for key in _T5_EMBEDDINGS if key in state]
    if other or not found:
        raise CheckpointError(
            f"{what} is not a T5 v1.1 encoder: expected a tensor {_T5_EMBEDDINGS[0]}, found "
            f"{f'the tensors of {other}' if other else 'none'}."
        )
    return found
