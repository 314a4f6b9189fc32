"""A state dict, unread: the one form in which the layouts of checkpoints are turned into each other.

A layout is a function from one such dict to another, under other names; tensors stay in their files until they are
used, and slices and transposes of them are views.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, unread.

    Attributes:
        key: Its key in the file, for people.
        shape: Its dimensions; () for a scalar.
        dtype: Of what `read` returns.
        read: Returns it, as a view of its file where its bytes lie there as they are.
        stored: How it is stored, where that is not its dtype: "Q4_0", "float8_e4m3fn with scale".
    """

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)
    stored: str | None = None

    def transposed(self) -> Tensor:
        """Its transpose; a view."""
        return dataclasses.replace(self, shape=self.shape[::-1], read=lambda: self.read().T)

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows from `start` up to `stop` of its first dimension; a view."""
        return dataclasses.replace(self, shape=(stop - start, *self.shape[1:]), read=lambda: self.read()[start:stop])


#: Name -> tensor.
StateDict = Mapping[str, Tensor]


def below(state: StateDict, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def renamed(name: str, table: Iterable[tuple[str, str]]) -> str:
    """What the first pattern of a table that fits makes of a name; the name itself where none does."""
    found = ((re.fullmatch(pattern, name), replacement) for pattern, replacement in table)
    return next((match.expand(replacement) for match, replacement in found if match), name)
