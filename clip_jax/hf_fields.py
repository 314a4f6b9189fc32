"""Checks the fields of a transformers `config.json` against those that an architecture knows."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from clip_jax.errors import ConfigError

OF_ANY_MODEL = frozenset(
    "_attn_implementation _name_or_path architectures attn_implementation chunk_size_feed_forward dtype "
    "gradient_checkpointing id2label is_encoder_decoder label2id model_type output_attentions output_hidden_states "
    "problem_type return_dict torch_dtype transformers_version use_cache "
    # what transformers 4 wrote of its base class, generation defaults among it
    "bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id "
    "forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_scores prefix pruned_heads remove_invalid_values repetition_penalty "
    "return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss "
    "tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torchscript typical_p use_bfloat16".split()
)
"""Fields that transformers writes for any model, without effect on what a text encoder computes at inference."""

_MOST, _MOST_LAYERS = 2**24, 1000  # beyond any model, and little enough to be looked at


def check_size(name: str, size: object) -> None:
    """Refuses what is no number of dimensions or layers, or one that no model has.

    Raises:
        ConfigError: It is none.
    """
    if type(size) is not int or size < 1:
        raise ConfigError(f"{name} must be a positive int, found {size!r}.")
    if size > (most := _MOST_LAYERS if name.endswith("_layers") else _MOST):
        raise ConfigError(f"{name} must be at most {most}, found {size}: is the file damaged?")


def check_fields(
    config: Mapping[str, Any],
    known: Collection[str],
    refused_unless: Mapping[str, tuple[Any, ...]],
    *,
    model: str,
    computes: str,
) -> None:
    """Refuses values that change what is computed, and warns by name about fields that are not known.

    Args:
        config: The dict of a `config.json`.
        known: Fields that are read, or have no effect.
        refused_unless: Field -> the values under which it changes nothing; None stands for an absent one too.
        model: The class that cannot honour other values.
        computes: What it computes.

    Raises:
        ConfigError: A field of `refused_unless` has another value.
    """
    for name, allowed in refused_unless.items():
        if config.get(name) not in allowed:
            raise ConfigError(
                f"The config has {name}={config[name]!r}, which {model} cannot honour: it computes {computes}."
            )
    unknown = sorted(set(config) - set(known) - set(refused_unless))
    if unknown:
        warnings.warn(
            f"The config has fields unknown to clip_jax, which are ignored: {', '.join(unknown)}.",
            UserWarning,
            stacklevel=3,
        )
