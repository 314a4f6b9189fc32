"""Progress bars: shown when a terminal is attached, silent otherwise."""

from __future__ import annotations

from tqdm import tqdm


def byte_bar(total: int, description: str, progress: bool | None = None) -> tqdm:
    """A bar over `total` bytes on stderr; `progress` None shows it only on a terminal."""
    return tqdm(
        total=total,
        desc=description,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None if progress is None else not progress,
        leave=False,
    )
