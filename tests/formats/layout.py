"""What a layout is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.formats.files import Writer, write_safetensors
from tests.formats.model import State

Files = Callable[[Path], list[Path]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A source, and what `clip_jax` is to make of it.

    Attributes:
        family: Of which it has the text encoders.
        files: Writes it into a folder, and returns what to load.
        names: Tower -> what the provenance calls its names.
        format: What the provenance calls the files.
        values: Tower -> weights, where these are not those of the model bit for bit.
        dtypes: Tower -> dtypes that the weights are kept in, where that is not float32.
        ignored: As in the provenance.
        aside: Tower -> how many of its names are left aside.
        options: Of `load`.
    """

    family: str
    files: Files
    names: Mapping[str, str]
    format: str = "single file, safetensors"
    values: Mapping[str, State] = dataclasses.field(default_factory=dict)
    dtypes: Mapping[str, set[str]] = dataclasses.field(default_factory=dict)
    ignored: Mapping[str, int] = dataclasses.field(default_factory=dict)
    aside: Mapping[str, int] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def saved(*states: State, write: Writer = write_safetensors) -> Files:
    """One file for each state dict. Their names say nothing, as formats are told by contents."""
    return lambda folder: [write(folder / f"{i}.weights", state) for i, state in enumerate(states)]


HF, OPEN_CLIP = "transformers", "OpenCLIP"  # as the provenance calls them
ONE = np.ones((), np.float32)
REST: State = {
    "model.diffusion_model.input_blocks.0.0.weight": np.ones((2, 2), np.float32),
    "first_stage_model.decoder.conv_in.weight": np.ones((2, 2), np.float32),
    "model_ema.decay": ONE,
}
"""What is no text encoder in a single-file checkpoint."""
REST_COUNTS = {"model.": 1, "first_stage_model.": 1, "model_ema.": 1}
