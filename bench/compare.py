"""How far one output is from another."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bench.protocol import WorkerError


def error(found: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of outputs by name: the worst relative norm of a difference, and the least cosine of a row of the last axis.

    Raises:
        WorkerError: The outputs are not those of the reference: others, or of other shapes.
    """
    shapes, expected = ({name: arrays[name].shape for name in arrays} for arrays in (found, reference))
    if shapes != expected:
        raise WorkerError(f"It returns {shapes}; expected {expected}")
    pairs = [(np.asarray(found[name], np.float64), np.asarray(reference[name], np.float64)) for name in reference]
    norm = np.linalg.norm
    relative = max(norm(a - b) / norm(b) for a, b in pairs)
    cosine = min(np.min((a * b).sum(-1) / (norm(a, axis=-1) * norm(b, axis=-1))) for a, b in pairs)
    return {"relative": float(f"{relative:.3g}"), "min_cosine": round(float(cosine), 6)}
