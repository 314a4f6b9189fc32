"""CLIP's text encoder alone, under the names of transformers, OpenCLIP and OpenAI."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from tests.formats.files import write_safetensors, write_sharded
from tests.formats.layout import HF, ONE, OPEN_CLIP, Layout, saved
from tests.formats.model import model
from tests.formats.names import below, open_clip, unprefixed
from tests.formats.values import cast

L, H, G = map(model, ("clip_l", "clip_h", "clip_g"))
VISUAL = {"visual.conv1.weight": np.ones((2, 3), np.float32), "visual.proj": np.ones((2, 2), np.float32)}


def transformers_layouts() -> dict[str, Layout]:
    plain = Layout(family="sd15", files=saved(L), names={"clip_l": HF})
    position_ids = {"text_model.embeddings.position_ids": np.arange(77)[None]}
    whole = {
        **position_ids,
        "logit_scale": ONE,
        "text_projection.weight": np.ones((16, 16), np.float32),
        "vision_model.embeddings.class_embedding": np.ones(8, np.float32),
        "visual_projection.weight": np.ones((16, 8), np.float32),
    }
    layouts = {
        "transformers": plain,
        "transformers 5, without text_model.": dataclasses.replace(plain, files=saved(unprefixed(L))),
        "transformers 4, with position_ids": dataclasses.replace(
            plain, files=saved({**L, **position_ids}), aside={"clip_l": 1}
        ),
        "whole CLIPModel": dataclasses.replace(plain, files=saved({**L, **whole}), aside={"clip_l": 5}),
        "whole CLIPModel of H": Layout(
            family="sd21", files=saved({**H, "logit_scale": ONE}), names={"clip_h": HF}, aside={"clip_h": 18}
        ),
        "CLIPTextModelWithProjection": Layout(family="sdxl_refiner", files=saved(G), names={"clip_g": HF}),
        "sharded safetensors": dataclasses.replace(
            plain, files=lambda folder: [write_sharded(folder / "s", L, write_safetensors, "model", "safetensors")]
        ),
        "folder of shards, without config.json": dataclasses.replace(
            plain,
            files=lambda folder: [write_sharded(folder / "s", L, write_safetensors, "model", "safetensors").parent],
        ),
    }
    for dtype in (np.float16, ml_dtypes.bfloat16):
        name = np.dtype(dtype).name
        layouts[f"transformers, {name}"] = dataclasses.replace(
            plain, files=saved(cast(L, dtype)), values={"clip_l": cast(L, dtype)}, dtypes={"clip_l": {name}}
        )
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        layouts[f"prefix {prefix}"] = dataclasses.replace(
            plain, files=saved(below(prefix, L)), names={"clip_l": f"{HF}, below {prefix!r}"}
        )
    return layouts


def open_clip_layouts() -> dict[str, Layout]:
    plain = Layout(family="sdxl_refiner", files=saved(open_clip(G)), names={"clip_g": OPEN_CLIP})
    beside, counts = {**VISUAL, "logit_scale": ONE}, {"visual.": 2, "logit_scale": 1}
    mask = {"attn_mask": np.zeros((77, 77), np.float32)}
    sizes = {
        name: np.array(size) for name, size in (("input_resolution", 8), ("context_length", 77), ("vocab_size", 49408))
    }
    # OpenAI's `convert_weights`: matrices in float16, embeddings and LayerNorm in float32.
    halved = {
        name: array if "embedding" in name or "norm" in name else array.astype(np.float16) for name, array in L.items()
    }
    projection = {"text_projection": np.ones((16, 8), np.float16)}
    return {
        "OpenCLIP": dataclasses.replace(plain, files=saved({**open_clip(G), **beside}), ignored=counts),
        "OpenCLIP, text alone": plain,
        "OpenCLIP with a mask": dataclasses.replace(
            plain, files=saved({**open_clip(G), **mask}), ignored={"attn_mask": 1}
        ),
        "OpenCLIP with layer scale in the image encoder": dataclasses.replace(
            plain,
            files=saved({**open_clip(G), "visual.transformer.resblocks.0.ls_1.gamma": np.ones(4, np.float32)}),
            ignored={"visual.": 1},
        ),
        "OpenCLIP CustomTextCLIP": dataclasses.replace(
            plain,
            files=saved({**below("text.", open_clip(G)), **beside}),
            names={"clip_g": f"{OPEN_CLIP}, below 'text.'"},
            ignored=counts,
        ),
        "OpenCLIP, DistributedDataParallel": dataclasses.replace(
            plain,
            files=saved(below("module.", {**open_clip(G), **VISUAL})),
            names={"clip_g": f"{OPEN_CLIP}, below 'module.'"},
            ignored={"module.": 2},
        ),
        "OpenCLIP's H": Layout(
            family="sd21",
            files=saved({**open_clip(H), **beside}),
            names={"clip_h": OPEN_CLIP},
            ignored=counts,
            aside={"clip_h": 13},
        ),
        "OpenAI": Layout(
            family="sd15",
            files=saved({**open_clip(halved), **projection, **beside, **sizes}),
            names={"clip_l": OPEN_CLIP},
            values={"clip_l": halved},
            dtypes={"clip_l": {"float16", "float32"}},
            ignored={**counts, **dict.fromkeys(sizes, 1)},
            aside={"clip_l": 1},
        ),
    }
