"""OpenVINO: the model that `export_openvino` wrote, on all cores, with the hint for latency."""

from __future__ import annotations

import time
from collections import Counter

from bench.host import cores, cpu_model, versions
from bench.presets import outputs_of
from bench.protocol import Message, Model, serve

_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # with int8: of what is not quantised


def start(case: Message) -> Model:
    import numpy as np
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _HINTS[case["precision"]],
        "INFERENCE_NUM_THREADS": cores(),
    }
    begin = time.perf_counter()
    compiled = openvino.Core().compile_model(case["file"], "CPU", settings)
    load_s = time.perf_counter() - begin
    request = compiled.create_infer_request()
    ids = [np.asarray(case["ids"], np.int64)]
    names = outputs_of(case["preset"])

    def call() -> list[np.ndarray]:
        return list(request.infer(ids, share_inputs=True, share_outputs=True).values())

    def arrays(outputs: list[np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.array(x) for name, x in zip(names, outputs, strict=True)}

    about = {
        "platform": "cpu",
        "device": cpu_model(),
        "threads": cores(),
        "versions": versions("openvino", "nncf", "torch", "transformers"),
    }
    return Model({"about": about, "load_s": round(load_s, 3), "products": _products(compiled)}, call, arrays)


def _products(compiled: object) -> dict[str, int]:
    """How many matrix products run in which precision, as the compiled model says."""
    found: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        if str(facts["layerType"].astype(str)) in ("FullyConnected", "MatMul"):
            found[facts["runtimePrecision"].astype(str)] += 1
    return dict(found)


if __name__ == "__main__":
    serve(start)
