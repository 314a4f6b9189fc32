"""What the old classes and ours are both asked: shared by `old_flax.py`, which runs under transformers 4, and the test.

Imports neither clip_jax nor transformers.
"""

import numpy as np

VOCABULARY, EOS = 99, 98

#: Name -> class, fields of its config, and how `save_pretrained` writes it.
MODELS = {
    "clip_l": (
        "FlaxCLIPTextModel",
        {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "hidden_act": "quick_gelu"},
        {},
    ),
    "clip_l, eos_token_id 2": (
        "FlaxCLIPTextModel",
        {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "eos_token_id": 2},
        {},
    ),
    "clip_h": (
        "FlaxCLIPTextModel",
        {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 4, "hidden_act": "gelu"},
        {"safe_serialization": True},
    ),
    "clip_g": (
        "FlaxCLIPTextModelWithProjection",
        {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "hidden_act": "gelu"},
        {},
    ),
    "t5": (
        "FlaxT5EncoderModel",
        {"d_model": 48, "d_kv": 8, "d_ff": 96, "num_layers": 3, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
        {"max_shard_size": "100KB"},
    ),
}

IDS = np.random.RandomState(0).randint(3, EOS, (3, 20)).astype(np.int64)
IDS[:, 0], IDS[0, 9:], IDS[1, 15:], IDS[2, 19:] = 1, EOS, EOS, EOS
MASK = (np.arange(20)[None] < np.array([[10], [16], [20]])).astype(np.int64)

#: Name -> keyword arguments beside the ids, as pipelines pass them. Those with positions are for CLIP alone.
CALLS = {
    "ids alone": {},
    "train": {"train": False},
    "no mask": {"attention_mask": None, "output_hidden_states": False},
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "mask": {"attention_mask": MASK, "output_hidden_states": True},
    "positions": {"position_ids": np.arange(20)[None].repeat(3, 0)[:, ::-1].copy()},
    "tuple": {"return_dict": False},
}

#: Dtype of the computation, and of the params.
DTYPES = {
    "float32": ("float32", "float32"),
    "bfloat16 on float32": ("bfloat16", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "float32 on bfloat16": ("float32", "bfloat16"),
}


def calls_of(name: str) -> dict[str, dict[str, object]]:
    """The calls of a model."""
    return {call: kwargs for call, kwargs in CALLS.items() if name != "t5" or "position_ids" not in kwargs}


def weights(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """One parameter: kernels that keep the scale of what they multiply, norms and biases far from the identity."""
    rng = np.random.RandomState(sum(map(ord, path)))  # the legacy generator: its streams never change
    leaf = path.rsplit("/", 1)[-1]
    scale = {"kernel": shape[0] ** -0.5, "embedding": 0.5}.get(leaf, 0.2)
    if path.endswith("SelfAttention/q/kernel"):
        scale /= 8**0.5  # T5 does not scale its scores
    return ((leaf in ("scale", "weight")) + scale * rng.standard_normal(shape)).astype(np.float32)


def cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """What the gradient of an output is taken along."""
    return (np.random.RandomState(1).standard_normal(shape) / np.prod(shape) ** 0.5).astype(np.float32)


def flat_outputs(out: object) -> dict[str, np.ndarray]:
    """An output of either, tuple or not, as a flat dict: "hidden_states/0" is the first of several."""
    named = dict(enumerate(out)) if isinstance(out, tuple) else dict(out.items())
    flat = {}
    for key, value in named.items():
        several = dict(enumerate(value)) if isinstance(value, tuple) else {None: value}
        flat |= {str(key) if i is None else f"{key}/{i}": array for i, array in several.items()}
    return flat
