"""`torch eager` and `torch compiled`: transformers' classes with torch, both rows of the pair in one forward."""

from __future__ import annotations

import atexit
import functools
import os
import tempfile
import time
from pathlib import Path

from bench.host import cpu_model, versions
from bench.presets import outputs_of
from bench.protocol import Message, Model, serve


def start(case: Message) -> Model:
    compiled = tempfile.TemporaryDirectory()  # empty: the first call is to compile
    atexit.register(compiled.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled.name
    import numpy as np
    import torch

    from bench.workers.towers import Towers

    cuda = torch.cuda.is_available()
    device, platform = torch.device("cuda" if cuda else "cpu"), "gpu" if cuda else "cpu"
    mode = case["options"]["modes"].get(platform)

    begin = time.perf_counter()
    towers = Towers(Path(case["checkpoint"]) / "diffusers", getattr(torch, case["precision"])).to(device)
    load_s = time.perf_counter() - begin
    ids = [torch.tensor(rows, device=device) for rows in (case["ids"], case["t5_ids"]) if rows]
    # On a GPU reduce-overhead and max-autotune mean CUDA graphs; on a CPU the latter would mean minutes of trying for
    # nothing.
    run = towers if mode is None else torch.compile(towers, mode=mode, fullgraph=True)

    @functools.cache
    def install_hooks() -> None:  # a part of the first call, as compiling is
        if mode is not None:
            towers(*ids)  # transformers installs its hooks for hidden states by this, in a way that cannot be compiled

    @torch.inference_mode()
    def call() -> tuple[torch.Tensor, ...]:
        install_hooks()
        outputs = run(*ids)
        if cuda:
            torch.cuda.synchronize()
        return outputs

    def arrays(outputs: tuple[torch.Tensor, ...]) -> dict[str, np.ndarray]:
        if cuda and mode is not None:  # the first call is over, and with it the decision; it is not told otherwise
            from torch._dynamo.utils import counters

            about["cudagraph_skips"] = counters["inductor"]["cudagraph_skips"]
        names = outputs_of(case["preset"])
        return {name: x.float().cpu().numpy() for name, x in zip(names, outputs, strict=True)}

    about = {
        "platform": platform,
        "device": torch.cuda.get_device_name() if cuda else cpu_model(),
        "threads": torch.get_num_threads(),
        "attention": [tower.config._attn_implementation for tower in towers.towers],
        "versions": versions("torch", "transformers"),
    }
    return Model({"about": about, "load_s": round(load_s, 3)}, call, arrays)


if __name__ == "__main__":
    serve(start)
