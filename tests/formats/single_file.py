"""Single-file checkpoints of whole pipelines, as LDM and sgm lay them out."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tests.formats.files import write_lightning
from tests.formats.layout import HF, ONE, OPEN_CLIP, REST, REST_COUNTS, Layout, saved
from tests.formats.model import SD2_H, State, model, used
from tests.formats.names import below, open_clip, unprefixed

L, H, G = map(model, ("clip_l", "clip_h", "clip_g"))
POSITION_IDS = {"text_model.embeddings.position_ids": np.arange(77)[None]}
TRANSFORMER, MODEL = "cond_stage_model.transformer.", "cond_stage_model.model."
LOW, HIGH = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


def sd1(state: State, *, prefix: str = TRANSFORMER, **changed: Any) -> Layout:
    layout = Layout(
        family="sd15",
        files=saved({**below(prefix, state), **REST}),
        names={"clip_l": f"{HF}, below {prefix!r}"},
        ignored=REST_COUNTS,
    )
    return dataclasses.replace(layout, **changed)


def sd2(state: State, *, prefix: str = MODEL, ignored: int = 1, aside: int = 13, **options: Any) -> Layout:
    """With the position ids that WD 1.4 has at an odd place; of the last block, 12 names and the projection."""
    position_ids = below(f"{prefix}transformer.", POSITION_IDS)
    return Layout(
        family="sd21",
        files=saved({**below(prefix, state), **position_ids, **REST}),
        names={"clip_h": f"{OPEN_CLIP}, below {prefix!r}"},
        ignored={**REST_COUNTS, f"{prefix.partition('.')[0]}.": ignored + 1},
        aside={"clip_h": aside},
        options=options,
    )


def sdxl(bigg: State, *, ignored: int = 0) -> Layout:
    return Layout(
        family="sdxl",
        files=saved({**below(LOW, L), **below(HIGH, bigg), **REST}),
        names={"clip_l": f"{HF}, below {LOW!r}", "clip_g": f"{OPEN_CLIP}, below {HIGH!r}"},
        ignored={**REST_COUNTS, **({"conditioner.": ignored} if ignored else {})},
    )


def as_linear(bigg: State) -> State:
    """The projection as that of a Linear, among OpenCLIP's names."""
    rest = {name: array for name, array in bigg.items() if name != "text_projection"}
    return {**rest, "text_projection.weight": bigg["text_projection"].T}


def single_files() -> dict[str, Layout]:
    bigg = open_clip(G)
    whole_h = {**open_clip(H), "logit_scale": ONE}
    # kohya's scripts write what SD 2 lacks: a copy of the block before it, and ones.
    last = "transformer.resblocks.2."
    copies = {n: whole_h[n.replace(last, "transformer.resblocks.1.")] for n in whole_h if n.startswith(last)}
    dummies = {**whole_h, **copies, "text_projection": np.ones((24, 24), np.float32)}
    trained = below("module.", {**below(LOW, L), **below(HIGH, bigg)})
    below_refiner = "conditioner.embedders.0.model."
    return {
        "SD 1": sd1(L),
        "SD 1 with position_ids": sd1({**L, **POSITION_IDS}, aside={"clip_l": 1}),
        "SD 1 without text_model.": sd1(unprefixed(L)),
        "SD 1, Lightning": sd1(
            L,
            files=saved({**below(TRANSFORMER, L), **REST}, write=write_lightning),
            format="single file, PyTorch zip",
        ),
        "SD 1, state_dict in the names": sd1(L, prefix=f"state_dict.{TRANSFORMER}"),
        "SD 2": sd2(whole_h),
        "SD 2 exported from diffusers": sd2(open_clip(used("clip_h")), ignored=0, aside=0, config={"clip_h": SD2_H}),
        "SD 2 exported by kohya": sd2(dummies),
        "SD 2, sgm": sd2(whole_h, prefix=below_refiner),
        "SDXL": sdxl({**bigg, "logit_scale": ONE}, ignored=1),
        "SDXL with position_ids": sdxl({**bigg, **below("transformer.", POSITION_IDS)}, ignored=1),
        "SDXL, projection as a Linear (Playground)": sdxl(as_linear(bigg)),
        "SDXL, trained by DistributedDataParallel": Layout(
            family="sdxl",
            files=saved(trained),
            names={"clip_l": f"{HF}, below 'module.{LOW}'", "clip_g": f"{OPEN_CLIP}, below 'module.{HIGH}'"},
        ),
        "SDXL refiner": Layout(
            family="sdxl_refiner",
            files=saved({**below(below_refiner, {**bigg, "logit_scale": ONE}), **REST}),
            names={"clip_g": f"{OPEN_CLIP}, below {below_refiner!r}"},
            ignored={**REST_COUNTS, "conditioner.": 1},
        ),
    }
