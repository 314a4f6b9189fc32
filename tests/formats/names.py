"""The names of each project, spelt out, for a state dict under those of transformers."""

from __future__ import annotations

import numpy as np

from tests.formats.model import State


def below(prefix: str, state: State) -> State:
    return {prefix + name: array for name, array in state.items()}


def unprefixed(state: State) -> State:
    return {name.removeprefix("text_model."): array for name, array in state.items()}


def open_clip(state: State) -> State:
    """OpenCLIP's and OpenAI's names: one matrix for q, k and v, and a projection that is not transposed."""
    text = "text_model."
    out = {
        "positional_embedding": state[f"{text}embeddings.position_embedding.weight"],
        "token_embedding.weight": state[f"{text}embeddings.token_embedding.weight"],
        "ln_final.weight": state[f"{text}final_layer_norm.weight"],
        "ln_final.bias": state[f"{text}final_layer_norm.bias"],
    }
    if "text_projection.weight" in state:
        out["text_projection"] = state["text_projection.weight"].T
    for i in range(sum(name.endswith("mlp.fc1.bias") for name in state)):
        theirs, ours = f"{text}encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            parts = [state[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            out[f"{ours}attn.in_proj_{kind}"] = np.concatenate(parts)
            out[f"{ours}attn.out_proj.{kind}"] = state[f"{theirs}self_attn.out_proj.{kind}"]
            out[f"{ours}ln_1.{kind}"] = state[f"{theirs}layer_norm1.{kind}"]
            out[f"{ours}ln_2.{kind}"] = state[f"{theirs}layer_norm2.{kind}"]
            out[f"{ours}mlp.c_fc.{kind}"] = state[f"{theirs}mlp.fc1.{kind}"]
            out[f"{ours}mlp.c_proj.{kind}"] = state[f"{theirs}mlp.fc2.{kind}"]
    return out


def flax(state: State, joint: str = "/") -> State:
    """The names of transformers' Flax classes. Their kernels are the transposes of torch's, T5's norms have weights."""
    out = {}
    for name, array in state.items():
        *module, kind = name.split(".")
        if kind == "weight" and "layer_norm" in module[-1] and "text_model" in module:
            kind = "scale"
        elif module[-1].endswith("embedding") or module[-1] in ("shared", "relative_attention_bias"):
            kind = "embedding"
        elif kind == "weight" and "layer_norm" not in module[-1]:
            kind, array = "kernel", array.T
        out[joint.join([*module, kind])] = array
    return out


def llama_cpp(state: State) -> State:
    """The names that llama.cpp gives to T5's encoder."""
    out = {
        "token_embd.weight": state["shared.weight"],
        "enc.output_norm.weight": state["encoder.final_layer_norm.weight"],
        "enc.blk.0.attn_rel_b.weight": state[f"{attention(0)}.relative_attention_bias.weight"],
    }
    for i in range(sum(name.endswith("wo.weight") for name in state)):
        block = f"encoder.block.{i}.layer"
        for part in "qkvo":
            out[f"enc.blk.{i}.attn_{part}.weight"] = state[f"{attention(i)}.{part}.weight"]
        out[f"enc.blk.{i}.attn_norm.weight"] = state[f"{block}.0.layer_norm.weight"]
        out[f"enc.blk.{i}.ffn_norm.weight"] = state[f"{block}.1.layer_norm.weight"]
        out[f"enc.blk.{i}.ffn_gate.weight"] = state[f"{block}.1.DenseReluDense.wi_0.weight"]
        out[f"enc.blk.{i}.ffn_up.weight"] = state[f"{block}.1.DenseReluDense.wi_1.weight"]
        out[f"enc.blk.{i}.ffn_down.weight"] = state[f"{block}.1.DenseReluDense.wo.weight"]
    return out


def attention(block: int) -> str:
    return f"encoder.block.{block}.layer.0.SelfAttention"


def with_both_embeddings(state: State) -> State:
    return {**state, "encoder.embed_tokens.weight": state["shared.weight"].copy()}


def bare_projection(state: State) -> State:
    """The projection as OpenCLIP stores it, among transformers' names."""
    rest = {name: array for name, array in state.items() if name != "text_projection.weight"}
    return {**rest, "text_projection": state["text_projection.weight"].T}
