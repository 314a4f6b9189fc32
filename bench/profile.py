"""Where the time of a call goes, by what the operations are for: `python -m bench.profile`.

JAX's profiler tells which operations of the compiled program ran, and when; the program itself tells of each from which
module it comes. On a GPU they are started one by one meanwhile, and not as one CUDA graph: there is more time between
them than there would be otherwise, while the time of each is its own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

import clip_jax
from bench.host import ROOT, slug, stamp, tell_noise, versions, watch_others
from bench.presets import LARGE_PRESETS, PRESETS
from bench.stats import summary
from bench.workers.about import device_facts
from clip_jax import TextEmbeddings, TextEncoder, Tokens
from clip_jax.embed import embed
from clip_jax.errors import ClipJaxError
from clip_jax.frozen import freeze
from clip_jax.handover import pack, pays

_WARMUP, _CALLS = 4, 20
_CALL = "one call"  # what each is called in the profile

#: Platform -> program -> options of `load`; "freeze" is for `compiled`.
_PROGRAMS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "cpu": {
        "float32": {},
        "float32, frozen": {"freeze": True},
        "bfloat16": {"dtype": "bfloat16"},
        "bfloat16, frozen": {"dtype": "bfloat16", "freeze": True},
        "int8": {"quantize": "int8"},
    },
    "gpu": {
        "bfloat16": {"dtype": "bfloat16"},
        "bfloat16, cuDNN": {"dtype": "bfloat16", "attention": "cudnn"},
        "int8": {"dtype": "bfloat16", "quantize": "int8"},
        "fp8": {"dtype": "bfloat16", "quantize": "fp8"},
    },
}

#: What an operation is for, and what its path in the program has in it; the first that fits.
_SCOPES = {
    "around products": r"/(\w+_proj|text_projection|fc[12]|[qkvo]|w[io](_[01])?)/",  # quantising, casts, biases
    "attention": "/(self_attn|SelfAttention)/",
    "norms": r"norm\w*/",
    "activations": "/(mlp|DenseReluDense)/",
    "the rest": "",  # embeddings, residuals
}
KINDS = ("products", *_SCOPES)
BETWEEN = "between"

_INSTRUCTION = re.compile(r"^ *(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<text>.*)$", re.MULTILINE)
_PRODUCT = re.compile(r"gemm|__onednn\$matmul|__cublas|/dot_general$")
_PATH = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_NAME = re.compile(r"%([\w.-]+)")


class Span(NamedTuple):
    """What took from `begin` to `end`, in nanoseconds."""

    begin: float
    end: float
    name: str


def main(argv: Sequence[str] | None = None) -> None:
    device = device_facts()
    if device["platform"] not in _PROGRAMS:
        sys.exit(f"bench.profile: is for {' and '.join(_PROGRAMS)}, found {device['platform']}.")
    programs = _PROGRAMS[device["platform"]]
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["sd15"], choices=(*PRESETS, *LARGE_PRESETS))
    parser.add_argument("--programs", nargs="+", default=list(programs), choices=programs, metavar="PROGRAM")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    args = parser.parse_args(argv)
    cases = [(preset, name) for preset in args.presets for name in args.programs]
    result: dict[str, Any] = {
        **stamp(),
        "platform": device["platform"],
        "device": device["name"],
        "versions": versions("jax", "jaxlib", "flax"),
        "calls": _CALLS,
        "profile": [],
        "left_out": {},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / f"profile-{slug(device)}.json"
    for preset, name in tqdm(cases, disable=None):
        try:
            result["profile"].append(_measure(preset, name, programs[name]))
        except (ClipJaxError, RuntimeError) as error:  # what a device cannot do loses nothing of what it can
            result["left_out"][f"{preset} {name}"] = str(error).partition("\n")[0]
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for case in result["profile"]:
        tell_noise(case["other_cores"], f"{case['preset']} {case['program']}")
    for case, why in result["left_out"].items():
        print(f"bench.profile: {case} is left out: {why}", file=sys.stderr)


def _measure(preset: str, program: str, options: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(options)
    frozen = options.pop("freeze", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the weights are random
        encoder = clip_jax.load(f"random:{preset}", progress=False, cache_bytes=0, **options)
    negative = "blurry, low quality" if encoder.family.guidance else None
    tokens = encoder.tokenize("a cat sitting on a windowsill", negative_prompt=negative)
    run, text = compiled(encoder, tokens, frozen=frozen)
    for _ in range(_WARMUP):
        run()
    other_cores = watch_others()
    ms = [_milliseconds(run) for _ in range(_CALLS)]
    of_each = kinds(text)
    calls = [shares(call, within, of_each) for call, within in profiled(run)]
    return {
        "preset": preset,
        "program": program,
        "other_cores": other_cores(),
        "ms": {**summary(ms), "samples": ms},
        "profiled_ms": {name: round(value / 1e6, 4) for name, value in middle(calls).items()},
    }


def compiled(encoder: TextEncoder, tokens: Tokens, *, frozen: bool) -> tuple[Callable[[], object], str]:
    """A call of the encoder's program with these ids, to its end; and that program as XLA writes it down."""
    others = encoder.family, encoder.dtype, (None, None), encoder.attention

    def function(params: Any, tokens: Tokens) -> TextEmbeddings:
        return embed(params, tokens, *others)

    if frozen:
        program = freeze(function, encoder.params, tokens, encoder.dtype)
        return lambda: jax.block_until_ready(program(tokens)), program.func.as_text()
    given, layout = pack(encoder.params) if pays(encoder.params) else (encoder.params, None)
    jitted = jax.jit(lambda given, tokens: function(layout.unpacked(given) if layout else given, tokens))
    executable = jitted.lower(given, tokens).compile()
    return lambda: jax.block_until_ready(executable(given, tokens)), executable.as_text()


def profiled(run: Callable[[], object]) -> list[tuple[Span, list[Span]]]:
    """Each of some calls, and the operations within it."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(_CALLS):
                with jax.profiler.TraceAnnotation(_CALL):
                    run()
        spans = _spans(Path(folder))
    calls = [span for span, is_call in spans if is_call]
    operations = [span for span, is_call in spans if not is_call]
    return [(call, [one for one in operations if call.begin <= one.begin < call.end]) for call in calls]


def _spans(folder: Path) -> list[tuple[Span, bool]]:
    """The operations in a profile, and the calls, in the order in which they begin; and whether it is a call."""
    (file,) = folder.rglob("*.xplane.pb")
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its own type; as an error it would end the process
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for event in (event for line in plane.lines for event in line.events):
                name = _CALL if event.name == _CALL else dict(event.stats).get("hlo_op")
                if name is not None:
                    found.append((Span(event.start_ns, event.end_ns, str(name)), name == _CALL))
    return sorted(found)


def kinds(program: str) -> dict[str, str]:
    """What each operation of a program is for, as in `KINDS`; of XLA's text."""
    found: dict[str, str] = {}
    for instruction in _INSTRUCTION.finditer(program):
        path, target = (pattern.search(instruction["text"]) for pattern in (_PATH, _TARGET))
        if path:
            kind = next(kind for kind, pattern in _SCOPES.items() if re.search(pattern, path[1]))
        else:  # a product of attention loses its path when XLA rewrites it, what it is made of keeps its own
            operands = (found.get(name) for name in _NAME.findall(instruction["text"]))
            kind = next((kind for kind in operands if kind), "the rest")
        itself = [instruction["name"], *(match[1] for match in (path, target) if match)]  # not what it is made of
        if kind != "attention" and any(map(_PRODUCT.search, itself)):
            kind = "products"  # whatever its path, which may be that of a residual that is added in it
        found[instruction["name"]] = kind
    return found


def shares(call: Span, operations: Iterable[Span], kinds: Mapping[str, str]) -> dict[str, float]:
    """Nanoseconds of a call by kind, and between operations; those that run at the same time share it."""
    found = dict.fromkeys((*KINDS, BETWEEN), 0.0)
    changes = [(call.end, 0, "the rest")]
    for begin, end, name in operations:
        kind = kinds.get(name.partition("__onednn$")[0], "the rest")
        changes += [(begin, 1, kind), (min(end, call.end), -1, kind)]
    running, now = Counter[str](), call.begin
    for until, change, kind in sorted(changes):
        for one, count in running.items():
            found[one] += (until - now) * count / running.total()
        if not running:
            found[BETWEEN] += until - now
        now = until
        running[kind] += change
        running = +running  # without what has ended
    return found


def middle(calls: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of the middle half of calls by their time: unlike medians, its parts add up."""
    quarter = len(calls) // 4
    kept = sorted(calls, key=lambda call: sum(call.values()))[quarter : len(calls) - quarter]
    return {name: sum(call[name] for call in kept) / len(kept) for name in kept[0]}


def _milliseconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return round(1e3 * (time.perf_counter() - begin), 3)


if __name__ == "__main__":
    main()
