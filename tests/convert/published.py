"""Published files without their weights: names, dtypes and shapes, in a file that is a hole after its header.

The names are spelt out from the projects that wrote the files. That they are right shows in the sizes: a header lists
every name, so that a file of theirs has the published length to the byte only if all of them are right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

Shapes = dict[str, tuple[int, ...]]

#: dtype -> bytes; the longest first and the names in order, which is how the safetensors package sorts tensors.
ITEM_BYTES = {"I64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1}
PT = {"format": "pt"}


class Header(NamedTuple):
    """What a safetensors file says of its tensors.

    Attributes:
        tensors: Name -> dtype and shape.
        metadata: The strings beside them.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str] | None = None

    def __or__(self, other: Header) -> Header:  # type: ignore[override]
        return Header({**self.tensors, **other.tensors}, self.metadata)

    @property
    def parameters(self) -> int:
        """How many numbers the tensors have."""
        return sum(math.prod(shape) for _, shape in self.tensors.values())

    def write(self, path: Path) -> Path:
        """Writes the file, sparse: on most file systems it takes no more space than its header."""
        order = list(ITEM_BYTES)
        entries: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        end = 0
        for name in sorted(self.tensors, key=lambda name: (order.index(self.tensors[name][0]), name)):
            dtype, shape = self.tensors[name]
            begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        return path


def stored(shapes: Shapes, dtype: str, metadata: Mapping[str, str] | None = None, prefix: str = "") -> Header:
    """Tensors of one dtype below a prefix."""
    return Header({prefix + name: (dtype, shape) for name, shape in shapes.items()}, metadata)


def clip(width: int, blocks: int, *, projection: bool = False, prefix: str = "text_model.") -> Shapes:
    """A CLIP text model under transformers' names."""
    shapes: Shapes = {
        f"{prefix}embeddings.token_embedding.weight": (49408, width),
        f"{prefix}embeddings.position_embedding.weight": (77, width),
    }
    for i in range(blocks):
        layer = f"{prefix}encoder.layers.{i}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}self_attn.{part}.weight"] = (width, width)
            shapes[f"{layer}self_attn.{part}.bias"] = (width,)
        for norm in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}{norm}.weight"] = shapes[f"{layer}{norm}.bias"] = (width,)
        shapes[f"{layer}mlp.fc1.weight"], shapes[f"{layer}mlp.fc1.bias"] = (4 * width, width), (4 * width,)
        shapes[f"{layer}mlp.fc2.weight"], shapes[f"{layer}mlp.fc2.bias"] = (width, 4 * width), (width,)
    shapes[f"{prefix}final_layer_norm.weight"] = shapes[f"{prefix}final_layer_norm.bias"] = (width,)
    if projection:
        shapes["text_projection.weight"] = (width, width)
    return shapes


def open_clip(width: int, blocks: int, *, text_alone: bool = True) -> Shapes:
    """The text transformer of an OpenCLIP model, with what sgm keeps beside it."""
    shapes: Shapes = {
        "positional_embedding": (77, width),
        "token_embedding.weight": (49408, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    for i in range(blocks):
        block = f"transformer.resblocks.{i}."
        for norm in ("ln_1", "ln_2"):
            shapes[f"{block}{norm}.weight"] = shapes[f"{block}{norm}.bias"] = (width,)
        shapes[f"{block}attn.in_proj_weight"], shapes[f"{block}attn.in_proj_bias"] = (3 * width, width), (3 * width,)
        shapes[f"{block}attn.out_proj.weight"], shapes[f"{block}attn.out_proj.bias"] = (width, width), (width,)
        shapes[f"{block}mlp.c_fc.weight"], shapes[f"{block}mlp.c_fc.bias"] = (4 * width, width), (4 * width,)
        shapes[f"{block}mlp.c_proj.weight"], shapes[f"{block}mlp.c_proj.bias"] = (width, 4 * width), (width,)
    if not text_alone:
        shapes |= {"text_projection": (width, width), "logit_scale": ()}
    return shapes


def t5(*, both_embeddings: bool = False, blocks: int = 24) -> Shapes:
    """The encoder of T5 v1.1 XXL."""
    shapes: Shapes = {"shared.weight": (32128, 4096), "encoder.final_layer_norm.weight": (4096,)}
    if both_embeddings:
        shapes["encoder.embed_tokens.weight"] = (32128, 4096)
    for i in range(blocks):
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        for part in "qkvo":
            shapes[f"{attention}.SelfAttention.{part}.weight"] = (4096, 4096)
        shapes[f"{attention}.layer_norm.weight"] = shapes[f"{mlp}.layer_norm.weight"] = (4096,)
        for part in ("wi_0", "wi_1"):
            shapes[f"{mlp}.DenseReluDense.{part}.weight"] = (10240, 4096)
        shapes[f"{mlp}.DenseReluDense.wo.weight"] = (4096, 10240)
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
    return shapes


def scaled_t5() -> Header:
    """ComfyUI's first convention: Linears in 8 bits with a scale each, everything else in 16."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"scaled_fp8": ("F8_E4M3", (0,))}
    for name, shape in t5(both_embeddings=True).items():
        if len(shape) == 2 and ".layer." in name and "_bias" not in name:
            tensors[name] = ("F8_E4M3", shape)
            tensors[name.replace(".weight", ".scale_weight")] = ("F32", ())
        else:
            tensors[name] = ("F16", shape)
    return Header(tensors)


POSITION_IDS = Header({"text_model.embeddings.position_ids": ("I64", (1, 77))})
L, H, G = (768, 12), (1024, 23), (1280, 32)

#: A published text encoder -> its header, and its length in bytes.
FILES: dict[str, tuple[Header, int]] = {
    # comfyanonymous/flux_text_encoders; the first is SDXL's text_encoder/model.fp16.safetensors, too.
    "clip_l": (stored(clip(*L), "F16", PT), 246_144_152),
    "t5xxl_fp16": (stored(t5(both_embeddings=True), "F16"), 9_787_841_024),
    "t5xxl_fp8_e4m3fn": (stored(t5(both_embeddings=True), "F8_E4M3"), 4_893_934_904),
    "t5xxl_fp8_e4m3fn_scaled": (scaled_t5(), 5_157_348_688),
    # SD 3's text_encoders/clip_g, and SDXL's text_encoder_2/model.fp16.
    "clip_g": (stored(clip(*G, projection=True), "F16", PT), 1_389_382_176),
    "SD 1.5 text_encoder/model.fp16": (stored(clip(*L), "F16", PT) | POSITION_IDS, 246_144_864),
    "SD 2.1 text_encoder/model.fp16": (stored(clip(*H), "F16", PT), 680_820_392),
    "SDXL text_encoder/model": (stored(clip(*L), "F32", PT), 492_265_168),
    "SDXL text_encoder_2/model": (stored(clip(*G, projection=True), "F32", PT), 2_778_702_264),
    "SD 3.5 text_encoder/model": (stored(clip(*L, projection=True), "F16", PT), 247_323_896),
}

# A few of the tensors that single-file checkpoints hold besides.
OTHERS = Header(
    {
        "model.diffusion_model.input_blocks.0.0.weight": ("F16", (320, 4, 3, 3)),
        "first_stage_model.decoder.conv_in.weight": ("F16", (512, 4, 3, 3)),
        "model_ema.num_updates": ("F32", ()),
    }
)
TRANSFORMER = Header({"model.diffusion_model.x_embedder.proj.weight": ("F16", (1536, 16, 2, 2))})
SCALES = Header({f"text_encoders.{name}.logit_scale": ("F32", ()) for name in ("clip_l", "clip_g", "t5xxl")})
CLIP_L, CLIP_G, T5XXL = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))


def sd1(dtype: str, prefix: str = "text_model.") -> Header:
    at = "cond_stage_model.transformer."
    ids = Header({f"{at}{prefix}embeddings.position_ids": ("I64", (1, 77))})
    return stored(clip(*L, prefix=prefix), dtype, prefix=at) | ids | OTHERS


def sdxl() -> Header:
    low, high = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    ids = Header({f"{low}text_model.embeddings.position_ids": ("I64", (1, 77))})
    bigg = stored(open_clip(*G, text_alone=False), "F16", prefix=high)
    return stored(clip(*L), "F16", prefix=low) | bigg | ids | OTHERS


def sd3(*, t5_dtype: str | None) -> Header:
    clips = stored(clip(*L), "F16", prefix=CLIP_L) | stored(clip(*G, projection=True), "F16", prefix=CLIP_G)
    return clips | TRANSFORMER | (stored(t5(), t5_dtype, prefix=T5XXL) if t5_dtype else Header({}))


def flux() -> Header:
    """As ComfyUI saves it: CLIP-L with a projection that it never had, and a scale for each."""
    low = stored(clip(*L, projection=True), "F16", prefix=CLIP_L)
    scales = Header({name: entry for name, entry in SCALES.tensors.items() if "clip_g" not in name})
    return low | stored(t5(), "F8_E4M3", prefix=T5XXL) | scales | TRANSFORMER
