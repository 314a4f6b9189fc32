"""Which rows are counted; XLA's count of their operations is replaced by their number."""

import dataclasses

import pytest

from bench import flops
from clip_jax import FAMILIES


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        (FAMILIES["sd15"], 2),
        (FAMILIES["sdxl"], 1 + 1),  # its negative is zeros, in diffusers too
        (dataclasses.replace(FAMILIES["sdxl"], zero_negative=False), 2 + 2),
        (FAMILIES["flux"], 1 + 1),  # no guidance
    ],
)
def test_whole_towers_run_the_rows_of_diffusers(family, rows, monkeypatch):
    monkeypatch.setattr(flops, "flops", lambda function, params, ids: ids.shape[0])
    assert flops._towers(family) == rows
