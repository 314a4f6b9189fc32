"""Diffusion model families as frozen data. A new one is a file in this folder and a name in this list."""

from clip_jax.families.base import Family as Family
from clip_jax.families.base import Tower as Tower
from clip_jax.families.base import TowerOutput as TowerOutput
from clip_jax.families.flux import FLUX
from clip_jax.families.sd3 import SD3
from clip_jax.families.sd15 import SD15
from clip_jax.families.sd21 import SD21
from clip_jax.families.sdxl import SDXL, SDXL_REFINER
from clip_jax.families.sdxl import refiner_time_ids as refiner_time_ids
from clip_jax.families.sdxl import time_ids as time_ids

FAMILIES: dict[str, Family] = {family.name: family for family in (SD15, SD21, SDXL, SDXL_REFINER, SD3, FLUX)}
