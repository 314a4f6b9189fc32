"""Prompts as they are given: one for a whole batch, or a list with one each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from clip_jax.errors import ClipJaxError


@dataclasses.dataclass(frozen=True)
class Prompts:
    """One prompt for a whole batch, or a list with one each.

    Attributes:
        argument: The argument that it was.
        texts: The prompts.
        for_all: Whether it was a single str.
    """

    argument: str
    texts: list[str]
    for_all: bool

    @classmethod
    def of(cls, value: str | Sequence[str], argument: str) -> Prompts:
        """Takes a str or a sequence of str.

        Raises:
            ClipJaxError: Neither; what is in a sequence is for the tokenizer to check.
        """
        if isinstance(value, str):
            return cls(argument, [value], for_all=True)
        if not isinstance(value, Sequence) or isinstance(value, bytes):
            raise ClipJaxError(f"{argument} must be a str or a list of str, found {type(value).__name__}.")
        return cls(argument, list(value), for_all=False)

    def check(self, batch: int) -> Prompts:
        """Itself, if it fits a batch of so many prompts.

        Raises:
            ClipJaxError: A list of another length.
        """
        if not self.for_all and len(self.texts) != batch:
            raise ClipJaxError(
                f"{self.argument} has {len(self.texts)} entries for {batch} prompts; expected one each, or a "
                f"single str for all."
            )
        return self

    @property
    def names(self) -> list[str]:
        """What to call each prompt in an error."""
        return [self.argument] if self.for_all else [f"{self.argument}[{i}]" for i in range(len(self.texts))]


def by_argument(prefix: str, first: str | Sequence[str], *others: str | Sequence[str] | None) -> dict[str, Prompts]:
    """Argument name -> prompts; others that are absent or empty are the first, as in diffusers."""
    prompts = {f"{prefix}prompt": Prompts.of(first, f"{prefix}prompt")}
    for i, other in enumerate(others, start=2):
        name = f"{prefix}prompt_{i}"
        if other is None or (isinstance(other, str) and not other):
            prompts[name] = prompts[f"{prefix}prompt"]
        else:
            prompts[name] = Prompts.of(other, name)
    return prompts
