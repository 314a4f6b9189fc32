"""The architecture of a text encoder, from the shapes of its tensors.

Shapes do not tell a CLIP model's activation, nor its end-of-text id: these are those of the model of that width that
diffusion pipelines use. For another width the architecture has to be given.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from clip_jax.config import ClipTextConfig, T5EncoderConfig, TowerConfig
from clip_jax.convert.hf_keys import find_t5_embeddings
from clip_jax.convert.layouts import Encoder
from clip_jax.errors import CheckpointError
from clip_jax.tokenizers.files import exists, read_json

#: Width of a CLIP text model -> name of the tower, and its architecture.
CLIP_TOWERS: Mapping[int, tuple[str, ClipTextConfig]] = MappingProxyType(
    {
        config.hidden_size: (name, config)
        for name, config in {
            "clip_l": ClipTextConfig.sd15(),
            "clip_h": ClipTextConfig.sd21(),
            "clip_g": ClipTextConfig.sdxl_clip_g(),
        }.items()
    }
)

_H_BLOCKS = (23, 24)  # SD 2 does without the last, which files hold or not
_MT5_ROWS = 250112  # of the embedding; in all else an mT5 looks like a T5 v1.1

# What changes the maths of OpenCLIP's text transformer without a trace in the weights, and what CLIP has there.
_OPEN_CLIP_USUAL: Mapping[str, Any] = MappingProxyType(
    {
        "no_causal_mask": False,
        "embed_cls": False,
        "final_ln_after_pool": False,
        "pool_type": "argmax",
        "act_kwargs": None,
        "norm_kwargs": None,
    }
)

_TOKENS = "text_model.embeddings.token_embedding.weight"
_POSITIONS = "text_model.embeddings.position_embedding.weight"
_CLIP_BLOCK = re.compile(r"text_model\.encoder\.layers\.(\d+)\..*")
_T5_BLOCK = re.compile(r"encoder\.block\.(\d+)\..*")
_T5_BLOCK_0 = "encoder.block.0.layer"
_T5_QUERY = f"{_T5_BLOCK_0}.0.SelfAttention.q.weight"
_T5_BIAS = f"{_T5_BLOCK_0}.0.SelfAttention.relative_attention_bias.weight"


def name_towers(encoders: Iterable[Encoder], where: str, given: Mapping[str, TowerConfig]) -> dict[str, Encoder]:
    """Tower name -> encoder.

    Args:
        encoders: As they are in the source.
        where: The source, for messages.
        given: Tower name -> architecture, of those that shapes do not tell.

    Raises:
        CheckpointError: An encoder of a width that is not known, or two of the same; no encoder of those given.
    """
    named: dict[str, Encoder] = {}
    for encoder in encoders:
        name = "t5" if encoder.kind == "t5" else _clip_name(encoder, where, given)
        if name in named:
            raise CheckpointError(
                f"{where} holds {name} twice, at {named[name].prefix!r} and at {encoder.prefix!r}; expected it "
                f"once. Save it with one of them."
            )
        named[name] = encoder
    unused = given.keys() - named.keys()
    if unused:
        raise CheckpointError(f"{where} has no {', '.join(sorted(unused))}, for which a config was given.")
    return named


def infer_config(encoder: Encoder, where: str) -> TowerConfig:
    """The architecture of an encoder, as far as shapes tell.

    Args:
        encoder: Of a known width, if it is CLIP's.
        where: The source, for messages.

    Raises:
        CheckpointError: Tensors are missing, or those of another model.
    """
    return _t5_config(encoder, where) if encoder.kind == "t5" else _clip_config(encoder, where)


def encoder_width(encoder: Encoder, where: str) -> int:
    """The width of the residual stream, by the shape of a tensor.

    Raises:
        CheckpointError: There is no such tensor.
    """
    return _matrix(encoder, _T5_QUERY if encoder.kind == "t5" else _TOKENS, where)[1]


def with_open_clip_config(config: TowerConfig, folder: Path) -> TowerConfig:
    """The same with heads and activation of the `open_clip_config.json` of a folder, if it has one for this width.

    MetaCLIP's and DFN's models have the shapes of OpenCLIP's and OpenAI's activation, which only that file tells.

    Raises:
        CheckpointError: The file cannot be read, or tells of a text encoder that computes something else.
    """
    path = folder / "open_clip_config.json"
    if not isinstance(config, ClipTextConfig) or not exists(path):
        return config
    match read_json(path):
        case {"model_cfg": {"text_cfg": {"width": config.hidden_size, **text}, **model}}:
            other = {name: text[name] for name, usual in _OPEN_CLIP_USUAL.items() if text.get(name, usual) != usual}
            if other:
                raise CheckpointError(
                    f"{path} asks for {', '.join(f'{name}={value!r}' for name, value in other.items())}; expected "
                    f"CLIP's text transformer. It cannot be read."
                )
            heads: Any = text.get("heads", config.num_attention_heads)
            return dataclasses.replace(
                config,
                num_attention_heads=heads,
                hidden_act="quick_gelu" if model.get("quick_gelu", False) else "gelu",
            )
    return config


def blocks(encoder: Encoder) -> int:
    """How many blocks an encoder has; that they are numbered from 0 is for the comparison with the architecture."""
    pattern = _T5_BLOCK if encoder.kind == "t5" else _CLIP_BLOCK
    return len({match[1] for match in map(pattern.fullmatch, encoder.state) if match})


def _clip_name(encoder: Encoder, where: str, given: Mapping[str, TowerConfig]) -> str:
    width = encoder_width(encoder, where)
    for name, config in given.items():
        if isinstance(config, ClipTextConfig) and config.hidden_size == width:
            return name
    if width not in CLIP_TOWERS:
        known = ", ".join(f"{size} ({name})" for size, (name, _) in CLIP_TOWERS.items())
        raise CheckpointError(
            f"{where} holds a CLIP text model of width {width}; expected one of {known}. Which tower it is, and "
            f"its activation, cannot be told from the weights: say so with config={{tower: config.json}} (--config "
            f"TOWER=FILE)."
        )
    return CLIP_TOWERS[width][0]


def _clip_config(encoder: Encoder, where: str) -> ClipTextConfig:
    vocabulary, width = _matrix(encoder, _TOKENS, where)
    positions, _ = _matrix(encoder, _POSITIONS, where)
    intermediate, _ = _matrix(encoder, "text_model.encoder.layers.0.mlp.fc1.weight", where)
    projection = encoder.state.get("text_projection.weight")
    name, known = CLIP_TOWERS[width]
    expected = _H_BLOCKS if name == "clip_h" else (known.num_hidden_layers,)
    if blocks(encoder) not in expected:
        raise CheckpointError(
            f"{where}: {name} has {blocks(encoder)} blocks below {encoder.prefix!r}, expected "
            f"{' or '.join(map(str, expected))}. If the model is really like that, say so with "
            f"config={{{name!r}: config.json}} (--config {name}=FILE)."
        )
    return dataclasses.replace(
        known,
        intermediate_size=intermediate,
        num_hidden_layers=blocks(encoder),
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        projection_dim=projection.shape[0] if projection is not None and projection.shape else None,
    )


def _t5_config(encoder: Encoder, where: str) -> T5EncoderConfig:
    inner, width = _matrix(encoder, _T5_QUERY, where)
    buckets, heads = _matrix(encoder, _T5_BIAS, where)
    vocabulary, _ = _matrix(encoder, find_t5_embeddings(encoder.state, where)[0], where)
    if vocabulary == _MT5_ROWS:
        raise CheckpointError(
            f"{where} holds an mT5, by the {vocabulary} rows of its embedding; expected a T5 v1.1, which FLUX and SD 3 "
            f"were trained with."
        )
    intermediate, _ = _matrix(encoder, f"{_T5_BLOCK_0}.1.DenseReluDense.wi_0.weight", where)
    return T5EncoderConfig(
        d_model=width,
        d_kv=inner // heads,
        d_ff=intermediate,
        num_layers=blocks(encoder),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        vocab_size=vocabulary,
    )


def _matrix(encoder: Encoder, name: str, where: str) -> tuple[int, int]:
    """The shape of a matrix of an encoder.

    Raises:
        CheckpointError: It has no such tensor, or one that is no matrix.
    """
    tensor = encoder.state.get(name)
    if tensor is None or len(tensor.shape) != 2 or 0 in tensor.shape:
        found = "none" if tensor is None else f"one of shape {tensor.shape}"
        raise CheckpointError(f"{where}: expected a matrix {name} below {encoder.prefix!r}, found {found}.")
    rows, columns = tensor.shape
    return rows, columns
