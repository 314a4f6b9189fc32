"""`clip_jax`: `TextEncoder.encode` on ids that are on the device, without its cache; or of what was frozen."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import time
from pathlib import Path

from bench.protocol import LeftOut, Message, Model, serve
from bench.workers.about import start_jax

_TABLE = re.compile(r"'(token_embedding|shared)'")  # of which a call reads a few rows


def start(case: Message) -> Model:
    about = start_jax(case["precision"], "clip-jax-text", "flax")
    import jax
    import numpy as np

    import clip_jax

    options = {"dtype": case["precision"]}
    if case["options"]["attention"] != "xla":  # not named otherwise, for commits that did not have the option
        options["attention"] = case["options"]["attention"]
    if case["precision"] == "int8":
        if "quantize" not in inspect.signature(clip_jax.load).parameters:
            raise LeftOut("this clip_jax does not quantise")
        options = {"quantize": "int8"}

    begin = time.perf_counter()
    encoder = clip_jax.load(Path(case["checkpoint"]) / "converted", progress=False, cache_bytes=0, **options)
    jax.block_until_ready(encoder.params)
    load_s = time.perf_counter() - begin

    ids = np.asarray(case["ids"], np.int32)
    if case["t5_ids"]:
        # Without negatives; and on the host, where the length of CLIP's text is looked at.
        tokens = clip_jax.Tokens(cond={"clip_l": ids, "t5": np.asarray(case["t5_ids"], np.int32)})
    else:
        uncond, cond = (jax.device_put(rows) for rows in np.split(ids, 2))
        names = [tower.name for tower in encoder.family.towers]
        tokens = clip_jax.Tokens(cond=dict.fromkeys(names, cond), uncond=dict.fromkeys(names, uncond))

    @functools.cache
    def freeze() -> None:  # a part of the first call, as compiling is for the others
        if case["options"]["freeze"]:
            encoder.warmup((case["batch"],), negative_prompt="", freeze=True)

    def call() -> clip_jax.TextEmbeddings:
        freeze()
        return jax.block_until_ready(encoder.encode(tokens))

    def arrays(out: clip_jax.TextEmbeddings) -> dict[str, np.ndarray]:
        return {
            field.name: np.asarray(value, np.float32)
            for field in dataclasses.fields(out)
            if field.name.endswith("prompt_embeds") and (value := getattr(out, field.name)) is not None
        }

    leaves = jax.tree_util.tree_leaves_with_path(encoder.params)
    read = [leaf.nbytes for path, leaf in leaves if not _TABLE.search(jax.tree_util.keystr(path))]
    return Model({"about": about, "load_s": round(load_s, 3), "read_mib": round(sum(read) / 2**20, 1)}, call, arrays)


if __name__ == "__main__":
    serve(start)
