"""Stable Diffusion 2.x: OpenCLIP-H less its last block, last layer with final LayerNorm; [2, 77, 1024].

Its tokenizer pads with "!" (id 0), where SD 1.x pads with the end-of-text token.
Reference: diffusers `pipeline_stable_diffusion.py`, `StableDiffusionPipeline.encode_prompt`.
"""

from clip_jax.config import ClipTextConfig
from clip_jax.families.base import Family, Tower
from clip_jax.families.sd15 import STABLE_DIFFUSION_PIPELINES

SD21 = Family(
    name="sd21",
    title="Stable Diffusion 2.x",
    pipelines=STABLE_DIFFUSION_PIPELINES,
    towers=(Tower(name="clip_h", config=ClipTextConfig.sd21(), pad_token="!", without_last=True),),
)
