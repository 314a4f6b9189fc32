"""Seeded random parameters of the full-size architectures: no download, no meaning."""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

#: Tensors that are drawn at once: each is held until its turn comes, and T5-XXL's take up to half a gigabyte.
_MOST_THREADS = 8


def random_tensor(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """One parameter, float32, the same on every machine and in any order.

    Embeddings and kernels are N(0, 0.02^2) as at the start of training (transformers
    `CLIPTextConfig.initializer_range`), norms the identity, biases zero.
    """
    leaf = path.rsplit("/", 1)[-1]
    if leaf in ("kernel", "embedding"):
        generator = np.random.default_rng(zlib.crc32(path.encode()))
        tensor = generator.standard_normal(shape, np.float32)
        tensor *= 0.02
        return tensor
    return np.full(shape, 0 if leaf == "bias" else 1, np.float32)


def random_tensors(tower: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters of a tower by their paths, in order; several are drawn at once, for NumPy lets threads do so."""
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[str, Future[np.ndarray]]] = deque()
        for path, shape in shapes.items():
            ahead.append((path, pool.submit(random_tensor, f"{tower}/{path}", shape)))
            if len(ahead) == threads:
                first, tensor = ahead.popleft()
                yield first, tensor.result()
        for path, tensor in ahead:
            yield path, tensor.result()
