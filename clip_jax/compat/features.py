"""Many texts to one row each: cut after the end of the text, texts of like length together.

Letters: N texts, L tokens, P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.typing
import numpy as np

from clip_jax.buckets import BATCHES, LENGTHS, bucket_of
from clip_jax.config import ClipTextConfig
from clip_jax.errors import ClipJaxError
from clip_jax.models.functional import end_of_text

BATCH_SIZE = 64
"""Texts at a time, unless another number is asked for: as fast as any on two cores of a CPU; accelerators want more."""

_FEW = 32  # of which more at a time are hardly faster, on the smallest of devices


def pooled_rows(
    run: Callable[..., jax.Array],
    arrays: Sequence[jax.typing.ArrayLike | None],
    config: ClipTextConfig,
    batch_size: int,
) -> jax.Array:
    """Runs `run` on a few sizes of batches, in which no row goes on for long after the end of its text.

    Attention is causal, so that what comes after the end changes nothing in the row there; but for a mask that hides
    all that comes before it too, for then all tokens count alike, and nothing is cut.

    Args:
        run: Ids, and what goes with them, to [B, P].
        arrays: Ids [N, L] on the host, a mask and positions, [N, L] or [1, L] each, or None.
        config: Of the model that `run` runs.
        batch_size: The most rows at a time.

    Returns:
        [N, P], on the default device.

    Raises:
        ClipJaxError: More tokens than positions.
    """
    ids = np.asarray(arrays[0], np.int32)
    rows = [None if array is None else np.broadcast_to(np.asarray(array, np.int32), ids.shape) for array in arrays]
    mask = rows[1]
    longest = config.max_position_embeddings
    if ids.shape[1] > longest:
        raise ClipJaxError(f"input_ids has {ids.shape[1]} tokens per row, the model has {longest} positions.")
    sizes = end_of_text(ids, config.eos_token_id) + 1
    order = np.argsort(-sizes, kind="stable")  # the longest first: if memory runs out, it does so at once
    lengths = [min(bucket_of(int(size), LENGTHS), longest) for size in sizes[order]]
    if mask is not None and _hides_an_end(mask, sizes):
        lengths = [ids.shape[1]] * len(ids)
    batches = list(_batches(lengths, batch_size))
    outputs = []
    for begin, end, length in batches:
        missing = min(bucket_of(end - begin, BATCHES), batch_size) - (end - begin)
        padded = np.pad(order[begin:end], (0, missing), mode="edge")
        outputs.append(run(*(None if array is None else _as_long(array[padded], length) for array in rows)))
    computed = jax.device_get(outputs)
    features = np.empty((len(ids), computed[0].shape[1]), computed[0].dtype)
    for (begin, end, _), output in zip(batches, computed, strict=True):
        features[order[begin:end]] = output[: end - begin]
    return jax.device_put(features)


def _hides_an_end(mask: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether a row's first `size` tokens are all hidden."""
    return any(not row[:size].any() for row, size in zip(mask, sizes, strict=True))


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[tuple[int, int, int]]:
    """Where batches begin and end, and how long their rows are; `lengths` do not grow.

    A batch is of one length; where that would leave fewer rows than a device wants at a time, shorter ones join them.
    """
    begin = 0
    while begin < len(lengths):
        alike = lengths[begin : begin + batch_size].count(lengths[begin])
        end = min(begin + min(batch_size, max(alike, _FEW)), len(lengths))
        yield begin, end, lengths[begin]
        begin = end


def _as_long(rows: np.ndarray, length: int) -> np.ndarray:
    """Rows cut, or filled up with their last column, to `length`."""
    return np.pad(rows[:, :length], [(0, 0), (0, max(length - rows.shape[1], 0))], mode="edge")
