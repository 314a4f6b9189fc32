"""Which family the text encoders of a folder are."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.convert.components import Component, Components, width
from clip_jax.errors import CheckpointError
from clip_jax.families import FAMILIES, Family, Tower


def find_family(path: Path, found: Components, name: str | None) -> Family:
    """The family called `name`, or else the one that the text encoders fit.

    Where several fit, as is so for scaled-down models, the one with just their widths is taken.

    Raises:
        CheckpointError: None fits, or several; says why not.
    """
    pipeline = str(found.index.get("_class_name", ""))
    hinted = [family for family in FAMILIES.values() if pipeline in family.pipelines]
    if pipeline and not hinted and name is None:
        raise CheckpointError(
            f"{path} is a {pipeline}, of which it is not known what it takes of its text encoders; expected a pipeline "
            f"of one of the families {', '.join(FAMILIES)}. If it takes the same as one of these, pass family= "
            f"(--family); the classes of clip_jax.compat read its text encoders one by one."
        )
    candidates = [family_called(name)] if name else hinted or list(FAMILIES.values())
    mismatches = {family.name: _mismatch(family, found) for family in candidates}
    fitting = [family for family in candidates if mismatches[family.name] is None]
    if len(fitting) > 1:
        fitting = [family for family in fitting if _same_widths(family, found)] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(family.name for family in fitting)
        raise CheckpointError(f"{path} could be of any of the families {names}. Pass family= (--family).")
    reasons = "; ".join(f"{family}: {reason}" for family, reason in mismatches.items())
    if name:
        raise CheckpointError(f"{path} is not of family {reasons}.")
    raise CheckpointError(f"{path} is of no known family ({reasons}).")


# CLIP-L and bigG are SDXL's, or SD 3's without T5; in a single-file checkpoint the prefix tells which. Training may
# have put another prefix before it (`module.`, `_orig_mod.`).
_PREFIXES = {r"(.*\.)?conditioner\..*": "sdxl", r"(.*\.)?text_encoders\..*": "sd3"}


def find_family_of(
    where: str, configs: Mapping[str, TowerConfig], prefixes: Collection[str], name: str | None
) -> Family:
    """The family called `name`, or else the one that these towers, from files of weights, make up.

    Args:
        where: The source, for messages.
        configs: Tower name -> architecture.
        prefixes: What stands before the towers' names in their files.
        name: The family, if it was said.

    Raises:
        CheckpointError: None fits, or several; says why not.
    """
    candidates = [family_called(name)] if name else list(FAMILIES.values())
    fitting = [
        family
        for family in candidates
        if {tower.name for tower in family.towers if not tower.optional}
        <= configs.keys()
        <= {tower.name for tower in family.towers}
    ]
    hinted = {_PREFIXES[pattern] for pattern in _PREFIXES if any(re.fullmatch(pattern, prefix) for prefix in prefixes)}
    if len(fitting) > 1:
        fitting = [family for family in fitting if family.name in hinted] or fitting
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(configs) or "no text encoder"
    if found == "t5" and not fitting:
        found += " alone (which clip_jax.compat.FlaxT5EncoderModel reads, from a folder of transformers)"
    if fitting:
        raise CheckpointError(
            f"{where} holds {found}, which could be of any of the families {', '.join(f.name for f in fitting)}. Pass "
            f"family= (--family)."
        )
    needs = "; ".join(f"{f.name}: {', '.join(tower.name for tower in f.towers)}" for f in candidates)
    raise CheckpointError(
        f"{where} holds {found}; expected the text encoders of a family ({needs}). Name the files of all of them."
    )


def folders_of(without: Collection[str]) -> set[str]:
    """The folders of the towers that are to be left out, of any family that can do without them."""
    towers = [tower for family in FAMILIES.values() for tower in family.towers]
    return {tower.folder for tower in towers if tower.optional and tower.name in without}


def family_called(name: str) -> Family:
    """The family called `name`.

    Raises:
        CheckpointError: There is none; lists those there are.
    """
    if name not in FAMILIES:
        raise CheckpointError(f"Unknown family {name!r}; expected one of {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def _mismatch(family: Family, found: Components) -> str | None:
    """Why these text encoders cannot be those of `family`; None if they can."""
    folders = {tower.folder for tower in family.towers}
    needed = {tower.folder for tower in family.towers if not tower.optional}
    names = found.components.keys()
    alone = names == {""} and len(needed) == 1
    if not alone and not needed <= names <= folders:
        there = ", ".join(filter(None, names)) or "one text encoder"
        return f"expected {', '.join(sorted(folders))}, found {there}"
    for tower in family.towers:
        component = found.components.get("" if alone else tower.folder)
        reason = component and _tower_mismatch(tower, component)
        if reason:
            return reason
    return None


def _tower_mismatch(tower: Tower, component: Component) -> str | None:
    config, where = component.config, component.folder.name
    if type(config) is not type(tower.config):
        return f"{where}: expected {_kind(tower.config)} ({tower.name}), found {_kind(config)}"
    known = {width(t.config): t.name for f in FAMILIES.values() for t in f.towers}
    if width(config) != width(tower.config) and width(config) in known:
        whose = known[width(config)]
        return f"{where}: expected width {width(tower.config)} ({tower.name}), found {width(config)}, that of {whose}"
    if _projects(tower.config) and not _projects(config):
        return f"{where}: expected a CLIPTextModelWithProjection ({tower.name}), found a CLIPTextModel"
    return None


def _same_widths(family: Family, found: Components) -> bool:
    return all(
        width(component.config) == width(tower.config)
        for tower in family.towers
        for name, component in found.components.items()
        if name in ("", tower.folder)
    )


def _projects(config: TowerConfig) -> bool:
    return isinstance(config, ClipTextConfig) and config.projection_dim is not None


def _kind(config: TowerConfig) -> str:
    return "a CLIP text model" if isinstance(config, ClipTextConfig) else "a T5 encoder"
