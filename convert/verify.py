"""Holds a converted tower against its source: the same token ids through both, and the largest difference.

The source's side is transformers with torch in float32 where they are installed, and else float64 NumPy
(`numpy_forward.py`); ours is the Flax model in float32 on the parameters as they were stored.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from clip_jax.config import ClipTextConfig, T5EncoderConfig
from clip_jax.convert.numpy_forward import clip_forward, open_clip_forward, t5_forward
from clip_jax.convert.tower import ForeignTower
from clip_jax.errors import CheckpointError
from clip_jax.models import model_of
from clip_jax.params.shapes import flatten, param_shapes
from clip_jax.tokenizers import RowTokenizer

PROMPTS = ("", "a photograph of an astronaut riding a horse", "a cat, sitting on a windowsill; oil on canvas, 1887")
"""What is encoded: nothing, a sentence, and punctuation with numbers."""

_T5_TOKENS = 64  # of a row of T5, which has no length of its own
_TORCH_PARAMETERS = 10**9  # above it torch's copy in float32 would take more memory than the conversion

# Largest relative error (of norms) that rounding to a dtype explains; float32 where nothing was rounded. Weights in
# the wrong place make it a tenth and more.
_TOLERANCES: Mapping[str, float] = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}

#: Name of an output -> its values.
_Outputs = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far a converted tower is from its source, over all hidden states and pooled outputs.

    Attributes:
        max_abs_error: Of any value.
        largest: The largest value of the source.
        relative_error: The largest, of the outputs, of the norm of the difference by the norm of the output.
        oracle: What ran the source.
    """

    max_abs_error: float
    largest: float
    relative_error: float
    oracle: str


def verify_tower(name: str, tower: ForeignTower, params: Mapping[str, Any], tokenizer: RowTokenizer) -> Verification:
    """Runs a tower of the source and the converted one over a few prompts.

    Args:
        name: Of the tower, for messages.
        tower: The source.
        params: The converted parameters, as stored.
        tokenizer: Of the tower.

    Raises:
        CheckpointError: They differ by more than the rounding to the stored dtype explains.
    """
    is_t5 = isinstance(tower.config, T5EncoderConfig)
    ids = tokenizer.encode(PROMPTS, max_length=_T5_TOKENS if is_t5 else None)
    expected, oracle = _source_outputs(tower, ids)
    found = _converted_outputs(tower, params, ids)
    differences = {output: found[output] - values for output, values in expected.items()}
    checked = Verification(
        max_abs_error=max(float(np.abs(difference).max()) for difference in differences.values()),
        largest=max(float(np.abs(values).max()) for values in expected.values()),
        relative_error=max(
            float(np.linalg.norm(differences[output]) / np.linalg.norm(values)) for output, values in expected.items()
        ),
        oracle=oracle,
    )
    tolerance = max(_TOLERANCES[dtype] for dtype in _rounded_to(tower, params))
    if not checked.relative_error <= tolerance:  # also where it is not a number
        raise CheckpointError(
            f"The converted {name} does not compute what its source does: the relative error is "
            f"{checked.relative_error:.2g}, expected at most {tolerance:g}. Nothing was kept. Please report it, with "
            f"what `clip-jax info` says of the source."
        )
    return checked


def _rounded_to(tower: ForeignTower, params: Mapping[str, Any]) -> set[str]:
    """The dtypes to which parameters were rounded when they were stored; float32 stands for none."""
    stored = flatten(params)
    return {"float32"} | {
        stored[path].dtype.name
        for path, (key, _) in tower.map.keys.items()
        if stored[path].dtype != tower.state[key].dtype
    }


def _converted_outputs(tower: ForeignTower, params: Mapping[str, Any], ids: np.ndarray) -> _Outputs:
    out = model_of(tower.config, jnp.float32).apply({"params": params}, jnp.asarray(ids))
    outputs = {"last_hidden_state": out.last_hidden_state}
    if isinstance(tower.config, ClipTextConfig):
        outputs |= {f"hidden_states[{i}]": state for i, state in enumerate(out.hidden_states)}
        outputs |= {"pooler_output": out.pooler_output, "text_embeds": out.text_embeds}
    return {name: np.asarray(values, np.float64) for name, values in outputs.items() if values is not None}


def _source_outputs(tower: ForeignTower, ids: np.ndarray) -> tuple[_Outputs, str]:
    """What the source computes, and what ran it."""
    parameters = sum(math.prod(shape) for shape in param_shapes(tower.config).values())
    if parameters < _TORCH_PARAMETERS and tower.encoder.layout != "OpenCLIP":
        try:
            return _torch_outputs(tower, ids)
        except ImportError:  # not installed, or not together
            pass
    return _numpy_outputs(tower, ids), "NumPy, float64"


def _numpy_outputs(tower: ForeignTower, ids: np.ndarray) -> _Outputs:
    def read(name: str) -> np.ndarray:
        return tower.state[_source_name(tower, name)].read()

    def read_open_clip(name: str) -> np.ndarray:
        if name == "text_projection":  # [D, P], however it was stored
            return tower.state["text_projection.weight"].read().T
        return tower.source.state[tower.encoder.prefix + name].read()

    if isinstance(tower.config, T5EncoderConfig):
        return {"last_hidden_state": t5_forward(read, tower.config, ids)}
    open_clip = tower.encoder.layout == "OpenCLIP"
    out = open_clip_forward(read_open_clip, tower.config, ids) if open_clip else clip_forward(read, tower.config, ids)
    outputs = {f"hidden_states[{i}]": state for i, state in enumerate(out.hidden_states)}
    outputs |= {"last_hidden_state": out.last_hidden_state, "pooler_output": out.pooled}
    return outputs if out.text_embeds is None else {**outputs, "text_embeds": out.text_embeds}


def _torch_outputs(tower: ForeignTower, ids: np.ndarray) -> tuple[_Outputs, str]:
    torch, transformers = (importlib.import_module(package) for package in ("torch", "transformers"))
    fields = tower.config.to_hf()
    kind = getattr(transformers, fields.pop("architectures")[0])
    model = kind(kind.config_class(**fields)).eval()
    model.load_state_dict(
        {
            name: torch.from_numpy(tower.state[_source_name(tower, name)].read().astype(np.float32))
            for name in model.state_dict()
        }
    )
    with torch.no_grad():
        out = model(torch.from_numpy(ids.astype(np.int64)), output_hidden_states=True)
    outputs = {name: out.get(name) for name in ("last_hidden_state", "pooler_output", "text_embeds")}
    if isinstance(tower.config, ClipTextConfig):
        outputs |= {f"hidden_states[{i}]": state for i, state in enumerate(out.hidden_states)}
    found = {name: values.double().numpy() for name, values in outputs.items() if values is not None}
    return found, f"transformers {transformers.__version__}, torch {torch.__version__}"


def _source_name(tower: ForeignTower, name: str) -> str:
    """What transformers' `name` is called in the state of a tower: by either spelling of its own."""
    if name in ("shared.weight", "encoder.embed_tokens.weight"):
        name, _ = tower.map.keys["shared/embedding"]
    return name if name in tower.state else f"text_model.{name}"
