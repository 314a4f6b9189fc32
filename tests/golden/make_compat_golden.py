"""Writes compat.npz: some of what the Flax classes of transformers 4 return, and their parameter trees.

Run by hand on what `tests/oracle/old_flax.py` wrote: `python -m tests.golden.make_compat_golden FOLDER/outputs.npz`.
"""

import json
import sys
from pathlib import Path

import numpy as np

from tests.golden.cases import COMPAT_CALL, COMPAT_SLICE
from tests.oracle.cases import MODELS


def main(outputs: Path) -> None:
    old = dict(np.load(outputs))
    about = json.loads(str(old.pop("about")))
    about["trees"] = {
        name: {
            key.removeprefix(f"{name}/params/"): array.shape
            for key, array in old.items()
            if key.startswith(f"{name}/params/")
        }
        for name in MODELS
    }
    kept = {
        key: array[COMPAT_SLICE[: array.ndim]]
        for key, array in old.items()
        if any(key.startswith(f"{name}/{COMPAT_CALL}/") for name in MODELS)
    }
    np.savez_compressed(Path(__file__).parent / "compat.npz", about=json.dumps(about), **kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
