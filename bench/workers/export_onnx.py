"""Makes the file that `onnxruntime` runs: `python -m bench.workers.export_onnx CHECKPOINT ROWS PRECISION FILE`.

float32 is exported by torch, for a fixed number of rows. int8 is onnxruntime's dynamic quantisation of that: int8
weights with a scale per output channel, activations quantised while it runs. Of its two choices for the weights'
scales that is the one of smaller error, at the same speed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from bench.presets import clip_ids, outputs_of
from bench.workers.towers import Towers


def main(checkpoint: Path, rows: int, precision: str, out: Path) -> None:
    if precision == "float32":
        _export(checkpoint, rows, out)
        return
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        exported = Path(folder) / "float32.onnx"
        _export(checkpoint, rows, exported)
        quantize_dynamic(exported, out, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=True)


def _export(checkpoint: Path, rows: int, out: Path) -> None:
    names = outputs_of("sdxl" if (checkpoint / "diffusers" / "text_encoder_2").exists() else "sd15")
    torch.onnx.export(
        Towers(checkpoint / "diffusers"),
        (torch.tensor(clip_ids(rows)),),
        out,
        input_names=["ids"],
        output_names=names,
        dynamo=True,
        external_data=True,  # protobuf has room for 2 GB
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
