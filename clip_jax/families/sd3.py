"""Stable Diffusion 3 and 3.5: CLIP-L and bigG side by side, padded with zeros to T5's width, then T5's rows.

[2, 77 + S, 4096] with S = `max_sequence_length`, 256 by default; pooled [2, 2048] is both projected rows. Without
T5 its rows are zeros. The negative prompt is encoded even where none is given.
Reference: diffusers `pipeline_stable_diffusion_3.py`, `StableDiffusion3Pipeline.encode_prompt`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from clip_jax.config import ClipTextConfig, T5EncoderConfig
from clip_jax.families.base import Family, Joined, Tower, TowerOutput
from clip_jax.families.sdxl import CLIP_G, CLIP_L

# `joint_attention_dim` of the transformer, to which rows of zeros are made where T5 is left out.
_JOINT_DIM = 4096


def _join(outputs: Mapping[str, TowerOutput], max_sequence_length: int | None) -> Joined:
    clip_l, clip_g, t5 = outputs["clip_l"], outputs["clip_g"], outputs.get("t5")
    clip = jnp.concatenate([clip_l.embeds, clip_g.embeds], axis=-1)
    zeros = jnp.zeros((*clip.shape[:2], max_sequence_length, _JOINT_DIM), clip.dtype)
    t5_rows = zeros if t5 is None else t5.embeds
    clip = jnp.pad(clip, [(0, 0)] * 3 + [(0, t5_rows.shape[-1] - clip.shape[-1])])
    embeds = jnp.concatenate([clip, t5_rows], axis=-2)
    pooled_l = clip_l.pooled if clip_l.projected is None else clip_l.projected
    return embeds, jnp.concatenate([pooled_l, clip_g.projected], axis=-1)


T5 = Tower(
    name="t5",
    config=T5EncoderConfig.xxl(),
    folder="text_encoder_3",
    tokenizer_folder="tokenizer_3",
    pad_token="<pad>",
    prompt="prompt_3",
    optional=True,
)

SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    pipelines=frozenset(
        f"StableDiffusion3{task}Pipeline"
        for task in ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpainting", "PAG", "PAGImg2Img")
    ),
    towers=(
        dataclasses.replace(
            CLIP_L,
            config=dataclasses.replace(ClipTextConfig.sd15(), projection_dim=768),
            identity_projection=True,
        ),
        CLIP_G,
        T5,
    ),
    max_sequence_length=256,
    join=_join,
)
