"""Stable Diffusion 1.x: CLIP-L, last layer with final LayerNorm; [2, 77, 768].

Reference: diffusers `pipeline_stable_diffusion.py`, `StableDiffusionPipeline.encode_prompt`.
"""

from clip_jax.config import ClipTextConfig
from clip_jax.families.base import Family, Tower

# The class names that SD 1.x and 2.x share; the text encoder tells the two apart.
STABLE_DIFFUSION_PIPELINES = frozenset(
    f"StableDiffusion{task}Pipeline"
    for task in ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")
)

SD15 = Family(
    name="sd15",
    title="Stable Diffusion 1.x",
    pipelines=STABLE_DIFFUSION_PIPELINES,
    towers=(Tower(name="clip_l", config=ClipTextConfig.sd15()),),
)
