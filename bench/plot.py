"""Draws a result as bars: `python -m bench.plot bench/results/NAME.json` writes NAME.png beside it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.timings import number, title

_OURS, _PEER = "#d1495b", "#8d99ae"
_UNITS = {"encode": ("ms", 1), "compat": ("ms", 1), "cold": ("s", 1e-3), "cache": ("µs", 1e3)}


def draw(result: Mapping[str, Any], out: Path) -> None:
    """A panel per case: a bar of the median for each contender, and a whisker between its quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    unit, scale = _UNITS[result["benchmark"]]
    cases = [case for case in result["cases"] if case["contenders"]]
    columns = min(len(cases), 3)
    rows = -(-len(cases) // columns)
    most = max(len(case["contenders"]) for case in cases)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5 * columns, rows * (0.9 + 0.35 * most)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        names = list(case["contenders"])
        times = [case["contenders"][name]["ms"] for name in names]
        medians = [time["median"] * scale for time in times]
        spreads = [[(t["median"] - t["q1"]) * scale for t in times], [(t["q3"] - t["median"]) * scale for t in times]]
        colours = [_OURS if name.startswith("clip_jax") else _PEER for name in names]
        bars = axis.barh(names, medians, xerr=spreads, color=colours, error_kw={"elinewidth": 1})
        axis.bar_label(bars, [number(median) for median in medians], padding=6)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(title(case))
        axis.set_xlabel(f"{unit}, lower is faster")
    devices = dict.fromkeys(about["device"] for about in result["contenders"].values())
    figure.suptitle(f"{result['benchmark']}: {' / '.join(devices)}, {result['date'][:10]}")
    # Tight: the number at the end of an axis would be cut. The same result gives the same file.
    figure.savefig(out, dpi=120, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    for path in parser.parse_args(argv).results:
        draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
        print(f"Wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
