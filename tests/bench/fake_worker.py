"""A worker without a model: the options of its contender tell what it does. What it sees of the case is a fact."""

import os

import numpy as np

from bench.protocol import LeftOut, Message, Model, serve


def start(case: Message) -> Model:
    print("chatter on stdout")
    os.system("echo chatter of a child")
    options = case["options"]
    if "left_out" in options:
        raise LeftOut(options["left_out"])
    calls: list[int] = []

    def call() -> None:
        print("more chatter")
        calls.append(1)
        if len(calls) > options.get("calls", 1000):
            raise RuntimeError("worn out")

    about = {"platform": options.get("platform", "cpu"), "device": "abacus", "versions": {"python": "3"}}
    facts = {"about": about, "seen": case, "read_mib": 1.0}
    value = options.get("value", 1.0)
    return Model(facts, call, lambda _: {"prompt_embeds": np.full((len(case["ids"]), 77, 8), value, np.float32)})


if __name__ == "__main__":
    serve(start)
