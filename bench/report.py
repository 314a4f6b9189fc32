"""Turns a result into its tables in the documents: `python -m bench.report bench/results/NAME.json`.

A result with `cases` is one of `python -m bench`, one with `peaks` of `bench.memory`, one with `formats` of
`bench.formats`, one with `flops` of `bench.flops`, one with `quantized` of `bench.quantize`, one with `scan` of
`bench.scan`, one with `features` of `bench.features`, one with `kernels` of `bench.kernels`, one with `profile` of
`bench.profile`, and one with `errors` is what `pytest tests/parity --write-errors` writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import summary, timings
from bench.host import ROOT
from bench.timings import SCHEMA, listed, number, when


class ReportError(Exception):
    """The result or the document is not what the report works on."""


class Table(NamedTuple):
    """A table of a result.

    Attributes:
        marker: What it stands between in its document.
        document: That document, from the root of the repository.
        text: Markdown; and below the table one line: what it shows, and where it was measured.
    """

    marker: str
    document: str
    text: str


def tables(result: Mapping[str, Any], source: str) -> list[Table]:
    """All tables of a result.

    Args:
        result: The content of the JSON file.
        source: The name of the file.

    Raises:
        ReportError: The result has another schema.
    """
    if "benchmark" in result:
        return _tables_of_times(result, source)
    key = next(key for key in _KINDS if key in result)
    marker, document, render = _KINDS[key]
    return [Table(f"{marker}{_of_accelerator(result)}", document, render(result, source))]


def _of_accelerator(result: Mapping[str, Any]) -> str:
    """What the markers of an accelerator's tables end with."""
    platform = result.get("platform", "cpu")
    return "" if platform == "cpu" else f":{platform}"


def _tables_of_times(result: Mapping[str, Any], source: str) -> list[Table]:
    if result.get("schema") != SCHEMA:
        raise ReportError(f"{source} has schema {result.get('schema')!r}; expected {SCHEMA}.")
    accelerator = _of_accelerator(result)
    whole = f"{_table(timings.rows(result))}\n\n{timings.caption(result, source)}"
    tables = [Table(f"bench:{result['benchmark']}{accelerator}", _DOCUMENTS[result["benchmark"]], whole)]
    if result["benchmark"] == "encode":
        short = f"{_table(summary.rows(result))}\n\n{summary.caption(result, source)}"
        tables.append(Table(f"bench:ratios{accelerator}", _README, short))
    return tables


def _render_errors(result: Mapping[str, Any], source: str) -> str:
    rows = [
        ["what is compared", "max abs error", "largest value", "tolerance"],
        ["---", "---:", "---:", "---:"],
    ]
    for name, error in result["errors"].items():
        rows.append(
            [
                name,
                f"{error['max_abs_error']:.1e}",
                f"{error['largest_value']:.2g}",
                f"{error['tolerance']:.0e}",
            ]
        )
    return (
        f"{_table(rows)}\n\nfloat32, on CPU ({result['machine']}), {result['date']}; "
        f"{listed({'Python': result['python'], **result['versions']})}; `{source}`."
    )


def _render_peaks(result: Mapping[str, Any], source: str) -> str:
    rows = [["step", "peak, MiB", "before, MiB", "above what was there before, of the model"], ["---", *["---:"] * 3]]
    model = result["model"]
    for step, peak in result["peaks"].items():
        share = (peak["peak_mib"] - peak["before_mib"]) / model["mib"]
        rows.append([step, f"{peak['peak_mib']:,.0f}", f"{peak['before_mib']:,.0f}", f"{share:.0%}"])
    return (
        f"{_table(rows)}\n\nAnonymous memory of the process, without the page cache; {model['family']} with "
        f"{model['parameters']:,} random parameters in {model['dtype']}, {model['mib']:,.0f} MiB; "
        f"{listed({'Python': result['python'], **result['versions']})}; {result['date'][:10]}; `{source}`."
    )


def _render_formats(result: Mapping[str, Any], source: str) -> str:
    sizes = ("files_mib", "params_mib", "peak_mib", "before_mib")
    header = ["model and format", "files, MiB", "params, MiB", "peak, MiB", "before, MiB", "above that, of the params"]
    rows = [header, ["---", *["---:"] * len(header[1:])]]
    for name, measured in result["formats"].items():
        share = (measured["peak_mib"] - measured["before_mib"]) / measured["params_mib"]
        rows.append([name, *(f"{measured[size]:,.0f}" for size in sizes), f"{share:.0%}"])
    versions = listed({"Python": result["python"], **result["versions"]})
    return (
        f"{_table(rows)}\n\nAnonymous memory of the process that converts, without the page cache; random weights of "
        f"the full size; {versions}; {result['date'][:10]}; `{source}`."
    )


def _render_flops(result: Mapping[str, Any], source: str) -> str:
    rows = [["family", "the program, GFLOP", "its towers whole, GFLOP", "share"], ["---", *["---:"] * 3]]
    for name, flops in result["flops"].items():
        program, towers = flops["program"], flops["towers"]
        rows.append([name, f"{program / 1e9:,.1f}", f"{towers / 1e9:,.1f}", f"{program / towers:.0%}"])
    return (
        f"{_table(rows)}\n\nXLA's cost analysis of the compiled program, on CPU; one prompt of 9 to 16 tokens and no "
        f"negative prompt, with guidance but for flux; towers whole: every block of every tower, on the rows that "
        f"diffusers runs; "
        f"{listed({'Python': result['python'], **result['versions']})}; `{source}`."
    )


def _render_quantized(result: Mapping[str, Any], source: str) -> str:
    header = ["family", "params", "size, MB", "of float32", "cosine, least", "cosine, mean", "relative error"]
    rows = [header, ["---", "---", *["---:"] * len(header[2:])]]
    for name, schemes in result["quantized"].items():
        whole = schemes["float32"]["bytes"]
        for scheme, found in schemes.items():
            size = [f"{found['bytes'] / 1e6:,.1f}", f"{found['bytes'] / whole:.0%}"]
            rows.append([name, scheme, *size, *_quantized_errors(found)])
    versions = listed({"Python": result["python"], **result["versions"]})
    return (
        f"{_table(rows)}\n\nOf `prompt_embeds` against float32, token by token, over {result['prompts']} prompts; "
        f"random weights of the full size, on {result['device'].upper()} ({result['machine']}); int4 as half a byte; "
        f"{versions}; {result['date'][:10]}; `{source}`."
    )


def _quantized_errors(found: Mapping[str, Any]) -> list[str]:
    if "min_cosine" not in found:  # float32, which the others are held against
        return ["", "", ""]
    return [f"{found['min_cosine']:.5f}", f"{found['mean_cosine']:.5f}", f"{found['relative_error']:.1%}"]


def _render_scan(result: Mapping[str, Any], source: str) -> str:
    header = ["text encoder", "layers", "first call, s", "as a scan, s", "ms", "as a scan, ms", "ratio"]
    rows = [header, ["---", *["---:"] * len(header[1:])]]
    for case in result["scan"]:
        first, ms, ratio = case["first_call_s"], case["ms"], case["ratio"]
        rows.append(
            [
                f"{case['family']}, {case['dtype']}",
                str(case["layers"]),
                *(f"{first[name]:.2f}" for name in ("unrolled", "scan")),
                *(number(ms[name]["median"]) for name in ("unrolled", "scan")),
                f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
            ]
        )
    others = max(case["other_cores"] for case in result["scan"])
    return (
        f"{_table(rows)}\n\nIds [2, 77] to the last hidden state, {result['device']}, at most {others} CPU cores taken "
        f"by others; random weights; medians of {result['rounds']} interleaved calls, and of their ratios, below 1 the "
        f"unrolled blocks are faster; "
        f"{listed(result['versions'])}; {result['date'][:10]}; `{source}`."
    )


def _render_features(result: Mapping[str, Any], source: str) -> str:
    header = ["text encoder", "in buckets, texts/s", "whole, texts/s", "ratio of times", "relative error"]
    rows = [header, ["---", *["---:"] * len(header[1:])]]
    for case in result["features"]:
        rates = [case["texts_per_second"][name] for name in ("in buckets", "whole")]
        ratio = case["ratio"]
        rows.append(
            [
                f"{case['model']}, {case['dtype']}",
                *(f"{number(rate['median'])} ({number(rate['q1'])} to {number(rate['q3'])})" for rate in rates),
                f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
                f"{case['relative_error']:.1e}",
            ]
        )
    sizes = result["sizes"]
    others = max(case["other_cores"] for case in result["features"])
    return (
        f"{_table(rows)}\n\n{sizes['texts']} random captions of {sizes['min']:.0f} to {sizes['max']:.0f} tokens, half "
        f"of them {sizes['q1']:.0f} to {sizes['q3']:.0f}, from ids on the host; whole: calls for `text_embeds` of all "
        f"77 tokens, as many texts at a time. Random weights; medians (quartiles) of {result['rounds']} interleaved "
        f"runs, and of their ratios, below 1 buckets are faster. {result['device']}, at most {others} CPU cores taken "
        f"by others; {listed(result['versions'])}; {when(result)}; `{source}`."
    )


def _render_kernels(result: Mapping[str, Any], source: str) -> str:
    counts = {"all": "kernels", "products": "products", "cudnn": "by cuDNN", "graphs": "CUDA graphs"}
    header = ["family", "params", "attention", *counts.values(), "outside of graphs", "temporary memory, MiB"]
    rows = [header, [*["---"] * 3, *["---:"] * len(header[3:])]]
    for case in result["kernels"]:
        numbers = [f"{case[name]:,}" for name in (*counts, "outside")]
        rows.append([case["family"], case["params"], case["attention"], *numbers, f"{case['temporary_mib']:,.1f}"])
    return (
        f"{_table(rows)}\n\nOf a call with one prompt, and its negative where the family has guidance, in bfloat16; "
        f"compiled for a description of {result['target']}, so without autotuning; nothing was run. "
        f"{listed(result['versions'])}; {when(result)}; `{source}`."
    )


def _render_profile(result: Mapping[str, Any], source: str) -> str:
    if not result["profile"]:
        raise ReportError(f"{source} has no program that ran.")
    kinds = list(result["profile"][0]["profiled_ms"])
    header = ["preset", "program", "ms", "in the profile", *kinds]
    rows = [header, ["---", "---", *["---:"] * len(header[2:])]]
    for case in result["profile"]:
        ms, profiled = case["ms"], case["profiled_ms"]
        spread = f"{number(ms['median'])} ({number(ms['q1'])} to {number(ms['q3'])})"
        parts = [number(profiled[kind]) for kind in kinds]
        rows.append([case["preset"], case["program"], spread, number(sum(profiled.values())), *parts])
    others = max(case["other_cores"] for case in result["profile"])
    left_out = "".join(f" Left out: {case} ({why})." for case, why in result.get("left_out", {}).items())
    return (
        f"{_table(rows)}\n\nMilliseconds of a call with one prompt, and its negative where the family has guidance; "
        f"random weights; {result['calls']} warm calls without the profiler, median (quartiles), and as many with it, "
        f"of which the middle half by time is averaged.{left_out} {result['device']}, at most {others} CPU cores taken "
        f"by others; {listed(result['versions'])}; {when(result)}; `{source}`."
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def splice(text: str, table: str, name: str) -> str:
    """A document with `table` between the markers called `name`.

    Raises:
        ReportError: The markers are not there, or not once each and in order.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, start, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (start and end) or first in rest or last in before + after:
        raise ReportError(
            f"Expected {first} and {last} once each, in this order; put them where the table is to stand."
        )
    return f"{before}{first}\n\n{table}\n\n{last}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("result", type=Path)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="fail unless the documents have the tables of the result")
    what.add_argument("--write", action="store_true", help="put them there")
    args = parser.parse_args(argv)
    try:
        result = json.loads(args.result.read_text(encoding="utf-8"))
        for table in tables(result, args.result.name):
            if not (args.check or args.write):
                print(table.text)
                continue
            path = ROOT / table.document
            text = path.read_text(encoding="utf-8")
            try:
                wanted = splice(text, table.text, table.marker)
            except ReportError as error:
                raise ReportError(f"{path}: {error}") from error
            if args.write:
                new = path.with_name(f".{path.name}.new")  # so that a full disk takes no document with it
                new.write_text(wanted, encoding="utf-8")
                new.replace(path)
            elif wanted != text:
                sys.exit(
                    f"bench.report: the table {table.marker} in {path} is not that of {args.result}. "
                    f"Update it: python -m bench.report {args.result} --write"
                )
    except (OSError, ReportError) as error:
        sys.exit(f"bench.report: {error}")


_README, _BENCH = "README.md", "bench/README.md"

#: By benchmark of `python -m bench`, the document of its table.
_DOCUMENTS = {"encode": _BENCH, "compat": "docs/migration.md", "cold": _README, "cache": _README}

#: By the key that tells them from each other, the marker, document and table of the other results.
_KINDS: dict[str, tuple[str, str, Callable[[Mapping[str, Any], str], str]]] = {
    "errors": ("parity", _README, _render_errors),
    "peaks": ("bench:memory", _README, _render_peaks),
    "flops": ("bench:flops", _README, _render_flops),
    "formats": ("bench:formats", _README, _render_formats),
    "quantized": ("bench:quantize", _README, _render_quantized),
    "scan": ("bench:scan", _BENCH, _render_scan),
    "features": ("bench:features", _BENCH, _render_features),
    "kernels": ("bench:kernels", _BENCH, _render_kernels),
    "profile": ("bench:profile", _BENCH, _render_profile),
}


if __name__ == "__main__":
    main()
