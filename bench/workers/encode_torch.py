"""`torch eager` and `torch compiled`: transformers' classes with torch, both rows of the pair in one forward."""

from __future__ import annotations

import functools
import time
from pathlib import Path

from bench.host import cpu_model, versions
from bench.presets import outputs_of
from bench.protocol import Message, Model, serve


def start(case: Message) -> Model:
    import numpy as np
    import torch

    from bench.workers.towers import Towers

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")

    begin = time.perf_counter()
    towers = Towers(Path(case["checkpoint"]) / "diffusers", getattr(torch, case["precision"])).to(device)
    load_s = time.perf_counter() - begin
    ids = torch.tensor(case["ids"], device=device)
    run = towers
    if case["options"]["compiled"]:
        # On a GPU max-autotune means CUDA graphs too; on a CPU it would mean minutes of trying for nothing.
        run = torch.compile(towers, mode="max-autotune" if cuda else "default", fullgraph=True)

    @functools.cache
    def install_hooks() -> None:  # a part of the first call, as compiling is
        if case["options"]["compiled"]:
            towers(ids)  # transformers installs its hooks for hidden states by this, in a way that cannot be compiled

    @torch.inference_mode()
    def call() -> tuple[torch.Tensor, ...]:
        install_hooks()
        outputs = run(ids)
        if cuda:
            torch.cuda.synchronize()
        return outputs

    def arrays(outputs: tuple[torch.Tensor, ...]) -> dict[str, np.ndarray]:
        names = outputs_of(case["preset"])
        return {name: x.float().cpu().numpy() for name, x in zip(names, outputs, strict=True)}

    about = {
        "platform": "gpu" if cuda else "cpu",
        "device": torch.cuda.get_device_name() if cuda else cpu_model(),
        "threads": torch.get_num_threads(),
        "attention": towers.towers[0].config._attn_implementation,
        "versions": versions("torch", "transformers"),
    }
    return Model({"about": about, "load_s": round(load_s, 3)}, call, arrays)


if __name__ == "__main__":
    serve(start)
