"""Stable Diffusion 1.x: CLIP-L, last layer with final LayerNorm; [2, 77, 768].

Reference: diffusers `pipeline_stable_diffusion.py`, `StableDiffusionPipeline.encode_prompt`.
"""

from clip_jax.config import ClipTextConfig
from clip_jax.families.base import Family, Tower

# Those that SD 1.x and 2.x share; the text encoder tells the two apart. With the Flax classes that diffusers had.
STABLE_DIFFUSION_PIPELINES = frozenset(
    f"{name}Pipeline"
    for name in """
    StableDiffusion StableDiffusionImg2Img StableDiffusionInpaint StableDiffusionDepth2Img StableDiffusionUpscale
    StableDiffusionControlNet StableDiffusionControlNetImg2Img StableDiffusionControlNetInpaint
    StableDiffusionControlNetPAG StableDiffusionControlNetPAGInpaint StableDiffusionControlNetXS
    StableDiffusionPAG StableDiffusionPAGImg2Img StableDiffusionPAGInpaint
    StableDiffusionAdapter StableDiffusionAttendAndExcite StableDiffusionDiffEdit StableDiffusionGLIGEN
    StableDiffusionGLIGENTextImage StableDiffusionLDM3D StableDiffusionModelEditing StableDiffusionPanorama
    StableDiffusionParadigms StableDiffusionPix2PixZero StableDiffusionSAG StableUnCLIP StableUnCLIPImg2Img
    AnimateDiff AnimateDiffControlNet AnimateDiffPAG AnimateDiffSparseControlNet PIA
    TextToVideoSD TextToVideoZero VideoToVideoSD
    CycleDiffusion LatentConsistencyModel LatentConsistencyModelImg2Img
    FlaxStableDiffusion FlaxStableDiffusionImg2Img FlaxStableDiffusionInpaint FlaxStableDiffusionControlNet
    """.split()
)

SD15 = Family(
    name="sd15",
    title="Stable Diffusion 1.x",
    pipelines=STABLE_DIFFUSION_PIPELINES,
    towers=(Tower(name="clip_l", config=ClipTextConfig.sd15()),),
)
