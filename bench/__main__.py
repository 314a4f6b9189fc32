"""The benchmarks, each ours beside its peers: `python -m bench`. See bench/README.md.

encode: a guidance pair through the text encoders of SD 1.5, SD 2.1 and SDXL. compat: the drop-in classes. cold: a whole
process to its first embeddings. cache: calls that find a part or all of what they want in the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.cached import run_cache
from bench.cold import run_cold
from bench.contenders import CONTENDERS, ENVIRONMENTS
from bench.environments import parse_pythons, run_helper
from bench.host import ROOT, git_state, host_facts, slug, tell_noise
from bench.interleave import PAUSE_S, WARMUP
from bench.presets import COMPAT, LARGE_PRESETS, PRECISIONS, PRESETS
from bench.protocol import WorkerError
from bench.stats import least_ms
from bench.suite import run_cases
from bench.timings import SCHEMA
from bench.workshop import Case, Workshop

BENCHMARKS = ("encode", "compat", "cold", "cache")
_ENCODED = (*PRESETS, *LARGE_PRESETS)


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if sys.platform != "linux":
        sys.exit("bench: reads /proc, so it runs on Linux alone.")
    names = {one.name for group in CONTENDERS.values() for one in group}
    for what, given, known in (("benchmark", args.benchmarks, BENCHMARKS), ("contender", args.contenders, names)):
        if unknown := sorted(set(given or ()) - set(known)):
            sys.exit(f"bench: there is no {what} {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
    if "cache" in (args.benchmarks or BENCHMARKS) and set(args.presets) & set(LARGE_PRESETS):
        sys.exit(f"bench: cache is of pairs, and {', '.join(LARGE_PRESETS)} has none; name the benchmark: encode.")
    try:
        pythons = parse_pythons(args.python)
    except ValueError as error:
        sys.exit(f"bench: {error}.")
    try:
        with contextlib.ExitStack() as stack:
            scratch = args.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            scratch.mkdir(parents=True, exist_ok=True)
            device = json.loads(run_helper(pythons["clip_jax"], "bench.workers.about"))
            shop = Workshop(pythons, device["platform"], device["name"], scratch.absolute(), args.repeats)
            for benchmark in args.benchmarks or BENCHMARKS:
                out = args.out / f"{benchmark}-{slug(device)}.json"
                out.parent.mkdir(parents=True, exist_ok=True)
                _tell(run(benchmark, args, shop, out), out)
    except WorkerError as error:
        sys.exit(f"bench: {error}")


def run(benchmark: str, args: argparse.Namespace, shop: Workshop, out: Path) -> dict[str, Any]:
    """One benchmark, and what a reader must know to judge it; written to `out`, of some after each case too."""
    begun = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    extra: dict[str, Any] = {}

    def write(found: Mapping[str, Any]) -> dict[str, Any]:
        for case in found["cases"]:
            if extra:
                _add_least(case, CONTENDERS[benchmark][0].name, extra["ceilings"])
        result = {
            "schema": SCHEMA,
            "benchmark": benchmark,
            "platform": shop.platform,
            "date": begun,
            **git_state(),
            "host": host_facts(),
            "settings": {
                "weights": "random, the same in all",
                "repeats": shop.repeats,
                "warmup": WARMUP,
                "pause_s": PAUSE_S,
            },
            **extra,
            **found,
        }
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    if benchmark == "cold":
        return write(run_cold(shop))
    if benchmark == "cache":
        return write(run_cache(shop, args.presets))
    ours, *others = CONTENDERS[benchmark]
    contenders = [ours, *(one for one in others if args.contenders is None or one.name in args.contenders)]
    cases = _cases(benchmark, args)
    if benchmark == "encode":
        pairs = dict.fromkeys(f"{case.preset}:{case.batch}" for case in cases)
        options = (*pairs, "--precisions", *args.precisions)
        extra["ceilings"] = json.loads(run_helper(shop.pythons["clip_jax"], "bench.ceilings", *options))
    return write(run_cases(contenders, cases, shop, write))


def _cases(benchmark: str, args: argparse.Namespace) -> list[Case]:
    if benchmark == "compat":
        return [Case(preset, "float32") for preset in COMPAT]
    cases = [Case(*case) for case in itertools.product(args.presets, args.precisions, args.batches)]
    return cases + [Case(preset, name, pairs) for preset, pairs in args.also for name in args.precisions]


def _add_least(case: dict[str, Any], ours: str, ceilings: Mapping[str, Any]) -> None:
    """To our entry of a case, the least time that the ceilings allow."""
    entry = case["contenders"].get(ours)
    if entry is not None:
        case["flops"] = ceilings["flops"][f"{case['preset']}:{case['batch']}"]
        entry["least_ms"] = least_ms(
            case["flops"], entry["read_mib"], ceilings["matmul_gops"][case["precision"]], ceilings["copy_gbps"]
        )


def _tell(result: Mapping[str, Any], out: Path) -> None:
    for case in result["cases"]:
        tell_noise(case["other_cores"], f"{case['preset']} {case['precision']}")
    print(f"Wrote {out}. Show it with: python -m bench.report {out}")


def _preset_and_pairs(text: str) -> tuple[str, int]:
    preset, _, pairs = text.partition(":")
    if preset not in _ENCODED or not pairs.isdecimal() or pairs == "0":
        raise argparse.ArgumentTypeError(f"expected PRESET:PAIRS, one of {', '.join(_ENCODED)} and a number")
    return preset, int(pairs)


def _repeats(text: str) -> int:
    if (repeats := int(text)) < 2:
        raise argparse.ArgumentTypeError("a spread needs at least 2")
    return repeats


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=f"{', '.join(BENCHMARKS)}; default: all")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=f"the interpreter of an environment ({', '.join(ENVIRONMENTS)}); default: this one",
    )
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=_ENCODED, help="of encode and cache")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS, help="of encode")
    parser.add_argument("--batches", nargs="+", type=int, default=[1], metavar="PAIRS", help="of encode; default: 1")
    parser.add_argument(
        "--also", nargs="+", type=_preset_and_pairs, default=[], metavar="PRESET:PAIRS", help="more cases of encode"
    )
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="those to time beside clip_jax; default: all")
    parser.add_argument(
        "--repeats", type=_repeats, default=15, help="timed calls of each contender per case; of larger batches fewer"
    )
    parser.add_argument("--scratch", type=Path, help="folder for weights and exports, kept; default: a temporary one")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    return parser


if __name__ == "__main__":
    main()
