"""A process as `bench.cold` starts it: it tells by its times whether there is a folder for compiled programs."""

import json
import os
import sys

assert sys.argv[1].endswith("sd15/weights")
print("chatter")
seconds = {"import_s": 0.1, "load_s": 0.2, "first_call_s": 1 + ("JAX_COMPILATION_CACHE_DIR" in os.environ)}
print(json.dumps({"platform": "cpu", **seconds}))
