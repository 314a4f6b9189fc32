"""Where cases are run: the interpreters, and the files that contenders read, each made once."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from bench.contenders import Contender
from bench.environments import run_helper
from bench.presets import COMPAT, LARGE_PRESETS, clip_ids, compat_ids, rows_of, t5_ids
from bench.protocol import Message

_LEAST_CALLS = 5


class Case(NamedTuple):
    """What all contenders are given.

    Attributes:
        preset: A family, or a model of `compat`.
        precision: One of `PRECISIONS`.
        batch: Guidance pairs at once; of FLUX prompts, for a model of `compat` rows.
    """

    preset: str
    precision: str
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.preset} {self.precision} x{self.batch}"

    @property
    def ids(self) -> list[list[int]]:
        """Token ids; of guidance pairs the unconditional rows come first."""
        return compat_ids(self.preset) if self.preset in COMPAT else clip_ids(rows_of(self.preset, self.batch))

    @property
    def t5_ids(self) -> list[list[int]] | None:
        """Token ids of T5, where there is one beside CLIP."""
        return t5_ids(self.batch) if self.preset in LARGE_PRESETS else None


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Interpreters, files and settings of a run.

    Attributes:
        pythons: Environment name -> interpreter.
        platform: Of jax, as ours runs on it.
        device: The name of that device.
        scratch: The folder for checkpoints and exported models.
        repeats: Timed calls per contender of one guidance pair.
    """

    pythons: Mapping[str, str]
    platform: str
    device: str
    scratch: Path
    repeats: int

    def calls(self, case: Case) -> int:
        """Timed calls per contender: of large batches fewer, for about as much work."""
        return min(self.repeats, max(_LEAST_CALLS, self.repeats // case.batch))

    def request(self, contender: Contender, case: Case) -> Message:
        """The case as a worker is told, once everything that it reads is there.

        Raises:
            WorkerError: That could not be made.
        """
        return {
            **case._asdict(),
            "ids": case.ids,
            "t5_ids": case.t5_ids,
            "checkpoint": str(self.checkpoint(case.preset)),
            "file": str(self._exported(contender, case)) if contender.export else None,
            "output": str(self.scratch / "output.npz"),
            "options": dict(contender.options),
        }

    def checkpoint(self, preset: str) -> Path:
        """The folder with the random weights of a preset, which all contenders share."""
        python = self.pythons["clip_jax"]
        return _made(
            self.scratch / preset / "weights", lambda part: run_helper(python, "bench.workers.checkpoint", preset, part)
        )

    def _exported(self, contender: Contender, case: Case) -> Path:
        export, python = contender.export, self.pythons[contender.environment]
        assert export is not None
        precision = "int8" if case.precision == "int8" else "float32"  # bfloat16 is made of it as it is compiled
        given = (self.checkpoint(case.preset), len(case.ids), precision)
        name = "-".join([contender.environment, precision, str(len(case.ids)), *export.arguments])
        folder = _made(
            self.scratch / case.preset / name,
            lambda part: run_helper(python, export.module, *given, part / export.name, *export.arguments),
        )
        return folder / export.name


def _made(folder: Path, make: Callable[[Path], object]) -> Path:
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")  # renamed once it is whole
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        make(part)
        part.rename(folder)
    return folder
