"""The names of the Flax classes that transformers had until version 5, as the names of its torch classes.

They name the same modules; a Flax kernel is [in, out], the transpose of a torch Linear's weight.
Reference: transformers 4.57 `modeling_flax_pytorch_utils.py`.
"""

from __future__ import annotations

from clip_jax.convert.state import StateDict, Tensor

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def is_flax(state: StateDict) -> bool:
    """Whether these are Flax's names, joined by "/" (msgpack) or "." (`save_pretrained(safe_serialization=True)`)."""
    return any(name.replace("/", ".").endswith(".kernel") for name in state)


def as_hf(state: StateDict) -> dict[str, Tensor]:
    """The same tensors under the names and in the layout of torch."""
    result = {}
    for name, tensor in state.items():
        module, dot, leaf = name.replace("/", ".").rpartition(".")
        result[f"{module}{dot}{_LEAVES.get(leaf, leaf)}"] = tensor.transposed() if leaf == "kernel" else tensor
    return result
