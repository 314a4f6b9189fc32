"""A whole process of ours to its first embeddings: `python -m bench.workers.cold_clip_jax WEIGHTS`."""

import time

begin = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402

import jax  # noqa: E402

import clip_jax  # noqa: E402

imported = time.perf_counter()
platform = jax.devices()[0].platform
if platform != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")  # jax's default is less than float32 there
encoder = clip_jax.load(f"{sys.argv[1]}/converted", progress=False)
jax.block_until_ready(encoder.params)
loaded = time.perf_counter()
jax.block_until_ready(encoder("a cat sitting on a windowsill", negative_prompt="blurry, low quality"))
done = time.perf_counter()
seconds = {"import_s": imported - begin, "load_s": loaded - imported, "first_call_s": done - loaded}
print(json.dumps({"platform": platform, **seconds}))
