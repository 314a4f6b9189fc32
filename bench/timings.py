"""The tables of `encode`, `compat`, `cold` and `cache`: a row for each contender of each case. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bench.presets import LARGE_PRESETS, PRESETS, rows_of

SCHEMA = 4

_Json = Mapping[str, Any]


class _Row(NamedTuple):
    """A contender of a case: its name, and what the case has of it."""

    case: _Json
    name: str
    entry: _Json


_Cell = Callable[[_Row], str]
#: Heading, alignment, and what is in it.
_Column = tuple[str, str, _Cell]


def rows(result: _Json) -> list[list[str]]:
    """Header, alignments, and a row for each contender of each case."""
    columns = [part for column in _COLUMNS[result["benchmark"]] for part in _expanded(column, result)]
    header = [[name for name, _, _ in columns], [align for _, align, _ in columns]]
    return header + [
        [cell(_Row(case, name, entry)) for _, _, cell in columns]
        for case in result["cases"]
        for name, entry in case["contenders"].items()
    ]


def _expanded(column: _Column, result: _Json) -> list[_Column]:
    """Itself; that of ratios once for each contender that others are compared with."""
    if column is not _RATIO:
        return [column]
    ours = compared(result)
    return [(f"ratio of {name}" if len(ours) > 1 else "ratio", "---:", _ratio(name)) for name in ours]


def compared(result: _Json) -> list[str]:
    """The contenders that others are compared with."""
    return list(dict.fromkeys(name for case in result["cases"] for name in case["ratios"]))


def where(result: _Json) -> str:
    """The machine."""
    devices = dict.fromkeys(about["device"] for about in result["contenders"].values())
    return f"{' / '.join(devices)}, {result['host']['cores']} CPU cores"


def when(result: _Json) -> str:
    """The day, and the version."""
    commit = f"commit {result['commit'][:7]}" if result["commit"] else "no commit"
    return f"{result['date'][:10]}, {commit}{' with uncommitted changes' if result['dirty'] else ''}"


def listed(versions: Mapping[str, str]) -> str:
    """Of Python, which comes first, and of packages."""
    python, *others = (f"{name} {version}" for name, version in versions.items())
    return f"{', '.join(others)} on {python}"


def fewer(result: _Json) -> str:
    """That larger batches have fewer calls, where there are any."""
    return " (fewer of larger batches)" if max(case["batch"] for case in result["cases"]) > 1 else ""


def of_flux(result: _Json) -> str:
    """What a pair is in cases of FLUX, where there are any."""
    return " Of FLUX a prompt alone." if any(case["preset"] in LARGE_PRESETS for case in result["cases"]) else ""


def title(case: _Json) -> str:
    """A case, for people."""
    unit, batch = "pair" if case["preset"] in PRESETS else "row", case["batch"]
    return f"{case['preset']}, {case['precision']}, {batch} {unit}{'s' if batch > 1 else ''}"


def caption(result: _Json, source: str) -> str:
    """What the table shows, where it was measured and with what, and who is left out and why."""
    others = max(case["other_cores"] for case in result["cases"])
    facts = [
        f"{where(result)}, at most {others} of them taken by others",
        *dict.fromkeys(listed(about["versions"]) for about in result["contenders"].values()),
        when(result),
        f"`{source}`",
    ]
    settings = result["settings"]
    text = (
        f"{_WHAT[result['benchmark']]}{of_flux(result)} Weights: {settings['weights']}. "
        f"{settings['repeats']} interleaved {_UNIT[result['benchmark']]}{fewer(result)}: "
        f"median (quartiles); ratio: median (min to max) of the pairwise ratios {_ratio_of(result)}. "
        f"{'; '.join(facts)}."
    )
    if ceilings := result.get("ceilings"):
        products = ", ".join(f"{value:,.0f} in {name}" for name, value in ceilings["matmul_gops"].items())
        text += (
            f" The ceiling is what was measured in the same run: products of square matrices at {products} "
            f"(thousand million operations per second), {ceilings['copy_gbps']:,.0f} GB/s of memory."
        )
    if reasons := _left_out(result):
        text += f" Left out: {'; '.join(reasons)}."
    return text


def _left_out(result: _Json) -> list[str]:
    reasons = [f"{name} ({reason})" for name, reason in result["left_out"].items()]
    for case in result["cases"]:
        reasons += [f"{name} of {title(case)} ({reason})" for name, reason in case["left_out"].items()]
    return reasons


def _ratio_of(result: _Json) -> str:
    names = compared(result)
    if result["benchmark"] == "cache":
        return f'to "{names[0]}"'
    if len(names) > 1:
        return "of one of ours and the other, below 1 ours is faster"
    return f"of {names[0]} and the other, below 1 {names[0]} is faster"


def number(value: float) -> str:
    """Three digits that say something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _spread(scale: float, field: str = "ms") -> _Cell:
    def cell(row: _Row) -> str:
        median, q1, q3 = (number(row.entry[field][key] * scale) for key in ("median", "q1", "q3"))
        return f"{median} ({q1} to {q3})"

    return cell


def _ratio(name: str) -> _Cell:
    def cell(row: _Row) -> str:
        ratio = row.case["ratios"].get(name, {}).get(row.name)
        if not ratio:
            return ""
        digits = 2 if ratio["median"] >= 0.01 else 5 if ratio["median"] >= 0.0001 else 6
        return f"{ratio['median']:.{digits}f} ({ratio['min']:.{digits}f} to {ratio['max']:.{digits}f})"

    return cell


def _throughput(row: _Row) -> str:
    return number(1e3 * rows_of(row.case["preset"], row.case["batch"]) / row.entry["ms"]["median"])


def _share(row: _Row) -> str:
    return f"{row.entry['least_ms'] / row.entry['ms']['median']:.0%}" if "least_ms" in row.entry else ""


def _error(key: str, form: str) -> _Cell:
    def cell(row: _Row) -> str:
        return format(row.entry["error"][key], form) if "error" in row.entry else ""

    return cell


def _field(key: str) -> _Cell:
    return lambda row: f"{row.entry[key]:,.2f}" if isinstance(row.entry[key], float) else f"{row.entry[key]:,}"


_PRESET = ("preset", "---", lambda row: row.case["preset"])
_NAME = ("contender", "---", lambda row: row.name)
_RATIO = ("ratio", "---:", _ratio(""))  # stands for one or more: `_expanded`
_RELATIVE = ("relative error", "---:", _error("relative", ".1e"))
_PEAK = ("peak RSS, MiB", "---:", _field("peak_rss_mib"))
_AFTER_PAUSE = ("after a pause, ms", "---:", _spread(1, "after_pause_ms"))
_FIRST = ("first call, s", "---:", _field("first_call_s"))

_COLUMNS: dict[str, list[_Column]] = {
    "encode": [
        _PRESET,
        ("precision", "---", lambda row: row.case["precision"]),
        ("pairs", "---:", lambda row: str(row.case["batch"])),
        _NAME,
        ("ms", "---:", _spread(1)),
        _RATIO,
        ("prompts/s", "---:", _throughput),
        _AFTER_PAUSE,
        _RELATIVE,
        ("least cosine", "---:", _error("min_cosine", ".5f")),
        _FIRST,
        _PEAK,
        ("of the ceiling", "---:", _share),
    ],
    "compat": [_PRESET, _NAME, ("ms", "---:", _spread(1)), _RATIO, _AFTER_PAUSE, _FIRST, _PEAK, _RELATIVE],
    "cold": [
        _PRESET,
        _NAME,
        ("whole process, s", "---:", _spread(1e-3)),
        _RATIO,
        ("import, s", "---:", _field("import_s")),
        ("load, s", "---:", _field("load_s")),
        _FIRST,
        _PEAK,
    ],
    "cache": [_PRESET, ("call", "---", lambda row: row.name), ("microseconds", "---:", _spread(1e3)), _RATIO],
}
_WHAT = {
    "encode": "Guidance pairs of token ids to embeddings; a pair is two prompts.",
    "compat": "One row of token ids, as numpy has them, to what FLUX takes of it; float32.",
    "cold": "From the start of Python to the first embeddings of a guidance pair; float32, files in the page cache.",
    "cache": "`encoder(prompt, negative_prompt)`, strings to embeddings of a guidance pair; float32.",
}
_UNIT = {
    "encode": "warm calls with each peer",
    "compat": "warm calls with each peer",
    "cold": "processes each",
    "cache": "calls each",
}
