"""The contender `torch eager`: transformers' CLIPTextModel of the same architecture, with random weights."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence

from bench.host import cpu_model
from bench.protocol import Call, Message, serve


def start(case: Message) -> tuple[Message, Call]:
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = getattr(torch, case["dtype"])
    torch.manual_seed(0)

    begin = time.perf_counter()
    # Made in the dtype, not cast to it: the peak memory is that of the model.
    torch.set_default_dtype(dtype)
    with device:
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**case["config"])).eval()
    torch.set_default_dtype(torch.float32)
    load_s = time.perf_counter() - begin

    ids = torch.tensor(case["ids"], device=device)

    @torch.inference_mode()
    def call() -> Sequence[int]:
        out = model(input_ids=ids).last_hidden_state
        if cuda:
            torch.cuda.synchronize()
        return out.shape

    about = {
        "device": torch.cuda.get_device_name() if cuda else cpu_model(),
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    return {"about": about, "load_s": round(load_s, 3)}, call


if __name__ == "__main__":
    serve(start)
