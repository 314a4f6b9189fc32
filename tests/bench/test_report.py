"""The table of a made-up result, and that --check finds every difference."""

import copy
import json

import pytest

from bench.report import ReportError, main, render, splice

START, END = "<!-- bench:encode -->", "<!-- /bench:encode -->"


def contender(median, q1, q3):
    return {"ms": {"median": median, "q1": q1, "q3": q3}}


RESULT = {
    "schema": 1,
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "dirty": False,
    "host": {"cores": 4},
    "settings": {"repeats": 15},
    "contenders": {
        "clip_jax": {
            "device": "Some CPU",
            "versions": {"python": "3.14.1", "clip_jax": "0.1.0", "jax": "0.12.0"},
        },
        "torch eager": {"device": "Some CPU", "versions": {"python": "3.11.7", "torch": "2.13.0"}},
    },
    "cases": [
        {
            "family": "sd15",
            "dtype": "float32",
            "other_cores": 0.01,
            "contenders": {"clip_jax": contender(50, 49.95, 51), "torch eager": contender(100.04, 90, 123.4)},
            "ratio_to": {"torch eager": {"median": 0.5, "min": 0.4567, "max": 1.2}},
        },
        {
            "family": "sd21",
            "dtype": "bfloat16",
            "other_cores": 0.03,
            "contenders": {"clip_jax": contender(1.5, 1.25, 1.75), "torch eager": contender(9.5, 9, 10)},
            "ratio_to": {"torch eager": {"median": 0.158, "min": 0.125, "max": 0.194}},
        },
    ],
}
TABLE = """\
| family | dtype | clip_jax, ms | torch eager, ms | clip_jax / torch eager |
| --- | --- | ---: | ---: | ---: |
| sd15 | float32 | 50.0 (50.0 to 51.0) | 100.0 (90.0 to 123.4) | 0.50 (0.46 to 1.20) |
| sd21 | bfloat16 | 1.50 (1.25 to 1.75) | 9.50 (9.00 to 10.0) | 0.16 (0.12 to 0.19) |

One guidance pair, random weights; 15 interleaved calls each: median (quartiles); ratio: median (min to max) \
of the pairwise ratios, lower is faster. Some CPU, 4 CPU cores, at most 0.03 of them taken by others; \
clip_jax 0.1.0, jax 0.12.0 on python 3.14.1; torch 2.13.0 on python 3.11.7; 2026-01-02, commit 0123456; \
`run.json`."""
README = f"# Title\n\n{START}\nold\n{END}\n\nMore text.\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RESULT))
    (tmp_path / "README.md").write_text(README)
    return str(tmp_path / "run.json"), tmp_path / "README.md"


def test_render():
    assert render(RESULT, "run.json") == TABLE


def test_render_without_a_peer_outside_a_commit():
    result = copy.deepcopy(RESULT) | {"commit": None, "dirty": True}
    del result["contenders"]["torch eager"]
    header, _, row, *_, caption = render(result, "run.json").splitlines()
    assert header == "| family | dtype | clip_jax, ms |"
    assert row == "| sd15 | float32 | 50.0 (50.0 to 51.0) |"
    assert caption.endswith("on python 3.14.1; 2026-01-02, no commit with uncommitted changes; `run.json`.")


def test_another_schema_is_refused():
    with pytest.raises(ReportError, match=r"run\.json has schema 2; expected 1"):
        render({**RESULT, "schema": 2}, "run.json")


def test_print(files, capsys):
    main([files[0]])
    assert capsys.readouterr().out == TABLE + "\n"


def test_write_then_check(files):
    result, readme = files
    main([result, "--write", str(readme)])
    assert readme.read_text() == f"# Title\n\n{START}\n\n{TABLE}\n\n{END}\n\nMore text.\n"
    main([result, "--check", str(readme)])


@pytest.mark.parametrize("change", [("50.0 (", "49.0 ("), ("\n| sd21", "\n\n| sd21"), ("3.14.1", "3.14.2")])
def test_check_fails_when_the_readme_differs(files, change, capsys):
    result, readme = files
    main([result, "--write", str(readme)])
    assert change[0] in readme.read_text()
    readme.write_text(readme.read_text().replace(*change))
    with pytest.raises(SystemExit, match="is not that of") as exit_:
        main([result, "--check", str(readme)])
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
    with pytest.raises(SystemExit, match="No such file"):
        main([files[0], "--check", str(files[1]) + "x"])


PARITY = {
    "date": "2026-01-02",
    "machine": "x86_64",
    "python": "3.11.7",
    "versions": {"jax": "0.1", "torch": "2.0"},
    "errors": {"sd15": {"max_abs_error": 4.649e-06, "largest_value": 3.7602, "tolerance": 2e-05}},
}


def test_errors_have_a_table_of_their_own(tmp_path):
    result, readme = tmp_path / "parity.json", tmp_path / "README.md"
    result.write_text(json.dumps(PARITY))
    readme.write_text("<!-- parity --><!-- /parity --> <!-- bench:encode --> kept <!-- /bench:encode -->")
    main([str(result), "--write", str(readme)])
    assert "| sd15 | 4.6e-06 | 3.8 | 2e-05 |" in readme.read_text()
    assert (
        "float32, on CPU (x86_64), 2026-01-02; jax 0.1, torch 2.0 on Python 3.11.7; `parity.json`."
        in readme.read_text()
    )
    assert "kept" in readme.read_text()
    main([str(result), "--check", str(readme)])


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
