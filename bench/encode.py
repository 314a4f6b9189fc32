"""Times one guidance pair through clip_jax and, beside it, torch eager: `python -m bench.encode`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.host import ROOT, git_state, host_facts
from bench.interleave import BATCH, LENGTH, PAUSE_S, WARMUP, Contender, run_case
from bench.protocol import WorkerError
from bench.report import SCHEMA

OURS, TORCH = "clip_jax", "torch eager"
# Cores that other processes took while we timed. More than this, and the numbers are not worth publishing:
# a threaded matmul that waits for a core it shares can be 20 times slower, and not all suffer alike.
QUIET = 0.1


def run(
    contenders: Sequence[Contender], families: Sequence[str], dtypes: Sequence[str], repeats: int
) -> dict[str, Any]:
    """All cases, and what a reader must know to judge them."""
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "benchmark": "encode",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **git_state(),
        "host": host_facts(),
        "settings": {
            "input": f"token ids [{BATCH}, {LENGTH}], on the device: one negative prompt and one prompt",
            "weights": "random in all contenders",
            "repeats": repeats,
            "warmup": WARMUP,
            "pause_s": PAUSE_S,
            "order": "interleaved: one call of each contender in turn, each in a process of its own",
        },
    }
    turns = len(families) * len(dtypes) * (WARMUP + repeats)
    with tqdm(total=turns, unit="turn", disable=None, leave=False) as bar:
        cases = [run_case(contenders, family, dtype, repeats, bar) for family in families for dtype in dtypes]
    # The same in all cases, so told once.
    abouts = [{name: found.pop("about") for name, found in case["contenders"].items()} for case in cases]
    return {**result, "contenders": abouts[0], "cases": cases}


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if sys.platform != "linux":
        sys.exit("bench.encode: reads /proc, so it runs on Linux alone.")
    try:
        contenders = [Contender(OURS, (_interpreter(args.jax_python, "--jax-python"), "-m", "bench.worker_jax"))]
        if args.torch:
            python = _interpreter(args.torch_python, "--torch-python")
            _require_torch(python)
            contenders.append(Contender(TORCH, (python, "-m", "bench.worker_torch")))
        result = run(contenders, args.families, args.dtypes, args.repeats)
    except WorkerError as error:
        sys.exit(f"bench.encode: {error}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for case in result["cases"]:
        if case["other_cores"] > QUIET:
            print(
                f"Not quiet: other processes took {case['other_cores']} cores during {case['family']} "
                f"{case['dtype']}. Do not publish this; repeat it on a quiet machine.",
                file=sys.stderr,
            )
    print(f"Wrote {args.out}. Show it with: python -m bench.report {args.out}")


def _interpreter(python: str, option: str) -> str:
    found = shutil.which(python)
    if found is None:
        raise WorkerError(f"{option}: there is no interpreter {python!r}.")
    return os.path.abspath(found)  # workers start in another folder; links stay, as they make a venv


def _require_torch(python: str) -> None:
    look = "from importlib.util import find_spec as f; exit(not (f('torch') and f('transformers')))"
    if subprocess.run([python, "-c", look]).returncode:
        raise WorkerError(
            "the interpreter of --torch-python lacks torch or transformers. Install them (pip install torch "
            "transformers), name an interpreter that has them with --torch-python, or pass --no-torch."
        )


def _repeats(text: str) -> int:
    if (repeats := int(text)) < 2:
        raise argparse.ArgumentTypeError("a spread needs at least 2")
    return repeats


def _parser() -> argparse.ArgumentParser:
    out = ROOT / "bench" / "results" / f"encode-{datetime.date.today():%Y-%m-%d}.json"
    parser = argparse.ArgumentParser(prog="python -m bench.encode", description=__doc__)
    parser.add_argument("--families", nargs="+", default=["sd15", "sd21"], metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], metavar="NAME")
    parser.add_argument("--repeats", type=_repeats, default=15, help="timed calls of each contender per case")
    parser.add_argument("--out", type=Path, default=out, help="default: bench/results/encode-DATE.json")
    parser.add_argument("--jax-python", default=sys.executable, metavar="PATH", help="with clip_jax")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH", help="with torch")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="time clip_jax alone")
    return parser


if __name__ == "__main__":
    main()
