"""Makes the model that OpenVINO runs: `python -m bench.workers.export_openvino CHECKPOINT ROWS PRECISION FILE [INT8]`.

Converted from torch without a detour, for a fixed number of rows. INT8 is how it is quantised: "calibrated" is
`nncf.quantize`, weights and activations with scales that are found on random texts; "dynamic" is
`nncf.compress_weights`, weights alone, whose products OpenVINO computes on activations that it quantises as it runs.
Both make products of int8 with int8, which the worker checks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["CI"] = "true"  # or nncf and openvino would tell their makers that they are used

import nncf
import numpy as np
import openvino
import torch

from bench.presets import LENGTH, clip_ids
from bench.workers.towers import Towers

_CALIBRATION = 16  # batches of texts


def main(checkpoint: Path, rows: int, precision: str, out: Path, int8: str = "calibrated") -> None:
    example = torch.tensor(clip_ids(rows))
    model = openvino.convert_model(
        Towers(checkpoint / "diffusers"), example_input=example, input=[openvino.PartialShape([rows, LENGTH])]
    )
    if precision == "int8" and int8 == "dynamic":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    elif precision == "int8":
        texts = np.random.default_rng(1).integers(0, example[0, 0].item(), (_CALIBRATION, rows, LENGTH))
        texts[:, :, 0], texts[:, :, -1] = example[0, 0], example[0, -1]
        model = nncf.quantize(
            model, nncf.Dataset(list(texts)), subset_size=_CALIBRATION, model_type=nncf.ModelType.TRANSFORMER
        )
    openvino.save_model(model, out, compress_to_fp16=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), *sys.argv[5:])
