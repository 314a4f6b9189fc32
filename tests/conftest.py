"""What every test gets: full float32 products, and one small pipeline on disk."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

import clip_jax
from tests.checkpoints import TINY_H, write_pipeline

jax.config.update("jax_default_matmul_precision", "float32")
# Small models are compiled once and run once or twice: most of the time goes into the compiler. Processes that tests
# start get the same programs; tests/parity runs those that users run.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)


# The command line keeps compiled programs in the user's folder: not those of tests, and no test gets another's.
_CACHE_FOLDER = tempfile.TemporaryDirectory(prefix="clip-jax-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE_FOLDER.name
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture
def trace_anew() -> Iterator[Callable[[], None]]:
    """Forgets what has been traced. Called after a patch of what models are made of; at the end by itself."""
    yield jax.clear_caches
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a small quick_gelu text encoder. Read only."""
    return write_pipeline(tmp_path_factory.mktemp("tiny") / "sd15")


@pytest.fixture(scope="session")
def tiny_sd21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a small gelu text encoder that pads with "!". Read only."""
    return write_pipeline(tmp_path_factory.mktemp("tiny") / "sd21", TINY_H, pad_token="!")


@pytest.fixture(scope="session")
def encoder(tiny_sd15: Path) -> clip_jax.TextEncoder:
    """The small text encoder, loaded; without a cache, so that every call computes."""
    return clip_jax.load(tiny_sd15, family="sd15", cache_bytes=0)
