"""Casting parameters, and the check that float16 can hold them."""

from __future__ import annotations

import jax.typing
import numpy as np

from clip_jax.errors import CheckpointError, ClipJaxError

FLOAT_DTYPES = ("float32", "bfloat16", "float16")


def float_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """The numpy dtype of "bfloat16", `jnp.bfloat16`, `np.float16`, ...

    Raises:
        ClipJaxError: Not one of float32, bfloat16 and float16.
    """
    name = str(dtype) if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    if name not in FLOAT_DTYPES:
        raise ClipJaxError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}, found {name!r}.")
    return np.dtype(jax.numpy.dtype(name))


def param_dtype(path: str, dtype: np.dtype) -> np.dtype:
    """The dtype that a parameter is kept in when a tower is wanted in `dtype`.

    T5's `wo` stays float32 in float16, as in transformers (`T5PreTrainedModel._keep_in_fp32_modules`).
    """
    keep = dtype == np.float16 and path.endswith("/DenseReluDense/wo/kernel")
    return np.dtype(np.float32) if keep else dtype


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Casts a parameter on the host.

    Raises:
        CheckpointError: A finite value of `array` is out of the range of `dtype`.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):  # reported below, by name
        result = array.astype(dtype)
    if dtype == np.float16 and not np.isfinite(result).all():
        check_range(float(np.abs(array.astype(np.float32)).max()), name)
    return result


def check_range(largest: float, name: str) -> None:
    """Refuses a parameter whose `largest` absolute value float16 cannot hold.

    Raises:
        CheckpointError: Out of range, infinite, or not a number.
    """
    limit = float(np.finfo(np.float16).max)
    if not largest <= limit:
        raise CheckpointError(
            f"{name} holds values up to {largest:.6g}, float16 ends at {limit:g}. Use bfloat16 or float32."
        )
