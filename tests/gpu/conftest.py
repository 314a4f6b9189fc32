"""Programs here are optimised as for users: `tests/conftest.py` has the compiler do little, for tests on a CPU.

Products are of full float32, as in all tests.
"""

import jax

jax.config.update("jax_disable_most_optimizations", False)
