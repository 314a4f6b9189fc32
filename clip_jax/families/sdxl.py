"""Stable Diffusion XL: penultimate layers of CLIP-L and bigG without norm, side by side; [2, 77, 2048].

Pooled is bigG's projected row, [2, 1280]. The second tokenizer pads with "!" (id 0), the first does not.
Reference: diffusers `pipeline_stable_diffusion_xl.py`, `StableDiffusionXLPipeline.encode_prompt` and
`_get_add_time_ids`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import jax.typing
import numpy as np

from clip_jax.config import ClipTextConfig
from clip_jax.errors import ClipJaxError
from clip_jax.families.base import Family, Joined, Tower, TowerOutput


def _join(outputs: Mapping[str, TowerOutput], max_sequence_length: int | None) -> Joined:  # noqa: ARG001
    embeds = jnp.concatenate([outputs["clip_l"].embeds, outputs["clip_g"].embeds], axis=-1)
    return embeds, outputs["clip_g"].projected


@jax.transfer_guard_host_to_device("allow")
def time_ids(
    original_size: tuple[int, int] = (1024, 1024),
    crops_coords_top_left: tuple[int, int] = (0, 0),
    target_size: tuple[int, int] = (1024, 1024),
    *,
    rows: int = 2,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """The size conditioning that the UNet of SDXL's base takes beside the embeddings.

    Args:
        original_size: Height and width of the training image that is asked for, in pixels.
        crops_coords_top_left: Top and left of its crop, in pixels.
        target_size: Height and width of the image to make, in pixels.
        rows: Of the batch that the UNet is given: 2B with guidance.
        dtype: Of the result.

    Returns:
        [rows, 6]: original height and width, crop top and left, target height and width.

    Raises:
        ClipJaxError: A size or a corner that is no pair.
    """
    ids = np.array([*_pair(original_size), *_pair(crops_coords_top_left), *_pair(target_size)])
    return jnp.asarray(np.tile(ids, (rows, 1)), dtype)


@jax.transfer_guard_host_to_device("allow")
def refiner_time_ids(
    original_size: tuple[int, int] = (1024, 1024),
    crops_coords_top_left: tuple[int, int] = (0, 0),
    aesthetic_score: float = 6.0,
    negative_aesthetic_score: float = 2.5,
    *,
    rows: int = 2,
    guidance: bool = True,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """The size and score conditioning that the UNet of SDXL's refiner takes beside the embeddings.

    Args:
        original_size: Height and width of the training image that is asked for, in pixels.
        crops_coords_top_left: Top and left of its crop, in pixels.
        aesthetic_score: How good the image is to be, for the prompts.
        negative_aesthetic_score: The same for the negative prompts.
        rows: Of the batch that the UNet is given: 2B with guidance.
        guidance: Whether the first half of the rows is that of the negative prompts.
        dtype: Of the result.

    Returns:
        [rows, 5]: original height and width, crop top and left, score.

    Raises:
        ClipJaxError: An odd number of rows with guidance, or a size or a corner that is no pair.
    """
    if guidance and rows % 2:
        raise ClipJaxError(f"With guidance rows must be even, a negative prompt for each prompt; found {rows}.")
    scores = [negative_aesthetic_score, aesthetic_score] if guidance else [aesthetic_score]
    ids = np.array([[*_pair(original_size), *_pair(crops_coords_top_left), score] for score in scores])
    return jnp.asarray(np.repeat(ids, rows // len(scores), axis=0), dtype)


def _pair(pixels: Iterable[int]) -> tuple[int, ...]:
    pixels = tuple(pixels)
    if len(pixels) != 2:  # the shape of an image has its channels, too
        raise ClipJaxError(f"Sizes and corners are pairs, height and width or top and left; found {pixels}.")
    return pixels


CLIP_L = Tower(name="clip_l", config=ClipTextConfig.sd15(), layer=-2, final_norm=False)
CLIP_G = Tower(
    name="clip_g",
    config=ClipTextConfig.sdxl_clip_g(),
    folder="text_encoder_2",
    tokenizer_folder="tokenizer_2",
    pad_token="!",
    prompt="prompt_2",
    layer=-2,
    final_norm=False,
)

_PIPELINES = frozenset(
    f"{name}Pipeline"
    for name in """
    StableDiffusionXL StableDiffusionXLImg2Img StableDiffusionXLInpaint StableDiffusionXLAdapter
    StableDiffusionXLControlNet StableDiffusionXLControlNetImg2Img StableDiffusionXLControlNetInpaint
    StableDiffusionXLControlNetPAG StableDiffusionXLControlNetPAGImg2Img StableDiffusionXLControlNetXS
    StableDiffusionXLControlNetUnion StableDiffusionXLControlNetUnionImg2Img StableDiffusionXLControlNetUnionInpaint
    StableDiffusionXLPAG StableDiffusionXLPAGImg2Img StableDiffusionXLPAGInpaint
    AnimateDiffSDXL TextToVideoZeroSDXL FlaxStableDiffusionXL
    """.split()
)

SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    pipelines=_PIPELINES,
    towers=(CLIP_L, CLIP_G),
    zero_negative=True,
    zero_negative_key="force_zeros_for_empty_prompt",
    join=_join,
)


def _join_refiner(outputs: Mapping[str, TowerOutput], max_sequence_length: int | None) -> Joined:  # noqa: ARG001
    return outputs["clip_g"].embeds, outputs["clip_g"].projected


SDXL_REFINER = Family(
    name="sdxl_refiner",
    title="Stable Diffusion XL refiner",
    pipelines=_PIPELINES,
    towers=(dataclasses.replace(CLIP_G, prompt="prompt"),),
    zero_negative_key="force_zeros_for_empty_prompt",
    join=_join_refiner,
)
