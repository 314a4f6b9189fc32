"""OpenCLIP's and OpenAI's names of the text transformer, as transformers' names.

`nn.MultiheadAttention` keeps q, k and v as the rows of one `in_proj_weight`.
Reference: open_clip `transformer.py`, `TextTransformer`; transformers `convert_clip_original_pytorch_to_hf.py`.
"""

from __future__ import annotations

import re

from clip_jax.convert.state import StateDict, Tensor, renamed
from clip_jax.errors import CheckpointError

_ANCHOR = re.compile(r"(?P<root>(?:.*\.)?)token_embedding\.weight")

# A name below the root -> transformers' name. The first that matches counts.
_NAMES = (
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)", r"text_model.encoder.layers.\1.layer_norm\2.\3"),
    (
        r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)",
        r"text_model.encoder.layers.\1.self_attn.out_proj.\2",
    ),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)", r"text_model.encoder.layers.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)", r"text_model.encoder.layers.\1.mlp.fc2.\2"),
    (r"ln_final\.(weight|bias)", r"text_model.final_layer_norm.\1"),
)
_IN_PROJ = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")

# What the text encoder has no use for: the image encoder, the loss, and buffers.
_IGNORED = re.compile(
    r"visual\..*|logit_scale|logit_bias|attn_mask|input_resolution|context_length|vocab_size"
    r"|(.*\.)?position_ids|vision_model\..*"
)

# Variants of open_clip that compute something else.
_REFUSED = (
    (r"cls_emb|text_decoder\..*", "a CoCa model, whose text encoder has a class embedding"),
    (r".*\.ls_[12]\..*", "a text encoder with layer scale"),
    (r".*\.ln_[qk]\..*|.*\.attn\.(ln_inner|head_scale).*", "a text encoder with normalised queries and keys"),
    (r"text_projection\.bias", "a text encoder with a bias in its projection (SigLIP's)"),
    (r"positional_embedding_res", "LongCLIP as its authors save it, with two position embeddings"),
)


def roots(state: StateDict) -> list[str]:
    """The prefixes under which there is a text transformer: "", "text.", "cond_stage_model.model.", ..."""
    found = (_ANCHOR.fullmatch(name) for name in state)
    candidates = [match["root"] for match in found if match]
    return [root for root in candidates if any(name.startswith(f"{root}transformer.resblocks.") for name in state)]


def as_hf(state: StateDict, where: str) -> dict[str, Tensor]:
    """A text transformer under transformers' names, `text_model.*`; `text_projection` stays what it is.

    Args:
        state: The names below the root. One that has no place here is kept as it is, for the comparison with the
            architecture to report.
        where: The source, for messages.

    Raises:
        CheckpointError: A variant that computes something else, or an `in_proj` that is not three of a size.
    """
    state = {name: tensor for name, tensor in state.items() if not _IGNORED.fullmatch(name)}
    for pattern, kind in _REFUSED:
        name = next((name for name in state if re.fullmatch(pattern, name)), None)
        if name:
            raise CheckpointError(f"{where} is {kind} ({name}); expected CLIP's text transformer. It cannot be read.")
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := _IN_PROJ.fullmatch(name):
            result |= _split_in_proj(tensor, match[1], match[2], where)
        else:
            result[renamed(name, _NAMES)] = tensor
    return result


def _split_in_proj(tensor: Tensor, block: str, kind: str, where: str) -> dict[str, Tensor]:
    width, rest = divmod(tensor.shape[0] if tensor.shape else 0, 3)
    if rest or not width:
        raise CheckpointError(f"{where}: {tensor.key} has shape {tensor.shape}, expected the rows of q, k and v.")
    return {
        f"text_model.encoder.layers.{block}.self_attn.{part}_proj.{kind}": tensor.rows(i * width, (i + 1) * width)
        for i, part in enumerate("qkv")
    }
