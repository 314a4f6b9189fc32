"""FLUX.1: the rows of T5, [B, S, 4096], and the pooled row of CLIP-L, [B, 768], not projected; no guidance batch.

S = `max_sequence_length` is 512 by default (dev); schnell is run with 256. `text_ids` are zeros [S, 3].
Reference: diffusers `pipeline_flux.py`, `FluxPipeline.encode_prompt`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from clip_jax.config import ClipTextConfig
from clip_jax.families.base import Family, Joined, Tower, TowerOutput
from clip_jax.families.sd3 import T5


def _join(outputs: Mapping[str, TowerOutput], max_sequence_length: int | None) -> Joined:  # noqa: ARG001
    return outputs["t5"].embeds, outputs["clip_l"].pooled


FLUX = Family(
    name="flux",
    title="FLUX.1",
    pipelines=frozenset(
        f"{name}Pipeline"
        for name in """
        Flux FluxImg2Img FluxInpaint FluxFill FluxKontext FluxKontextInpaint FluxPriorRedux FluxControl
        FluxControlImg2Img FluxControlInpaint FluxControlNet FluxControlNetImg2Img FluxControlNetInpaint
        """.split()
    ),
    towers=(
        Tower(name="clip_l", config=ClipTextConfig.sd15(), pooled_only=True),
        dataclasses.replace(
            T5, folder="text_encoder_2", tokenizer_folder="tokenizer_2", prompt="prompt_2", optional=False
        ),
    ),
    guidance=False,
    max_sequence_length=512,
    text_ids=True,
    join=_join,
)
