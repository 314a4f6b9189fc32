"""Diffusion model families as frozen data. A new one is a file in this folder and a name in this list."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from clip_jax.errors import CheckpointError
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

if TYPE_CHECKING:
    from clip_jax.params.checkpoint import CheckpointMetadata

FAMILIES: dict[str, Family] = {family.name: family for family in (SD15, SD21, SDXL, SDXL_REFINER, SD3, FLUX)}


def stored_family(metadata: CheckpointMetadata, path: Path, without: Iterable[str] = ()) -> Family:
    """The family of a checkpoint at `path`, around the architectures that it has, less some towers.

    Raises:
        CheckpointError: There is none of that name.
        ClipJaxError: It does not work without these towers.
    """
    if metadata.family not in list(FAMILIES):  # of a damaged file it may be anything
        raise CheckpointError(
            f"{path} is of family {metadata.family!r}, unknown to this clip_jax. Upgrade clip-jax-text."
        )
    whole = dataclasses.replace(FAMILIES[metadata.family], zero_negative=metadata.zero_negative)
    absent = {tower.name for tower in whole.towers} - metadata.configs.keys()
    return whole.without(absent.union(without)).with_configs(metadata.configs)
