"""A picture comes out; what is on it is for eyes."""

import json

import pytest

from bench.timings import title
from tests.bench.fakes import RESULT


@pytest.mark.parametrize("cases", [1, 2, 4])
def test_a_picture_beside_the_result(cases, tmp_path):
    from bench import plot

    path = tmp_path / "encode-some-cpu.json"
    path.write_text(json.dumps({**RESULT, "cases": (RESULT["cases"] * 2)[:cases]}))
    plot.main([str(path)])
    assert (tmp_path / "encode-some-cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("preset", "batch", "expected"),
    [
        ("sd15", 8, "sd15, float32, 8 pairs"),
        ("sdxl", 1, "sdxl, float32, 1 pair"),
        ("flux", 1, "flux, float32, 1 row"),
        ("clip_l", 1, "clip_l, float32, 1 row"),
    ],
)
def test_titles_say_what_a_batch_is_of(preset, batch, expected):
    assert title({**RESULT["cases"][0], "preset": preset, "batch": batch}) == expected
