"""Errors against numbers worked out by hand."""

import numpy as np
import pytest

from bench.compare import error
from bench.protocol import WorkerError

REFERENCE = {"prompt_embeds": np.array([[3.0, 4.0], [0.0, 5.0]]), "pooled_prompt_embeds": np.array([[1.0, 0.0]])}


def test_equal_outputs():
    assert error(REFERENCE, REFERENCE) == {"relative": 0, "min_cosine": 1}


def test_the_worst_output_and_the_worst_row():
    # Of the first output the norm of the difference is 5 sqrt(2), of the reference 5 sqrt(2).
    turned = {**REFERENCE, "prompt_embeds": np.array([[3.0, 4.0], [5.0, 0.0]])}
    assert error(turned, REFERENCE) == {"relative": 1, "min_cosine": 0}
    longer = {**REFERENCE, "pooled_prompt_embeds": np.array([[1.5, 0.0]])}
    assert error(longer, REFERENCE) == {"relative": 0.5, "min_cosine": 1}


@pytest.mark.parametrize("found", [{}, {**REFERENCE, "more": np.ones(1)}, {**REFERENCE, "prompt_embeds": np.ones(2)}])
def test_other_outputs_are_refused(found):
    with pytest.raises(WorkerError, match="expected"):
        error(found, REFERENCE)
