"""Records the largest errors that the parity tests see: the table in README is made of them."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import pytest

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
jax.config.update("jax_disable_most_optimizations", False)

_ERRORS = pytest.StashKey[dict[str, dict[str, float]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-errors", type=Path, metavar="JSON", help="write the largest errors to a file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-errors") and hasattr(config, "workerinput"):
        raise pytest.UsageError("Each process has seen errors of its own: run with -n0 to write them.")
    config.stash[_ERRORS] = {}


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Asserts that our array is within `tolerance` of the reference everywhere.

    The largest error seen under the name `record` goes into the file that `--write-errors` names.
    """

    def check(ours: np.ndarray, reference: np.ndarray, tolerance: float, record: str | None = None) -> None:
        ours, reference = np.asarray(ours, np.float32), np.asarray(reference, np.float32)
        assert ours.shape == reference.shape
        assert np.isfinite(reference).all()
        error = float(np.abs(ours - reference).max())
        assert error <= tolerance, f"max abs error {error:.2e}, tolerance {tolerance:.0e}"
        if record is not None:
            errors = request.config.stash[_ERRORS]
            worst = max(error, errors.get(record, {}).get("max_abs_error", 0.0))
            largest = max(float(np.abs(reference).max()), errors.get(record, {}).get("largest_value", 0.0))
            errors[record] = {"max_abs_error": worst, "largest_value": largest, "tolerance": tolerance}

    return check


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--write-errors")
    if path is None or exitstatus != 0:
        return
    packages = ("jax", "flax", "torch", "transformers", "diffusers", "numpy")
    result = {
        "date": datetime.date.today().isoformat(),
        "device": "cpu",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "errors": dict(sorted(session.config.stash[_ERRORS].items())),
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


@pytest.fixture(autouse=True)
def quiet_libraries() -> None:
    """Keeps the progress bars and notices of transformers and diffusers out of the report."""
    import diffusers
    import transformers

    for logging in (transformers.utils.logging, diffusers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
