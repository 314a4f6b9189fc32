"""Files of ComfyUI, whole checkpoints and single text encoders."""

from __future__ import annotations

import numpy as np

from tests.formats.files import write_safetensors
from tests.formats.layout import HF, ONE, REST, REST_COUNTS, Layout, saved
from tests.formats.model import State, model
from tests.formats.names import bare_projection, below, with_both_embeddings
from tests.formats.values import comfy_2024, comfy_2025, comfy_header, scaled

L, G, T5 = map(model, ("clip_l", "clip_g", "t5"))


def comfy_layouts() -> dict[str, Layout]:
    def encoders(*, projection: bool, **states: State) -> State:
        """As ComfyUI saves checkpoints: with a scale for every one, and a projection that CLIP-L never had."""
        out: State = {}
        for name, state in states.items():
            out |= below(f"text_encoders.{name}.transformer.", state)
            out[f"text_encoders.{name}.logit_scale"] = ONE
        if projection:
            out["text_encoders.clip_l.transformer.text_projection.weight"] = np.full((16, 16), 0.5, np.float32)
        return {**out, **REST}

    def names(**towers: str) -> dict[str, str]:
        return {tower: f"{HF}, below 'text_encoders.{name}.transformer.'" for tower, name in towers.items()}

    def counts(n: int) -> dict[str, int]:
        return {**REST_COUNTS, "text_encoders.": n}

    nf4 = {"model.diffusion_model.x.weight.quant_state.bitsandbytes__nf4": np.zeros(8, np.uint8)}
    gen1, gen2 = scaled(T5), scaled(T5)
    return {
        "SD 3 with text encoders": Layout(
            family="sd3",
            files=saved(encoders(projection=False, clip_l=L, clip_g=G, t5xxl=T5)),
            names=names(clip_l="clip_l", clip_g="clip_g", t5="t5xxl"),
            ignored=counts(3),
        ),
        "SD 3 saved by ComfyUI": Layout(
            family="sd3",
            files=saved(encoders(projection=True, clip_l=L, clip_g=G, t5xxl=T5)),
            names=names(clip_l="clip_l", clip_g="clip_g", t5="t5xxl"),
            ignored=counts(3),
            aside={"clip_l": 1},
        ),
        "FLUX saved by ComfyUI": Layout(
            family="flux",
            files=saved(encoders(projection=True, clip_l=L, t5xxl=with_both_embeddings(T5))),
            names=names(clip_l="clip_l", t5="t5xxl"),
            ignored=counts(2),
            aside={"clip_l": 1, "t5": 1},
        ),
        "FLUX in float8, its transformer in another quantisation": Layout(
            family="flux",
            files=saved({**encoders(projection=False, clip_l=L, t5xxl=comfy_2024(gen1)), **nf4}),
            names=names(clip_l="clip_l", t5="t5xxl"),
            values={"t5": gen1.values},
            dtypes={"t5": {"bfloat16", "float16"}},
            ignored=counts(2) | {"model.": 2},
        ),
        "FLUX in float8, told by the header": Layout(
            family="flux",
            files=lambda folder: [
                write_safetensors(
                    folder / "0.weights",
                    encoders(projection=False, clip_l=L, t5xxl=comfy_2025(gen2, in_header=True)),
                    comfy_header(gen2, "text_encoders.t5xxl.transformer."),
                )
            ],
            names=names(clip_l="clip_l", t5="t5xxl"),
            values={"t5": gen2.values},
            dtypes={"t5": {"bfloat16", "float16"}},
            ignored=counts(2),
        ),
        "Stable Cascade's clip_g": Layout(
            family="sdxl_refiner",
            files=saved(stable_cascade()),
            names={"clip_g": f"{HF}, below 'clip_g.transformer.'"},
            ignored={"clip_g.": 1},
        ),
        "ComfyUI's clip_g": Layout(family="sdxl_refiner", files=saved(G), names={"clip_g": HF}),
        "clip_l not stripped of its prefix": Layout(
            family="sd15",
            files=saved({**below("clip_l.transformer.", L), "clip_l.logit_scale": ONE}),
            names={"clip_l": f"{HF}, below 'clip_l.transformer.'"},
            ignored={"clip_l.": 1},
        ),
        "clip_g with a bare projection (old CLIPSave)": Layout(
            family="sdxl_refiner", files=saved(bare_projection(G)), names={"clip_g": HF}
        ),
    }


def stable_cascade() -> State:
    """The body below `transformer.`, the projection and the scale beside it."""
    state = bare_projection(G)
    beside = {"clip_g.text_projection": state.pop("text_projection"), "clip_g.logit_scale": ONE}
    return {**below("clip_g.transformer.", state), **beside}
