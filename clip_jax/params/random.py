"""Seeded random parameters of the full-size architectures: no download, no meaning."""

from __future__ import annotations

import zlib

import numpy as np


def random_tensor(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """One parameter, float32, the same on every machine and in any order.

    Embeddings and kernels are N(0, 0.02^2) as at the start of training (transformers
    `CLIPTextConfig.initializer_range`), norms the identity, biases zero.
    """
    leaf = path.rsplit("/", 1)[-1]
    if leaf in ("kernel", "embedding"):
        generator = np.random.default_rng(zlib.crc32(path.encode()))
        return generator.standard_normal(shape, np.float32) * np.float32(0.02)
    return np.full(shape, 0 if leaf == "bias" else 1, np.float32)
