"""The names that llama.cpp gives to T5's encoder, as transformers' names.

Reference: gguf-py `tensor_mapping.py`, llama.cpp `convert_hf_to_gguf.py` (`T5EncoderModel`).
"""

from __future__ import annotations

from clip_jax.convert.state import StateDict, Tensor, renamed

_ANCHOR = "enc.blk.0.attn_q.weight"
_NAMES = (
    (r"token_embd\.weight", "shared.weight"),
    (r"enc\.output_norm\.weight", "encoder.final_layer_norm.weight"),
    (r"enc\.blk\.(\d+)\.attn_([qkvo])\.weight", r"encoder.block.\1.layer.0.SelfAttention.\2.weight"),
    (
        r"enc\.blk\.(\d+)\.attn_rel_b\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (r"enc\.blk\.(\d+)\.attn_norm\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (r"enc\.blk\.(\d+)\.ffn_gate\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight"),
    (r"enc\.blk\.(\d+)\.ffn_up\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (r"enc\.blk\.(\d+)\.ffn_down\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
    (r"enc\.blk\.(\d+)\.ffn_norm\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (r"dec\.(.*)", r"decoder.\1"),  # of a whole T5, and ignored as such
    (r"output\.weight", "lm_head.weight"),
)


def is_gguf_t5(state: StateDict) -> bool:
    """Whether these are llama.cpp's names of a T5."""
    return _ANCHOR in state


def as_hf(state: StateDict) -> dict[str, Tensor]:
    """The same tensors under transformers' names; a name that has no place there is kept."""
    return {renamed(name, _NAMES): tensor for name, tensor in state.items()}
