"""Diffusion model families as frozen data. A new one is a file in this folder and a name in this list."""

from clip_jax.families.base import Family as Family
from clip_jax.families.base import Tower as Tower
from clip_jax.families.sd15 import SD15
from clip_jax.families.sd21 import SD21

FAMILIES: dict[str, Family] = {family.name: family for family in (SD15, SD21)}
