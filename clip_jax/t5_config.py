"""The configuration of T5 v1.1 encoders, read from and written to the `config.json` of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from clip_jax.errors import ConfigError
from clip_jax.hf_fields import OF_ANY_MODEL, check_fields, check_size

# transformers' T5Config defaults: what an absent key means (configuration_t5.py).
_HF_DEFAULTS: dict[str, Any] = {
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "vocab_size": 32128,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}

# Written by transformers 4 or 5 and without effect on what the encoder computes at inference.
_HF_WITHOUT_EFFECT = OF_ANY_MODEL | frozenset(
    "bos_token_id classifier_dropout dropout_rate eos_token_id initializer_factor n_positions num_decoder_layers "
    "output_past pad_token_id scale_decoder_outputs".split()
)

# Fields that change what is computed, and the values under which it stays what T5Encoder computes.
_HF_REFUSED_UNLESS: dict[str, tuple[Any, ...]] = {
    "dense_act_fn": (None, "gelu_new", "gelu_pytorch_tanh"),
    "is_gated_act": (None, True),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "cross_attention_hidden_size": (None,),
    "quantization_config": (None,),
}

# `feed_forward_proj` is "gated-" and an activation; "gated-gelu" stands for the tanh form, for T5 v1.1.
_GATED_TANH_GELU = ("gated-gelu", "gated-gelu_new", "gated-gelu_pytorch_tanh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5EncoderConfig:
    """Architecture of a T5 v1.1 encoder (Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, 2002.05202).

    The feed-forward layer is that of v1.1, gated by the tanh form of GELU, and is no option.

    Attributes:
        d_model: D, width of the residual stream.
        d_kv: H, size of a head; `num_heads * d_kv` need not be D.
        d_ff: F, width of the feed-forward layer.
        num_layers: Number of transformer blocks.
        num_heads: N.
        vocab_size: V, rows of the token embedding; more than there are tokens.
        relative_attention_num_buckets: Rows of the table of relative position biases.
        relative_attention_max_distance: Distance from which on all positions share a bucket.
        layer_norm_epsilon: Epsilon of every RMSNorm.

    Raises:
        ConfigError: A value is out of range.
    """

    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    vocab_size: int = 32128
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "layer_norm_epsilon":
                check_size(field.name, getattr(self, field.name))
        if not isinstance(self.layer_norm_epsilon, float) or not self.layer_norm_epsilon > 0:
            raise ConfigError(f"layer_norm_epsilon must be a positive float, found {self.layer_norm_epsilon!r}.")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or distance <= buckets // 4:
            raise ConfigError(
                f"relative_attention_num_buckets must be 4 or more, and relative_attention_max_distance more "
                f"than a quarter of it, found {buckets} and {distance}."
            )

    @classmethod
    def xxl(cls) -> T5EncoderConfig:
        """T5 v1.1 XXL, a text encoder of SD 3 and FLUX.1: 24 layers of width 4096.

        4,762,310,656 parameters.
        """
        return cls(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> T5EncoderConfig:
        """Reads the dict of a transformers 4 or 5 `config.json`.

        Takes the config of `T5EncoderModel`, or of a whole T5 v1.1 (`T5ForConditionalGeneration`).

        Warns:
            UserWarning: Names the fields that are not known here; they are ignored.

        Raises:
            ConfigError: Another kind of model, or a value that `T5Encoder` cannot honour.
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"Expected the dict of a config.json, found {type(config).__name__}.")
        model_type = config.get("model_type", "t5")
        if model_type != "t5":
            raise ConfigError(f"Expected the config of a T5 v1.1 (model_type 't5'), found {_kind(model_type)}.")
        projection = config.get("feed_forward_proj") or "relu"
        if projection not in _GATED_TANH_GELU:
            kind = "T5 v1.0, whose feed-forward layer is not gated" if projection == "relu" else "another variant"
            raise ConfigError(
                f"The config has feed_forward_proj={projection!r} ({kind}), expected 'gated-gelu' (T5 v1.1): "
                f"T5Encoder is gated by the tanh form of GELU."
            )
        check_fields(
            config,
            {*_HF_DEFAULTS, *_HF_WITHOUT_EFFECT, "feed_forward_proj"},
            _HF_REFUSED_UNLESS,
            model="T5Encoder",
            computes="the encoder of T5 v1.1, gated by the tanh form of GELU, in floating point",
        )
        # An explicit null means the default, as in transformers.
        return cls(**{k: d if config.get(k) is None else config[k] for k, d in _HF_DEFAULTS.items()})

    def to_hf(self) -> dict[str, Any]:
        """The config as the dict of a transformers `config.json`; `from_hf` of it is equal to `self`."""
        return {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": False,
            "pad_token_id": 0,
            "eos_token_id": 1,
            **dataclasses.asdict(self),
        }


def _kind(model_type: Any) -> str:
    """A model type for a message, and what makes the relatives of T5 other models."""
    differences = {
        "umt5": "every block of a UMT5 has its own relative position biases",
        "mt5": "an mT5 has another vocabulary, of 250,112 rows",
    }
    return f"{model_type!r}" + (f": {differences[model_type]}" if model_type in list(differences) else "")
