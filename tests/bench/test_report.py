"""The tables of a made-up result, and that --check finds every difference."""

import copy
import json

import pytest

from bench import report
from bench.report import ReportError, main, splice, tables
from tests.bench.fakes import RESULT

START, END = "<!-- bench:encode -->", "<!-- /bench:encode -->"
TABLE = """\
| preset | precision | pairs | contender | ms | ratio | prompts/s | after a pause, ms | relative error | least cosine \
| first call, s | peak RSS, MiB | of the ceiling |
| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| sd15 | float32 | 8 | clip_jax | 50.0 (50.0 to 51.0) |  | 320 | 1,050 (1,050 to 1,051) | 0.0e+00 | 1.00000 | 1.50 | \
1,234 | 80% |
| sd15 | float32 | 8 | torch eager | 100 (90.0 to 1,234) | 0.50 (0.46 to 1.20) | 160 | 1,100 (1,090 to 2,234) | \
1.2e-02 | 0.99987 | 1.50 | 1,234 |  |
| sdxl | int8 | 1 | torch compiled | 9.50 (9.00 to 10.0) |  | 211 | 1,010 (1,009 to 1,010) |  |  | 1.50 | 1,234 |  |

Guidance pairs of token ids to embeddings; a pair is two prompts. Weights: random, the same in all. 15 interleaved \
warm calls with each peer (fewer of larger batches): median (quartiles); ratio: median (min to max) of the pairwise \
ratios of clip_jax and the other, below 1 clip_jax is faster. Some CPU, 4 CPU cores, at most 0.03 of them taken by \
others; clip-jax-text 0.1.0, jax 0.12.0 on python 3.14.1; torch 2.13.0 on python 3.11.7; 2026-01-02, commit 0123456; \
`run.json`. The ceiling is what was measured in the same run: products of square matrices at 1,234 in float32, 5,000 \
in int8 (thousand million operations per second), 20 GB/s of memory. Left out: OpenVINO (nncf not installed); torch \
compiled of sd15, float32, 8 pairs (ended with exit code 1); clip_jax of sdxl, int8, 1 pair (this clip_jax does not \
quantise)."""
RATIOS = """\
| preset | precision | pairs |  | ms | torch eager |
| --- | --- | ---: | --- | ---: | ---: |
| sd15 | float32 | 8 | clip_jax | 50.0 | 0.50 |

Guidance pairs of token ids to embeddings: our time, and that divided by each peer's in the same precision; below 1 \
ours is faster. Medians of 15 interleaved warm calls with each peer (fewer of larger batches), and of their ratios; \
Some CPU, 4 CPU cores; ours with jax 0.12.0 on python 3.14.1; 2026-01-02, commit 0123456; `run.json`. Spread, errors, \
first calls, memory, versions of all: [bench/README.md](bench/README.md#results)."""
DOCUMENT = f"# Title\n\n{START}\nold\n{END}\n\nMore text.\n"


def render(result, source):
    """The first table of a result."""
    return tables(result, source)[0].text


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A result, and its documents: the whole table is in bench/README.md, a short one in README.md."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(RESULT))
    (tmp_path / "README.md").write_text("<!-- bench:ratios --><!-- /bench:ratios -->")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "README.md").write_text(DOCUMENT)
    return str(tmp_path / "run.json"), tmp_path / "bench" / "README.md"


def test_render():
    assert [table.text for table in tables(RESULT, "run.json")] == [TABLE, RATIOS]


def test_the_short_table_has_a_row_for_each_of_ours_and_a_column_for_each_peer():
    first, last = copy.deepcopy(RESULT["cases"][0]), copy.deepcopy(RESULT["cases"][0])
    first["contenders"]["clip_jax, frozen"] = first["contenders"]["clip_jax"]
    first["ratios"] = {
        "clip_jax": {"clip_jax, frozen": RATIO, "torch eager": RATIO | {"median": 0.9}},
        "clip_jax, frozen": {"clip_jax": RATIO, "torch eager": RATIO | {"median": 0.8}},
    }
    last |= {"precision": "int8", "ratios": {"clip_jax": {"OpenVINO, dynamic": RATIO | {"median": 1.234}}}}
    lines = tables({**RESULT, "cases": [first, last]}, "run.json")[1].text.splitlines()
    assert lines[0] == "| preset | precision | pairs |  | ms | torch eager | OpenVINO, dynamic |"
    assert lines[2:5] == [
        "| sd15 | float32 | 8 | clip_jax | 50.0 | 0.90 |  |",
        "| sd15 | float32 | 8 | clip_jax, frozen | 50.0 | 0.80 |  |",
        "| sd15 | int8 | 8 | clip_jax | 50.0 |  | 1.23 |",
    ]


def test_the_short_table_tells_of_fewer_calls_only_where_there_are_fewer():
    case = copy.deepcopy(RESULT["cases"][0]) | {"batch": 1}
    caption = tables({**RESULT, "cases": [case]}, "run.json")[1].text.splitlines()[-1]
    assert "warm calls with each peer, and of their ratios;" in caption


def test_outside_a_commit_with_nothing_left_out():
    result = copy.deepcopy(RESULT) | {"commit": None, "dirty": True, "left_out": {}, "cases": RESULT["cases"][:1]}
    result["cases"] = [{**RESULT["cases"][0], "left_out": {}}]
    del result["ceilings"]
    text = render(result, "run.json")
    assert text.endswith("on python 3.11.7; 2026-01-02, no commit with uncommitted changes; `run.json`.")


@pytest.mark.parametrize(
    ("name", "header", "row"),
    [
        (
            "compat",
            "| preset | contender | ms | ratio | after a pause, ms | first call, s | peak RSS, MiB | relative error |",
            "| clip_l | torch eager | 100 (90.0 to 1,234) | 0.50 (0.46 to 1.20) | 1,100 (1,090 to 2,234) | 1.50 | "
            "1,234 | 1.2e-02 |",
        ),
        (
            "cold",
            "| preset | contender | whole process, s | ratio | import, s | load, s | first call, s | peak RSS, MiB |",
            "| clip_l | torch eager | 0.10 (0.09 to 1.23) | 0.50 (0.46 to 1.20) | 3.00 | 0.25 | 1.50 | 1,234 |",
        ),
        (
            "cache",
            "| preset | call | microseconds | ratio |",
            "| clip_l | torch eager | 100,040 (90,000 to 1,234,400) | 0.50 (0.46 to 1.20) |",
        ),
    ],
)
def test_the_other_benchmarks_have_columns_of_their_own(name, header, row):
    case = copy.deepcopy(RESULT["cases"][0]) | {"preset": "clip_l", "batch": 1}
    for entry in case["contenders"].values():
        entry |= {"import_s": 3.0, "load_s": 0.25}
    result = {**RESULT, "benchmark": name, "cases": [case]}
    lines = render(result, "run.json").splitlines()
    assert lines[0] == header
    assert lines[3] == row
    document = "docs/migration.md" if name == "compat" else "README.md"
    assert places(result) == [(f"bench:{name}", document)]


def places(result):
    return [(table.marker, table.document) for table in tables(result, "run.json")]


def test_every_table_has_its_document_and_its_markers():
    assert places(RESULT) == [("bench:encode", "bench/README.md"), ("bench:ratios", "README.md")]
    assert [marker for marker, _ in places({**RESULT, "platform": "gpu"})] == ["bench:encode:gpu", "bench:ratios:gpu"]
    assert places(PARITY) == [("parity", "README.md")]


def test_each_of_ours_has_a_column_of_ratios():
    case = copy.deepcopy(RESULT["cases"][0])
    case["contenders"]["clip_jax, frozen"] = case["contenders"]["clip_jax"]
    case["ratios"] |= {"clip_jax, frozen": {"torch eager": RATIO | {"median": 0.25, "min": 0.2, "max": 0.3}}}
    lines = render({**RESULT, "cases": [case]}, "run.json").splitlines()
    assert " | ratio of clip_jax | ratio of clip_jax, frozen | " in lines[0]
    assert " | 0.50 (0.46 to 1.20) | 0.25 (0.20 to 0.30) | " in lines[3]
    assert "pairwise ratios of one of ours and the other, below 1 ours is faster." in lines[-1]


RATIO = {"median": 0.000291, "min": 0.0002, "max": 0.0123}


def test_ratios_of_the_cache_are_to_its_first_call():
    case = {**RESULT["cases"][0], "ratios": {"clip_jax": {"torch eager": RATIO}}}
    text = render({**RESULT, "benchmark": "cache", "cases": [case]}, "run.json")
    assert 'of the pairwise ratios to "clip_jax".' in text
    assert "| 0.00029 (0.00020 to 0.01230) |" in text


SCAN = {
    "date": "2026-01-02T03:04:05+00:00",
    "device": "Some CPU",
    "versions": {"python": "3.14.1", "jax": "0.12.0"},
    "rounds": 15,
    "scan": [
        {
            "family": "sd15",
            "dtype": "float32",
            "layers": 12,
            "other_cores": 0.01,
            "first_call_s": {"unrolled": 1.234, "scan": 0.5},
            "ms": {"unrolled": {"median": 80.0}, "scan": {"median": 100.0}},
            "ratio": {"median": 0.8, "min": 0.75, "max": 0.9},
        }
    ],
}


def test_the_scan_is_in_the_document_of_the_benchmarks():
    assert places(SCAN) == [("bench:scan", "bench/README.md")]
    lines = render(SCAN, "scan.json").splitlines()
    assert lines[2] == "| sd15, float32 | 12 | 1.23 | 0.50 | 80.0 | 100 | 0.80 (0.75 to 0.90) |"
    assert "Some CPU, at most 0.01 CPU cores taken by others; random weights" in lines[-1]


def test_the_scan_tells_how_many_cores_others_took():
    cases = [{**SCAN["scan"][0], "other_cores": cores} for cores in (0.02, 0.04)]
    text = render({**SCAN, "scan": cases}, "scan.json")
    assert "Some CPU, at most 0.04 CPU cores taken by others; random weights" in text


FEATURES = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789",
    "dirty": False,
    "platform": "cpu",
    "device": "Some CPU",
    "versions": {"python": "3.14.1", "jax": "0.12.0"},
    "rounds": 9,
    "sizes": {"texts": 256, "min": 6.0, "max": 50.0, "q1": 11.0, "q3": 18.0, "median": 14.0},
    "features": [
        {
            "model": "ViT-B/32",
            "dtype": "float32",
            "other_cores": cores,
            "relative_error": 1.23e-6,
            "texts_per_second": {
                "in buckets": {"median": 123.4, "q1": 120.0, "q3": 130.0},
                "whole": {"median": 40.0, "q1": 39.0, "q3": 41.0},
            },
            "ratio": {"median": 0.3251, "min": 0.31, "max": 0.333},
        }
        for cores in (0.02, 0.04)
    ],
}


def test_text_features_in_buckets_and_whole():
    assert places(FEATURES) == [("bench:features", "bench/README.md")]
    *_, row, _, caption = render(FEATURES, "features.json").splitlines()
    assert row == "| ViT-B/32, float32 | 123 (120 to 130) | 40.0 (39.0 to 41.0) | 0.33 (0.31 to 0.33) | 1.2e-06 |"
    assert caption.startswith("256 random captions of 6 to 50 tokens, half of them 11 to 18,")
    assert (
        "Some CPU, at most 0.04 CPU cores taken by others; jax 0.12.0 on python 3.14.1; 2026-01-02, commit 0123456;"
        in caption
    )
    assert places({**FEATURES, "platform": "gpu"}) == [("bench:features:gpu", "bench/README.md")]


FLOPS = {
    "python": "3.11.7",
    "versions": {"jax": "0.1"},
    "flops": {"sdxl": {"program": 1e11, "towers": 1.25e11}},
}


def test_operations_are_held_against_what_diffusers_runs():
    *_, row, _, caption = render(FLOPS, "flops.json").splitlines()
    assert row == "| sdxl | 100.0 | 125.0 | 80% |"
    assert "towers whole: every block of every tower, on the rows that diffusers runs;" in caption


KERNELS = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "dirty": False,
    "target": "Some GPU",
    "versions": {"python": "3.14.1", "jax": "0.12.0"},
    "kernels": [
        {
            "family": "sd15",
            "params": "int8",
            "attention": "cudnn",
            "all": 1181,
            "products": 72,
            "cudnn": 12,
            "graphs": 1,
            "outside": 3,
            "temporary_mib": 6.54,
        }
    ],
}


def test_kernels_are_in_the_document_of_the_benchmarks():
    assert places(KERNELS) == [("bench:kernels", "bench/README.md")]
    lines = render(KERNELS, "kernels.json").splitlines()
    assert lines[2] == "| sd15 | int8 | cudnn | 1,181 | 72 | 12 | 1 | 3 | 6.5 |"
    assert "compiled for a description of Some GPU, so without autotuning; nothing was run." in lines[-1]


PROFILE = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "dirty": True,
    "platform": "cpu",
    "device": "Some CPU",
    "versions": {"python": "3.14.1", "jax": "0.12.0"},
    "calls": 20,
    "profile": [
        {
            "preset": "sd15",
            "program": "int8",
            "other_cores": 0.02,
            "ms": {"median": 26.04, "q1": 25.0, "q3": 1234.0},
            "profiled_ms": {"products": 20.0, "attention": 3.5, "between": 0.125},
        }
    ],
}


def test_a_profile_tells_what_its_parts_add_up_to():
    assert places(PROFILE) == [("bench:profile", "bench/README.md")]
    assert places({**PROFILE, "platform": "gpu"}) == [("bench:profile:gpu", "bench/README.md")]
    header, _, row, _, caption = render(PROFILE, "profile.json").splitlines()
    assert header == "| preset | program | ms | in the profile | products | attention | between |"
    assert row == "| sd15 | int8 | 26.0 (25.0 to 1,234) | 23.6 | 20.0 | 3.50 | 0.12 |"
    assert "20 warm calls without the profiler" in caption
    assert "2026-01-02, commit 0123456 with uncommitted changes; `profile.json`." in caption
    assert "Left out" not in caption
    assert "Left out: sd15 fp8 (no fp8)." in render({**PROFILE, "left_out": {"sd15 fp8": "no fp8"}}, "profile.json")
    with pytest.raises(ReportError, match=r"profile\.json has no program that ran"):
        render({**PROFILE, "profile": []}, "profile.json")


def test_prompts_of_flux_are_no_pairs():
    flux = {**RESULT, "cases": [{**RESULT["cases"][0], "preset": "flux"}]}
    whole, short = (table.text for table in tables(flux, "run.json"))
    assert "a pair is two prompts. Of FLUX a prompt alone. Weights:" in whole
    assert "`run.json`. Of FLUX a prompt alone. Spread" in short
    assert "Of FLUX" not in render(RESULT, "run.json")


def test_another_schema_is_refused():
    with pytest.raises(ReportError, match=r"run\.json has schema 1; expected 4"):
        render({**RESULT, "schema": 1}, "run.json")


def test_print(files, capsys):
    main([files[0]])
    assert capsys.readouterr().out == f"{TABLE}\n{RATIOS}\n"


def test_write_then_check(files, tmp_path):
    result, document = files
    main([result, "--write"])
    assert document.read_text() == f"# Title\n\n{START}\n\n{TABLE}\n\n{END}\n\nMore text.\n"
    assert RATIOS in (tmp_path / "README.md").read_text()
    main([result, "--check"])
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text().replace("0.50", "0.40"))
    with pytest.raises(SystemExit, match="the table bench:ratios in .*README.md is not that of"):
        main([result, "--check"])


@pytest.mark.parametrize("change", [("50.0 (", "49.0 ("), ("\n| sdxl", "\n\n| sdxl"), ("3.14.1", "3.14.2")])
def test_check_fails_when_the_document_differs(files, change, capsys):
    result, document = files
    main([result, "--write"])
    assert change[0] in document.read_text()
    document.write_text(document.read_text().replace(*change))
    with pytest.raises(SystemExit, match="is not that of") as exit_:
        main([result, "--check"])
    assert exit_.value.code  # a message: Python prints it and exits with 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "readme",
    ["", START, f"{END} {START}", f"{START} {START} {END}", f"{START} {END} {END}", f"{END} {START} {END}"],
)
def test_markers_must_be_there_once_each_and_in_order(readme):
    with pytest.raises(ReportError, match="once each"):
        splice(readme, "table", "bench:encode")


def test_a_missing_file_is_an_error_message(files):
    files[1].unlink()
    with pytest.raises(SystemExit, match="No such file"):
        main([files[0], "--check"])


PARITY = {
    "date": "2026-01-02",
    "machine": "x86_64",
    "python": "3.11.7",
    "versions": {"jax": "0.1", "torch": "2.0"},
    "errors": {"sd15": {"max_abs_error": 4.649e-06, "largest_value": 3.7602, "tolerance": 2e-05}},
}


def test_errors_have_a_table_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    result, readme = tmp_path / "parity.json", tmp_path / "README.md"
    result.write_text(json.dumps(PARITY))
    readme.write_text("<!-- parity --><!-- /parity --> <!-- bench:ratios --> kept <!-- /bench:ratios -->")
    main([str(result), "--write"])
    assert "| sd15 | 4.6e-06 | 3.8 | 2e-05 |" in readme.read_text()
    assert (
        "float32, on CPU (x86_64), 2026-01-02; jax 0.1, torch 2.0 on Python 3.11.7; `parity.json`."
        in readme.read_text()
    )
    assert "kept" in readme.read_text()
    main([str(result), "--check"])


FORMATS = {
    "date": "2026-01-02T03:04:05+00:00",
    "python": "3.11.7",
    "versions": {"jax": "0.1", "gguf": "0.2"},
    "formats": {"T5 in GGUF": {"files_mib": 5000, "params_mib": 9000.4, "peak_mib": 1175.25, "before_mib": 275.25}},
}


def test_formats_have_a_table_of_their_own():
    header, _, row, _, caption = render(FORMATS, "formats.json").splitlines()
    assert header.startswith("| model and format | files, MiB |")
    assert row == "| T5 in GGUF | 5,000 | 9,000 | 1,175 | 275 | 10% |"
    assert caption.endswith("jax 0.1, gguf 0.2 on Python 3.11.7; 2026-01-02; `formats.json`.")


QUANTIZED = {
    "date": "2026-01-02T03:04:05+00:00",
    "machine": "x86_64",
    "device": "cpu",
    "python": "3.13.0",
    "versions": {"jax": "0.1", "qwix": "0.2"},
    "prompts": 24,
    "quantized": {
        "sd15": {
            "float32": {"bytes": 400_000_000},
            "int8": {"bytes": 100_040_000, "min_cosine": 0.99912345, "mean_cosine": 0.9996, "relative_error": 0.0321},
        }
    },
}


def test_quantised_params_have_a_table_of_their_own():
    *_, whole, low, _, caption = render(QUANTIZED, "quantize.json").splitlines()
    assert whole == "| sd15 | float32 | 400.0 | 100% |  |  |  |"
    assert low == "| sd15 | int8 | 100.0 | 25% | 0.99912 | 0.99960 | 3.2% |"
    assert "over 24 prompts; random weights of the full size, on CPU (x86_64);" in caption
    assert caption.endswith("jax 0.1, qwix 0.2 on Python 3.13.0; 2026-01-02; `quantize.json`.")
