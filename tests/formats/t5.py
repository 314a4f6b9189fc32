"""T5 in all its files, and several files that make up a family."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from tests.formats.files import write_gguf, write_safetensors
from tests.formats.layout import HF, ONE, OPEN_CLIP, Layout, saved
from tests.formats.model import State, model
from tests.formats.names import below, llama_cpp, open_clip, with_both_embeddings
from tests.formats.values import (
    FLOAT8,
    cast,
    comfy_2024,
    comfy_2025,
    comfy_header,
    is_quantisable,
    q8_0,
    scaled,
    widened,
)

L, G, T5 = map(model, ("clip_l", "clip_g", "t5"))


def t5_layouts() -> dict[str, Layout]:
    """T5 files, each beside a CLIP-L: together they are FLUX's."""

    def flux(t5: State, values: State = T5, dtypes: set[str] | None = None, names: str = HF, **changed: Any) -> Layout:
        fields = {
            "family": "flux",
            "files": saved(L, t5),
            "names": {"clip_l": HF, "t5": names},
            "format": "2 files, safetensors",
            "values": {"t5": values},
            "dtypes": {"t5": dtypes or {"float32"}},
        }
        return Layout(**(fields | changed))

    by_row, by_tensor, quantised = scaled(T5, by_row=True), scaled(T5), {"bfloat16", "float16"}
    half, eighth = cast(T5, np.float16), cast(T5, FLOAT8)
    other = {name if name != "shared.weight" else "encoder.embed_tokens.weight": array for name, array in T5.items()}
    decoder = {"decoder.final_layer_norm.weight": np.ones(96, np.float32), "lm_head.weight": T5["shared.weight"]}
    header = comfy_header(by_row)
    layouts = {
        "T5": flux(T5),
        "T5, whole": flux({**T5, **decoder}, aside={"t5": 2}),
        "T5, embed_tokens alone": flux(other),
        "t5xxl_fp16": flux(with_both_embeddings(half), half, {"float16"}, aside={"t5": 1}),
        "t5xxl_fp8_e4m3fn": flux(with_both_embeddings(eighth), widened(eighth), {"bfloat16"}, aside={"t5": 1}),
        "t5xxl_fp8_e4m3fn_scaled": flux(
            with_both_embeddings(comfy_2024(by_tensor)), by_tensor.values, quantised, aside={"t5": 1}
        ),
        "scaled float8, a scale a row (2024)": flux(comfy_2024(by_row), by_row.values, quantised),
        "scaled float8 (2025)": flux(comfy_2025(by_tensor), by_tensor.values, quantised),
        "scaled float8, a scale a row (2025)": flux(comfy_2025(by_row), by_row.values, quantised),
        "scaled float8, told by the header": flux(
            {},
            by_row.values,
            quantised,
            files=lambda folder: [
                write_safetensors(folder / "0.weights", L),
                write_safetensors(folder / "1.weights", comfy_2025(by_row, in_header=True), header),
            ],
        ),
        "T5 not stripped of its prefix": flux(
            {**below("t5xxl.transformer.", T5), "t5xxl.logit_scale": ONE},
            names=f"{HF}, below 't5xxl.transformer.'",
            ignored={"t5xxl.": 1},
        ),
        "CLIP-L and T5, neither stripped of its prefix": Layout(
            family="flux",
            files=saved(
                {**below("text_encoders.clip_l.transformer.", L), "text_encoders.clip_l.logit_scale": ONE},
                {**below("text_encoders.t5xxl.transformer.", T5), "text_encoders.t5xxl.logit_scale": ONE},
            ),
            names={
                "clip_l": f"{HF}, below 'text_encoders.clip_l.transformer.'",
                "t5": f"{HF}, below 'text_encoders.t5xxl.transformer.'",
            },
            format="2 files, safetensors",
            ignored={"text_encoders.": 2},
        ),
        "CLIP and T5 of SD 3": Layout(
            family="sd3",
            files=saved(T5, G, L),
            names={"clip_l": HF, "clip_g": HF, "t5": HF},
            format="3 files, safetensors",
        ),
        "clip_l and clip_g, said to be SDXL's": Layout(
            family="sdxl",
            files=saved(L, open_clip(G)),
            names={"clip_l": HF, "clip_g": OPEN_CLIP},
            format="2 files, safetensors",
            options={"family": "sdxl"},
        ),
    }
    for kind, value in (
        ("F32", lambda array: array),
        ("F16", lambda array: array.astype(np.float16)),
        ("BF16", lambda array: array.astype(ml_dtypes.bfloat16)),
        ("Q8_0", q8_0),
    ):
        values = {name: value(array) if is_quantisable(array) else array for name, array in T5.items()}
        kept = {"F32": "float32", "F16": "float16"}.get(kind, "bfloat16")
        for names, state in (("llama.cpp", llama_cpp(T5)), (HF, T5)):
            layouts[f"GGUF {kind}, names of {names}"] = flux(
                {},
                values,
                {kept, "float32"},
                names,
                files=lambda folder, state=state, kind=kind: [
                    write_safetensors(folder / "0.weights", L),
                    write_gguf(folder / "1.weights", state, kind),
                ],
                format="2 files, safetensors, GGUF",
            )
    return layouts
