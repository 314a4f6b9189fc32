"""A whole process of transformers with torch to its first embeddings: `python -m bench.workers.cold_torch WEIGHTS`."""

import time

begin = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402

import torch  # noqa: E402
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: E402

imported = time.perf_counter()
folder = f"{sys.argv[1]}/diffusers"
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = CLIPTokenizer.from_pretrained(f"{folder}/tokenizer")
model = CLIPTextModel.from_pretrained(f"{folder}/text_encoder").eval().to(device)
loaded = time.perf_counter()
prompts = ["blurry, low quality", "a cat sitting on a windowsill"]
ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
with torch.inference_mode():
    model(ids.to(device)).last_hidden_state.cpu()
done = time.perf_counter()
seconds = {"import_s": imported - begin, "load_s": loaded - imported, "first_call_s": done - loaded}
print(json.dumps({"platform": "gpu" if device == "cuda" else "cpu", **seconds}))
