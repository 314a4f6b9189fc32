"""PyTorch's and Flax' files."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.formats.files import write_msgpack, write_sharded
from tests.formats.layout import HF, OPEN_CLIP, Layout, saved
from tests.formats.model import model
from tests.formats.names import below, flax, open_clip
from tests.formats.torch_zip import write_torch_zip
from tests.formats.values import cast

L, G, T5 = map(model, ("clip_l", "clip_g", "t5"))


def other_writers() -> dict[str, Layout]:
    plain = Layout(family="sd15", files=saved(L), names={"clip_l": HF})
    msgpack, torch_zip = "single file, Flax msgpack", "single file, PyTorch zip"
    named_flax = dataclasses.replace(plain, names={"clip_l": "Flax"})
    return {
        "pytorch_model.bin": dataclasses.replace(plain, files=saved(L, write=write_torch_zip), format=torch_zip),
        "pytorch_model.bin, float16": dataclasses.replace(
            plain,
            files=saved(cast(L, np.float16), write=write_torch_zip),
            format=torch_zip,
            values={"clip_l": cast(L, np.float16)},
            dtypes={"clip_l": {"float16"}},
        ),
        "sharded pytorch_model.bin": dataclasses.replace(
            plain,
            files=lambda folder: [write_sharded(folder / "s", L, write_torch_zip, "pytorch_model", "bin")],
            format=torch_zip,
        ),
        "OpenCLIP, .pt with a state_dict": Layout(
            family="sdxl_refiner",
            files=lambda folder: [
                write_torch_zip(
                    folder / "0.weights",
                    {"epoch": 32, "name": "bigG", "state_dict": below("module.", open_clip(G)), "optimizer": {}},
                )
            ],
            names={"clip_g": f"{OPEN_CLIP}, below 'module.'"},
            format=torch_zip,
        ),
        "flax_model.msgpack": dataclasses.replace(
            named_flax, files=saved(flax(L), write=write_msgpack), format=msgpack
        ),
        "Flax TrainState": dataclasses.replace(
            named_flax,
            files=saved({**below("params/", flax(L)), "opt_state/0/count": np.array(3)}, write=write_msgpack),
            format=msgpack,
        ),
        "sharded flax_model.msgpack": dataclasses.replace(
            named_flax,
            files=lambda folder: [write_sharded(folder / "s", flax(L), write_msgpack, "flax_model", "msgpack")],
            format=msgpack,
        ),
        "Flax with a projection": Layout(
            family="sdxl_refiner",
            files=saved(flax(G), write=write_msgpack),
            names={"clip_g": "Flax"},
            format=msgpack,
        ),
        "Flax safetensors": dataclasses.replace(named_flax, files=saved(flax(L, "."))),
        "Flax T5": Layout(
            family="flux",
            files=saved(flax(L), flax(T5), write=write_msgpack),
            names={"clip_l": "Flax", "t5": "Flax"},
            format="2 files, Flax msgpack",
        ),
    }
