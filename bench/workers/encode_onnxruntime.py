"""`onnxruntime`: the model that `export_onnx` wrote, on all cores."""

from __future__ import annotations

import time

from bench.host import cores, cpu_model, versions
from bench.presets import outputs_of
from bench.protocol import Message, Model, serve


def start(case: Message) -> Model:
    import numpy as np
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = cores()
    begin = time.perf_counter()
    session = onnxruntime.InferenceSession(case["file"], settings, providers=["CPUExecutionProvider"])
    load_s = time.perf_counter() - begin
    names = outputs_of(case["preset"])
    ids = {"ids": np.asarray(case["ids"], np.int64)}

    def call() -> list[np.ndarray]:
        return session.run(names, ids)

    def arrays(outputs: list[np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(names, outputs, strict=True))

    about = {
        "platform": "cpu",
        "device": cpu_model(),
        "threads": cores(),
        "versions": versions("onnxruntime", "torch", "transformers"),
    }
    return Model({"about": about, "load_s": round(load_s, 3)}, call, arrays)


if __name__ == "__main__":
    serve(start)
