"""Where the environment with transformers 4 is."""

from pathlib import Path

import pytest


def pytest_addoption(parser):
    default = Path(__file__).parents[2] / ".venv-flax4" / "bin" / "python"
    parser.addoption("--old-python", type=Path, default=default, help="a Python with transformers 4.57 and Flax")


@pytest.fixture(scope="session")
def old_python(request):
    python = request.config.getoption("--old-python").absolute()
    if not python.exists():
        raise pytest.UsageError(
            f"{python} does not exist. Make it: python3.11 -m venv .venv-flax4 && .venv-flax4/bin/pip install "
            f"-r tests/oracle/requirements.txt, or name one with --old-python."
        )
    return python
