"""Model configurations: frozen data, read from and written to the `config.json` of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from clip_jax.errors import ConfigError
from clip_jax.hf_fields import OF_ANY_MODEL, check_fields, check_size
from clip_jax.t5_config import T5EncoderConfig as T5EncoderConfig

#: `hidden_act` in a transformers config. "gelu" is the exact (erf) form there, "gelu_new" the tanh form.
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh")

# transformers' CLIPTextConfig defaults: what an absent key means (configuration_clip.py).
_HF_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}

# Written by transformers 4 or 5 and without effect on what the text model computes at inference.
_HF_WITHOUT_EFFECT = OF_ANY_MODEL | frozenset(
    "attention_dropout bos_token_id dropout initializer_factor initializer_range logit_scale_init_value pad_token_id "
    # the other half of a whole CLIPModel
    "text_config text_config_dict vision_config vision_config_dict".split()
)

# Fields that change what is computed, and the values under which it stays what ClipTextModel computes.
_HF_REFUSED_UNLESS: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": (None, "absolute"),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "cross_attention_hidden_size": (None,),
    "use_attention_mask": (None, False),
    "is_causal": (None, True),
    "attention_type": (None, "causal"),
    "attention_bias": (None, True),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
    "quantization_config": (None,),
}

#: Every config was written with `eos_token_id: 2` before transformers PR #24773; it stands for the tokenizer's.
LEGACY_EOS = 2
_CLIP_EOS, _CLIP_BOS = 49407, 49406


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """Architecture of a CLIP text transformer (Radford et al. 2021, arXiv 2103.00020, section 2.4).

    Attributes:
        hidden_size: D, width of the residual stream.
        intermediate_size: F, width of the feed-forward layer.
        num_hidden_layers: Number of transformer blocks.
        num_attention_heads: N; the head size is D / N.
        hidden_act: One of `ACTIVATIONS`, spelled as in transformers: "quick_gelu" is `x * sigmoid(1.702 x)`
            (OpenAI's models), "gelu" the exact (erf) form (OpenCLIP's H and bigG).
        vocab_size: V, rows of the token embedding.
        max_position_embeddings: Rows of the position embedding: 77, or 248 for LongCLIP.
        layer_norm_eps: Epsilon of every LayerNorm.
        projection_dim: P, width of `text_embeds`; None for a model without `text_projection`.
        eos_token_id: End-of-text token; the pooled output is the row of its first occurrence. 2 means the highest id of
            a row, as in transformers, and is left in configs of vocabularies without CLIP's 49407.

    Raises:
        ConfigError: A value is out of range or not supported.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = None
    eos_token_id: int = _CLIP_EOS

    def __post_init__(self) -> None:
        sizes = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("hidden_act", "layer_norm_eps", "eos_token_id", "projection_dim")
        }
        if self.projection_dim is not None:
            sizes["projection_dim"] = self.projection_dim
        for name, size in sizes.items():
            check_size(name, size)
        if type(self.eos_token_id) is not int or self.eos_token_id < 0:
            raise ConfigError(f"eos_token_id must be one token id (an int >= 0), found {self.eos_token_id!r}.")
        if not isinstance(self.layer_norm_eps, float) or not self.layer_norm_eps > 0:
            raise ConfigError(f"layer_norm_eps must be a positive float, found {self.layer_norm_eps!r}.")
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, found {self.hidden_act!r}.")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size must be a multiple of num_attention_heads, "
                f"found {self.hidden_size} and {self.num_attention_heads}."
            )

    @classmethod
    def sd15(cls) -> ClipTextConfig:
        """CLIP ViT-L/14, the text encoder of SD 1.x: 12 layers of width 768, 123,060,480 parameters."""
        return cls(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            hidden_act="quick_gelu",
        )

    @classmethod
    def sd21(cls) -> ClipTextConfig:
        """OpenCLIP ViT-H/14 less its last block, the text encoder of SD 2.x: 23 layers of width 1024.

        SD 2 conditions on the penultimate layer of the 24-layer model; its checkpoints leave out the last.
        340,387,840 parameters.
        """
        return cls(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            hidden_act="gelu",
        )

    @classmethod
    def sdxl_clip_g(cls) -> ClipTextConfig:
        """OpenCLIP ViT-bigG/14, the second text encoder of SDXL: 32 layers of width 1280, with projection.

        694,659,840 parameters.
        """
        return cls(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            hidden_act="gelu",
            projection_dim=1280,
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ClipTextConfig:
        """Reads the dict of a transformers 4 or 5 `config.json`.

        Takes the config of `CLIPTextModel`, of `CLIPTextModelWithProjection`, or of a whole `CLIPModel` (its
        `text_config`). `projection_dim` is kept where the class named in `architectures` has a
        `text_projection`: a plain `CLIPTextModel` carries the field too, without meaning.

        Warns:
            UserWarning: Names the fields that are not known here; they are ignored.

        Raises:
            ConfigError: Another kind of model, or a value that `ClipTextModel` cannot honour.
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"Expected the dict of a config.json, found {type(config).__name__}.")
        model_type = config.get("model_type")
        if model_type not in ("clip_text_model", "clip"):
            raise ConfigError(
                f"Expected the config of a CLIP text model (model_type 'clip_text_model' or 'clip'), "
                f"found model_type {model_type!r}."
            )
        text = dict(config)
        if model_type == "clip":
            parts = [config.get(name) or {} for name in ("text_config", "text_config_dict")]
            if not all(isinstance(part, Mapping) for part in parts):
                raise ConfigError("text_config and text_config_dict must be objects; correct config.json.")
            nested = {**parts[0], **parts[1]}
            text = {**nested, "projection_dim": config.get("projection_dim", _HF_DEFAULTS["projection_dim"])}
        check_fields(
            text,
            {*_HF_DEFAULTS, *_HF_WITHOUT_EFFECT},
            _HF_REFUSED_UNLESS,
            model="ClipTextModel",
            computes="causal attention over learned absolute positions, in floating point",
        )
        # An explicit null means the default, as in transformers.
        known = {k: d if text.get(k) is None else text[k] for k, d in _HF_DEFAULTS.items()}
        projects = model_type == "clip" or "CLIPTextModelWithProjection" in str(config.get("architectures"))
        if not projects:
            known["projection_dim"] = None
        read = cls(**known)
        if read.eos_token_id == LEGACY_EOS and read.vocab_size > _CLIP_EOS:
            # argmax(input_ids) in transformers (modeling_clip.py): the highest id of the original vocabulary.
            return dataclasses.replace(read, eos_token_id=_CLIP_EOS)
        return read

    def to_hf(self) -> dict[str, Any]:
        """The config as the dict of a transformers `config.json`; `from_hf` of it is equal to `self`."""
        fields = dataclasses.asdict(self)
        if self.projection_dim is None:
            fields["projection_dim"] = self.hidden_size
        return {
            "architectures": ["CLIPTextModelWithProjection" if self.projection_dim else "CLIPTextModel"],
            "model_type": "clip_text_model",
            "bos_token_id": _CLIP_BOS,
            **fields,
        }


#: The architecture of any text encoder.
TowerConfig = ClipTextConfig | T5EncoderConfig


def config_from_hf(config: Mapping[str, Any]) -> TowerConfig:
    """Reads the dict of a `config.json` of any text encoder; arguments and errors as in its own `from_hf`."""
    is_t5 = isinstance(config, Mapping) and "t5" in str(config.get("model_type"))
    return T5EncoderConfig.from_hf(config) if is_t5 else ClipTextConfig.from_hf(config)
