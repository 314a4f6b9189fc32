"""Programs here are those that users run: `tests/conftest.py` has the compiler do little, for tests on a CPU."""

import jax

jax.config.update("jax_disable_most_optimizations", False)
