"""Holds a converted tower against its source: the same token ids through both, and the largest difference.

The source's side is transformers with torch in float32, where they are installed and the tower is small enough, and
else float64 NumPy (`numpy_forward.py`); ours is the Flax model in float32 on the parameters as they were stored.

Two questions are kept apart. Whether every weight is in its place: for that the source's weights are rounded to the
dtypes of the stored ones first, so that what remains is the noise of float32, and a fault as small as q and k swapped
in one block shows in bfloat16 too. And what the rounding costs: that is reported, and is for the user to judge.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.config import ClipTextConfig, T5EncoderConfig, TowerConfig
from clip_jax.convert.layouts.fp8 import dequantised
from clip_jax.convert.numpy_forward import clip_forward, open_clip_forward, t5_forward
from clip_jax.convert.state import Tensor
from clip_jax.convert.tower import ForeignTower
from clip_jax.errors import CheckpointError
from clip_jax.models import model_of
from clip_jax.params.shapes import flatten, param_shapes
from clip_jax.tokenizers import RowTokenizer

PROMPTS = (
    "",
    "a photograph of an astronaut riding a horse",
    "a cat, sitting on a windowsill; oil on canvas, 1887. " * 20,
)
"""What is encoded: nothing, a sentence, and more than fits."""

TOLERANCE = 1e-4
"""Largest relative error that float32 explains: with random weights it makes 1e-6 in CLIP-L, and q and k swapped in
one of its blocks 2e-4 or more."""

_T5_TOKENS = 96  # of a row of T5, which has no length of its own: enough for every bucket of its distances
_TORCH_PARAMETERS = 10**9  # from here on torch's copy in float32 would take more memory than the conversion

#: Name of an output -> its values, float64.
_Outputs = dict[str, np.ndarray]
#: A tensor of the source -> what to compute with.
_Read = Callable[[Tensor], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far a converted tower is from its source, over all hidden states and pooled outputs.

    Attributes:
        max_abs_error: The largest error of any value, where the source is rounded to the stored dtypes.
        largest: The largest value.
        relative_error: The largest error of any row, norm by norm; the source is rounded as above.
        rounding_error: The same, where the source is as it is: what storing it in another dtype costs. 0 where
            nothing was rounded.
        oracle: What ran the source.
    """

    max_abs_error: float
    largest: float
    relative_error: float
    rounding_error: float
    oracle: str


def verify_tower(name: str, tower: ForeignTower, params: Mapping[str, Any], tokenizer: RowTokenizer) -> Verification:
    """Runs a tower of the source and the converted one over a few prompts.

    Beside the params it takes memory for the largest of them in float64 or, where torch runs the source, for all of
    them in float32, which is less than 4 GB.

    Args:
        name: Of the tower, for messages.
        tower: The source.
        params: The converted parameters, as stored.
        tokenizer: Of the tower.

    Raises:
        CheckpointError: They differ by more than float32 explains.
    """
    ids = _token_ids(tower, tokenizer)
    found = _converted_outputs(tower, params, ids)
    stored = _stored_dtypes(tower, params)
    expected, oracle = _source_outputs(tower, lambda tensor: tensor.read().astype(stored[tensor.key], copy=False), ids)
    error = _relative_error(found, expected)
    if not error <= TOLERANCE:  # also where it is not a number
        raise CheckpointError(
            f"The converted {name} does not compute what its source does: the relative error is {error:.2g}, expected "
            f"at most {TOLERANCE:g}. Nothing was kept. Please report it, with what `clip-jax info` says of the source."
        )
    rounded = any(stored[tensor.key] not in (tensor.dtype, np.float32) for tensor in _used(tower).values())
    unrounded = _source_outputs(tower, lambda tensor: tensor.read(), ids)[0] if rounded else found
    return Verification(
        max_abs_error=max(float(np.abs(found[output] - values).max()) for output, values in expected.items()),
        largest=max(float(np.abs(values).max()) for values in expected.values()),
        relative_error=error,
        rounding_error=_relative_error(found, unrounded),
        oracle=oracle,
    )


def _token_ids(tower: ForeignTower, tokenizer: RowTokenizer) -> np.ndarray:
    """The prompts as rows [B, L] of ids, one of which is full."""
    length = tower.config.max_position_embeddings if isinstance(tower.config, ClipTextConfig) else _T5_TOKENS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the last prompt does not fit, as it should not
        return tokenizer.encode(PROMPTS, max_length=length, overflow="truncate")


def _relative_error(found: _Outputs, expected: _Outputs) -> float:
    """The largest, over all rows of all outputs, of the norm of the error by the norm of the row.

    By rows, because those of CLIP's first token are many times as large as others, and the same for all prompts.
    """
    tiny = np.finfo(np.float64).tiny
    errors = [
        np.linalg.norm(found[output] - values, axis=-1) / np.maximum(np.linalg.norm(values, axis=-1), tiny)
        for output, values in expected.items()
    ]
    return float(np.max([rows.max() for rows in errors]))  # not `max`, which would pass over a NaN


def _used(tower: ForeignTower) -> dict[str, Tensor]:
    """Path of every parameter -> its tensor."""
    return {path: tower.state[name] for path, (name, _) in tower.map.keys.items()}


def _stored_dtypes(tower: ForeignTower, params: Mapping[str, Any]) -> dict[str, np.dtype]:
    """Key of a tensor in the source's file -> the dtype that its parameters are stored in."""
    stored = flatten(params)
    return {tensor.key: np.dtype(stored[path].dtype) for path, tensor in _used(tower).items()}


def _converted_outputs(tower: ForeignTower, params: Mapping[str, Any], ids: np.ndarray) -> _Outputs:
    # Accelerators would else multiply float32 in less than that.
    with jax.default_matmul_precision("float32"):
        out = model_of(tower.config, jnp.float32).apply({"params": params}, jnp.asarray(ids))
    outputs = {"last_hidden_state": out.last_hidden_state}
    if isinstance(tower.config, ClipTextConfig):
        outputs |= {f"hidden_states[{i}]": state for i, state in enumerate(out.hidden_states)}
        outputs |= {"pooler_output": out.pooler_output, "text_embeds": out.text_embeds}
    return {name: np.asarray(values, np.float64) for name, values in outputs.items() if values is not None}


def _source_outputs(tower: ForeignTower, read: _Read, ids: np.ndarray) -> tuple[_Outputs, str]:
    """What the source computes, and what ran it."""
    parameters = sum(math.prod(shape) for shape in param_shapes(tower.config).values())
    # OpenCLIP's weights are run under their own names, which transformers does not know.
    if parameters < _TORCH_PARAMETERS and tower.encoder.layout != "OpenCLIP":
        model = _torch_model(tower.config)
        if model is not None:
            return _torch_outputs(model, tower, read, ids)
    return _numpy_outputs(tower, read, ids), "NumPy, float64"


def _numpy_outputs(tower: ForeignTower, read: _Read, ids: np.ndarray) -> _Outputs:
    if isinstance(tower.config, T5EncoderConfig):
        return {"last_hidden_state": t5_forward(lambda name: read(_tensor(tower, name)), tower.config, ids)}
    if tower.encoder.layout == "OpenCLIP":
        source, prefix = tower.source, tower.encoder.prefix
        raw = dequantised(source.state, prefix, source.metadata, str(source.files[0]))
        if tower.config.projection_dim is not None:  # as [D, P], whichever way round the user says that it is
            raw["text_projection"] = _tensor(tower, "text_projection.weight").transposed()
        out = open_clip_forward(lambda name: read(raw[name]), tower.config, ids)
    else:
        out = clip_forward(lambda name: read(_tensor(tower, name)), tower.config, ids)
    outputs = {f"hidden_states[{i}]": state for i, state in enumerate(out.hidden_states)}
    outputs |= {"last_hidden_state": out.last_hidden_state, "pooler_output": out.pooled}
    return outputs if out.text_embeds is None else {**outputs, "text_embeds": out.text_embeds}


def _torch_model(config: TowerConfig) -> Any:
    """The class of transformers with random weights; None where it, or torch, is not installed or does not work."""
    fields = config.to_hf()
    try:
        importlib.import_module("torch")
        kind = getattr(importlib.import_module("transformers"), fields.pop("architectures")[0])
        return kind(kind.config_class(**fields)).eval()
    except ImportError:  # not installed, or not together
        return None
    except Exception as error:  # whatever comes of libraries that are installed in part
        warnings.warn(
            f"transformers with torch cannot be used ({type(error).__name__}: {error}); NumPy runs the source instead.",
            UserWarning,
            stacklevel=2,
        )
        return None


def _torch_outputs(model: Any, tower: ForeignTower, read: _Read, ids: np.ndarray) -> tuple[_Outputs, str]:
    torch, transformers = (importlib.import_module(package) for package in ("torch", "transformers"))
    with torch.no_grad():
        for name, parameter in model.state_dict().items():  # all that the model has, so that none stays random
            parameter.copy_(torch.from_numpy(read(_tensor(tower, name)).astype(np.float32)))
        out = model(torch.from_numpy(ids.astype(np.int64)), output_hidden_states=True)
    outputs = {name: out.get(name) for name in ("last_hidden_state", "pooler_output", "text_embeds")}
    if isinstance(tower.config, ClipTextConfig):
        outputs |= {f"hidden_states[{i}]": state for i, state in enumerate(out.hidden_states)}
    found = {name: values.double().numpy() for name, values in outputs.items() if values is not None}
    return found, f"transformers {transformers.__version__}, torch {torch.__version__}"


def _tensor(tower: ForeignTower, name: str) -> Tensor:
    """The tensor that transformers calls `name`, by either of its spellings."""
    if name in ("shared.weight", "encoder.embed_tokens.weight"):
        name, _ = tower.map.keys["shared/embedding"]
    return tower.state[name if name in tower.state else f"text_model.{name}"]
