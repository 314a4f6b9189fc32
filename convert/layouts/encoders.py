"""Finds the text encoders in a state dict, by names that only they have; the names of files play no part.

A single-file checkpoint holds one to three of them, each below a prefix of its own: `cond_stage_model.` (SD 1, SD 2),
`conditioner.embedders.0.` (SDXL), `text_encoders.clip_l.` (SD 3, FLUX as ComfyUI saves it), or none.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from clip_jax.convert.layouts import flax, gguf_t5, open_clip
from clip_jax.convert.layouts.fp8 import dequantised
from clip_jax.convert.state import StateDict, Tensor
from clip_jax.errors import CheckpointError, ClipJaxError

#: How `text_projection` is stored: by its name, or as [D, P], or as [P, D]. It is square, so its shape cannot tell.
Projection = Literal["auto", "as_is", "transpose"]

_CLIP = re.compile(r"(?P<root>(?:.*\.)?)embeddings\.token_embedding\.weight")
_T5 = re.compile(r"(?P<root>(?:.*\.)?)encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight")
_UNPREFIXED = re.compile(r"(embeddings|encoder|final_layer_norm)\..*")
_WEIGHT, _BARE = "text_projection.weight", "text_projection"


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """One text encoder of a source. Equal to itself only.

    Attributes:
        kind: What it is.
        layout: Whose names it has in the source, for people.
        prefix: What stands before them there.
        state: Its tensors under transformers' names: `text_model.*` and `text_projection.weight` [P, D], or
            `shared.weight` and `encoder.*`. What has no place in the encoder is still there.
    """

    kind: Literal["clip", "t5"]
    layout: str
    prefix: str
    state: StateDict


def check_projection(mode: str) -> None:
    """Refuses what is no way to read `text_projection`.

    Raises:
        ClipJaxError: Not one of "auto", "as_is" and "transpose".
    """
    if mode not in ("auto", "as_is", "transpose"):
        raise ClipJaxError(f"text_projection must be auto, as_is or transpose, found {mode!r}.")


def find_encoders(
    state: StateDict, where: str, projection: Projection = "auto", metadata: Mapping[str, Any] = MappingProxyType({})
) -> list[Encoder]:
    """The text encoders in a state dict, in the order of their prefixes; none if there are none.

    Args:
        state: Names as in the source.
        where: The source, for messages.
        projection: How `text_projection` is stored.
        metadata: What the source says about itself, among it perhaps how it is quantised.

    Raises:
        CheckpointError: A variant of a text encoder that computes something else, or quantised in another way than
            `fp8.py` knows.
    """
    layout, is_flax = "transformers", flax.is_flax(state)
    if is_flax:
        layout, state = "Flax", flax.as_hf(state)
    elif gguf_t5.is_gguf_t5(state):
        layout, state = "llama.cpp", gguf_t5.as_hf(state)
    found = []
    for root in open_clip.roots(state):
        tensors = open_clip.as_hf(dequantised(state, root, metadata, where), where)
        found.append(Encoder("clip", "OpenCLIP", root, _with_projection(tensors, None, is_flax, projection)))
    for root in _roots(_CLIP, state):
        above = root.removesuffix("text_model.")
        named = dequantised(state, above, metadata, where)
        tensors = {f"text_model.{n}" if _UNPREFIXED.fullmatch(n) else n: t for n, t in named.items()}
        # Stable Cascade and old ComfyUI files keep it beside `transformer.`, not below it.
        beside = state.get(above.removesuffix("transformer.") + _BARE) if above.endswith("transformer.") else None
        found.append(Encoder("clip", layout, above, _with_projection(tensors, beside, is_flax, projection)))
    for root in _roots(_T5, state):
        found.append(Encoder("t5", layout, root, dequantised(state, root, metadata, where)))
    return sorted(found, key=lambda encoder: encoder.prefix)


def _roots(anchor: re.Pattern[str], state: StateDict) -> list[str]:
    return [match["root"] for match in map(anchor.fullmatch, state) if match]


def _with_projection(
    tensors: StateDict, beside: Tensor | None, is_flax: bool, projection: Projection
) -> dict[str, Tensor]:
    """The same, with the projection as `text_projection.weight` [P, D], if there is one.

    By its name, a bare `text_projection` is a parameter [D, P], used as `x @ text_projection` (OpenCLIP, sgm), and
    `text_projection.weight` that of a Linear, [P, D] (transformers). Flax's kernel is [D, P].
    """
    rest = {name: tensor for name, tensor in tensors.items() if name not in (_WEIGHT, _BARE)}
    if _WEIGHT in tensors:
        stored, by_name = (tensors[_WEIGHT].transposed(), "as_is") if is_flax else (tensors[_WEIGHT], "transpose")
    elif _BARE in tensors:
        stored, by_name = tensors[_BARE], "as_is"
    elif beside is not None:
        stored, by_name = beside, "as_is"
    else:
        return rest
    as_is = (by_name if projection == "auto" else projection) == "as_is"
    return {**rest, _WEIGHT: stored.transposed() if as_is else stored}


def one_encoder(
    state: StateDict, where: str, projection: Projection = "auto", metadata: Mapping[str, Any] = MappingProxyType({})
) -> Encoder:
    """The text encoder in the state dict of a component; arguments and errors as in `find_encoders`.

    Raises:
        CheckpointError: There is none, or several.
    """
    found = find_encoders(state, where, projection, metadata)
    if len(found) != 1:
        raise CheckpointError(f"{where}: expected one text encoder, found {_listed(found) or what_else(state)}.")
    return found[0]


def _listed(encoders: list[Encoder]) -> str:
    return " and ".join(f"{encoder.kind} at {encoder.prefix!r}" for encoder in encoders)


# What other state dicts are recognised by, for the message.
_OTHERS = {
    r".*\.weight\._(data|scale)": "a model quantised by quanto, which is not read",
    r"(.*\.)?transformer\.(embeddings|encoder|shared)\..*word_embeddings.*": "an OpenCLIP model around another encoder",
    r"model\.diffusion_model\..*": "a diffusion model without text encoders",
    r"(.*\.)?double_blocks\..*": "FLUX's transformer without text encoders",
    r"(.*\.)?joint_blocks\..*": "SD 3's transformer without text encoders",
    r"(.*\.)?vision_model\..*|visual\..*": "a CLIP image encoder",
    r"(down_blocks|mid_block|up_blocks)\..*": "a diffusers UNet",
    r"(encoder|decoder)\.conv_in\..*": "a VAE",
    r"lora_.*|.*\.lora_.*": "a LoRA",
    r"(.*\.)?embeddings\.word_embeddings\.weight": "a BERT model",
    r"(.*\.)?(model|language_model)\.layers\..*|blk\.\d+\..*": "a decoder-only language model",
    r"(.*\.)?(single_)?transformer_blocks\..*": "a diffusion transformer",
}


def what_else(state: StateDict) -> str:
    """What a state dict without a text encoder is, as far as its names tell."""
    for pattern, what in _OTHERS.items():
        if any(re.fullmatch(pattern, name) for name in state):
            return f"the tensors of {what}"
    return f"{len(state)} tensors: {', '.join(sorted(state)[:5])}" if state else "no tensors"
