"""What is no text encoder that is read, or not all of one: refused by its name, with what to do instead."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clip_jax
from clip_jax import CheckpointError, ClipJaxError, ConfigError, T5EncoderConfig
from clip_jax.convert import convert
from clip_jax.params.shapes import flatten
from clip_jax.tokenizers.stand_in import stand_in_t5_tokenizer
from tests.checkpoints import digests, hf_state, t5_state
from tests.formats.files import write_safetensors
from tests.formats.model import CONFIGS, State, configs_of, model
from tests.formats.names import attention, bare_projection, below, llama_cpp, open_clip, with_both_embeddings
from tests.formats.values import FLOAT8, comfy_2024, comfy_2025, scaled

L, G, T5 = map(model, ("clip_l", "clip_g", "t5"))
Q = f"{attention(0)}.q"
BIAS = "SelfAttention.relative_attention_bias.weight"


def array(*shape: int, value: float = 1) -> np.ndarray:
    return np.full(shape, value, np.float32)


def bytes_of(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def less(state: State, *names: str) -> State:
    assert state.keys() >= set(names)
    return {name: tensor for name, tensor in state.items() if name not in names}


def write(folder: Path, *states: State, metadata: dict[str, str] | None = None) -> list[Path]:
    return [write_safetensors(folder / f"{i}.weights", state, metadata) for i, state in enumerate(states)]


def refused(sources: list[Path], message: str, error: type[ClipJaxError] = CheckpointError, **options: Any) -> None:
    """Both `load` and `convert` fail with the same message, and leave nothing behind."""
    place = sources[0].parent
    before = digests(place)
    for call in (
        lambda: clip_jax.load(sources, **options),
        lambda: convert(sources, place / "out", **options),
    ):
        with pytest.raises(error, match=message):
            call()
        assert digests(place) == before


# --- other models

ADVICE = "Take the float16, bfloat16, scaled fp8 or GGUF file of the same model"
T5_V1_0 = {name.replace("wi_0", "wi"): tensor for name, tensor in T5.items() if "wi_1" not in name}
UMT5 = {**T5, f"encoder.block.1.layer.0.{BIAS}": array(32, 4)}
MT5 = t5_state(T5EncoderConfig(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=250112))
BLOCK = "transformer.resblocks.1."

OTHERS = {
    "UMT5": (UMT5, r"is not a T5 v1\.1 encoder: .* found the tensors of a UMT5 \(a position bias in each block\)"),
    "UMT5 in GGUF's names": (
        {**llama_cpp(T5), "enc.blk.1.attn_rel_b.weight": array(32, 4)},
        "found the tensors of a UMT5",
    ),
    "T5 v1.0": (T5_V1_0, r"found the tensors of a T5 v1\.0, which is not gated"),
    "a T5 without heads": (
        {**T5, f"encoder.block.0.layer.0.{BIAS}": array(32, 0)},
        r"expected a matrix encoder\.block\.0\..*relative_attention_bias\.weight .* found one of shape \(32, 0\)",
    ),
    "mT5": (MT5, r"holds an mT5, by the 250112 rows of its embedding; expected a T5 v1\.1"),
    "bitsandbytes int8": (
        {**T5, f"{Q}.weight": T5[f"{Q}.weight"].astype(np.int8), f"{Q}.SCB": array(64)},
        rf"is quantised as bitsandbytes int8 \({Q}\.SCB\), which is not read\. {ADVICE}",
    ),
    "bitsandbytes 4 bit": (
        {**T5, f"{Q}.weight": np.zeros((3072, 1), np.uint8), f"{Q}.weight.absmax": array(96)},
        "is quantised as bitsandbytes 4 bit",
    ),
    "NVFP4": (
        {**T5, f"{Q}.weight": np.zeros((64, 48), np.uint8), f"{Q}.weight_scale_2": array()},
        rf"is quantised as NVFP4 .* {ADVICE}",
    ),
    "int8 of ComfyUI": (
        {**T5, f"{Q}.weight_scale": array(), f"{Q}.comfy_quant": bytes_of({"format": "int8_tensorwise"})},
        rf"{Q} is quantised as 'int8_tensorwise', which is not read; expected one of float8_e4m3fn, .*{ADVICE}",
    ),
    "another quantisation of ComfyUI in a whole checkpoint": (
        below("text_encoders.t5xxl.transformer.", {**T5, f"{Q}.comfy_quant": bytes_of({"format": "mxfp8"})}),
        rf"{Q} is quantised as 'mxfp8', which is not read",
    ),
    "a quantisation that cannot be read": (
        {**T5, f"{Q}.comfy_quant": np.frombuffer(b"{", np.uint8)},
        r"what it says about its quantisation cannot be read \(JSONDecodeError",
    ),
    "a quantisation without a format": (
        {**T5, f"{Q}.comfy_quant": bytes_of([1])},
        "what it says about its quantisation cannot be read",
    ),
    "a scale for every block of 16": (
        {**comfy_2024(scaled(T5)), f"{Q}.scale_weight": array(64, 6)},
        rf"{Q}\.weight is float8_e4m3fn of shape \(64, 96\) with a scale float32 of shape \(64, 6\); expected a matrix",
    ),
    "a scale of what is not quantised": (
        {**T5, f"{Q}.scale_weight": array()},
        rf"{Q}\.weight is float32 of shape \(64, 96\) with a scale",
    ),
    "CoCa": (
        below("text.", {**open_clip(G), "cls_emb": array(32)}),
        r"is a CoCa model, whose text encoder has a class embedding \(cls_emb\); expected CLIP's text transformer",
    ),
    "layer scale": ({**open_clip(G), f"{BLOCK}ls_1.gamma": array(64)}, "is a text encoder with layer scale"),
    "normalised queries": (
        {**open_clip(G), f"{BLOCK}attn.ln_q.weight": array(64)},
        "is a text encoder with normalised queries and keys",
    ),
    "SigLIP in OpenCLIP": (
        below("text.", {**open_clip(G), "text_projection.bias": array(32)}),
        r"is a text encoder with a bias in its projection \(SigLIP's\)",
    ),
    "LongCLIP of its authors": (
        {**open_clip(G), "positional_embedding_res": array(77, 32)},
        "is LongCLIP as its authors save it, with two position embeddings",
    ),
    "a text encoder of transformers inside OpenCLIP": (
        {
            "text.transformer.embeddings.word_embeddings.weight": array(9, 8),
            "text.transformer.encoder.layer.0.attention.self.query.weight": array(8, 8),
            "text.proj.weight": array(8, 8),
            "visual.conv1.weight": array(2, 2),
        },
        "found the tensors of an OpenCLIP model around another encoder",
    ),
    "an image encoder": (
        {"visual.conv1.weight": array(2, 2), "visual.transformer.resblocks.0.ln_1.weight": array(2)},
        "expected CLIP's text encoder or T5's, found the tensors of a CLIP image encoder",
    ),
    "an image encoder of transformers": (
        {"vision_model.encoder.layers.0.layer_norm1.weight": array(2)},
        "found the tensors of a CLIP image encoder",
    ),
    "SD 2 unCLIP's image encoder": (
        {"embedder.model.token_embedding.weight": array(9, 8), "embedder.model.visual.conv1.weight": array(2, 2)},
        "expected CLIP's text encoder or T5's, found 2 tensors: embedder.model.token_embedding.weight",
    ),
    "a diffusion model": (
        {"model.diffusion_model.out.2.weight": array(2)},
        "found the tensors of a diffusion model without text encoders",
    ),
    "FLUX's transformer": (
        {"double_blocks.0.img_attn.qkv.weight": array(2)},
        "found the tensors of FLUX's transformer without text encoders",
    ),
    "a diffusers UNet": ({"down_blocks.0.resnets.0.conv1.weight": array(2)}, "found the tensors of a diffusers UNet"),
    "a diffusers transformer": (
        {"single_transformer_blocks.0.attn.to_q.weight": array(2)},
        "found the tensors of a diffusion transformer",
    ),
    "a VAE": ({"encoder.conv_in.weight": array(2), "decoder.conv_in.weight": array(2)}, "found the tensors of a VAE"),
    "a LoRA of kohya": (
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": array(2)},
        "found the tensors of a LoRA",
    ),
    "a LoRA of PEFT": (
        {"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": array(2)},
        "found the tensors of a LoRA",
    ),
    "quanto": (
        {
            "encoder.block.0.layer.0.SelfAttention.q.weight._data": array(2, 2),
            "encoder.block.0.layer.0.SelfAttention.q.weight._scale": array(2),
        },
        "found the tensors of a model quantised by quanto, which is not read",
    ),
    "BERT": ({"bert.embeddings.word_embeddings.weight": array(2)}, "found the tensors of a BERT model"),
    "a language model": ({"model.layers.0.mlp.up_proj.weight": array(2)}, "a decoder-only language model"),
    "a language model of llama.cpp": (
        {"token_embd.weight": array(2, 2), "blk.0.attn_q.weight": array(2, 2)},
        "a decoder-only language model",
    ),
    "a textual inversion": ({"emb_params": array(1, 8)}, "found 1 tensors: emb_params"),
    "nothing": ({}, "found no tensors"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused_by_its_name(name, tmp_path):
    state, message = OTHERS[name]
    refused(write(tmp_path, state), message)


def test_a_quantisation_that_the_header_tells_is_refused_by_its_name(tmp_path):
    state = comfy_2025(scaled(T5), in_header=True)
    layers = {Q: {"format": "nvfp4"}}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    refused(write(tmp_path, state, metadata=header), rf"{Q} is quantised as 'nvfp4', which is not read")


def test_the_header_of_another_part_of_the_file_does_not_matter(tmp_path):
    header = {"_quantization_metadata": json.dumps({"layers": {"model.diffusion_model.x": {"format": "nvfp4"}}})}
    state = below("cond_stage_model.transformer.", L)
    (source,) = write(tmp_path, {**state, "model.diffusion_model.x.weight": array(2)}, metadata=header)
    assert clip_jax.info(source, config={"clip_l": CONFIGS["clip_l"]}).family.name == "sd15"


# --- not all of it


def without_a_part(state: State, **changed: np.ndarray) -> State:
    return {**state, **{name.replace("__", "."): tensor for name, tensor in changed.items()}}


IN_PROJ = "transformer.resblocks.0.attn.in_proj"
PARTS = {
    "in_proj_bias": (
        less(open_clip(L), f"{IN_PROJ}_bias"),
        r"OpenCLIP names, as those of transformers\) does not match its architecture\. missing \(3\): .*\.k_proj\.bias",
    ),
    "in_proj_weight of the first block": (
        less(open_clip(L), f"{IN_PROJ}_weight"),
        r"missing \(3\): text_model\.encoder\.layers\.0\.self_attn\.k_proj\.weight",
    ),
    "rows that are not three parts": (
        {**open_clip(L), f"{IN_PROJ}_weight": array(47, 16)},
        rf"{IN_PROJ}_weight has shape \(47, 16\), expected the rows of q, k and v",
    ),
    "rows of another width": (
        {**open_clip(L), f"{IN_PROJ}_weight": array(51, 16)},
        r"wrong shape \(3\): .*k_proj\.weight has shape \(17, 16\), expected \(16, 16\)",
    ),
    "a position embedding": (less(open_clip(L), "positional_embedding"), r"missing \(1\): .*position_embedding"),
    "a tensor of transformers": (
        less(L, "text_model.encoder.layers.1.mlp.fc2.bias"),
        r"missing \(1\): text_model\.encoder\.layers\.1\.mlp\.fc2\.bias",
    ),
    "one too many": (
        {**L, "text_model.encoder.layers.1.adapter.weight": array(2)},
        r"not expected \(1\): text_model\.encoder\.layers\.1\.adapter\.weight",
    ),
    "one too many of OpenCLIP": (
        {**open_clip(L), f"{BLOCK}adapter.weight": array(2)},
        rf"not expected \(1\): {BLOCK}adapter\.weight",
    ),
    "a block too many": (
        {**hf_state(dataclasses.replace(CONFIGS["clip_l"], num_hidden_layers=3))},
        r"not expected \(16\): text_model\.encoder\.layers\.2\.layer_norm1\.bias",
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_all_of_an_encoder_has_to_be_there_and_nothing_else(name, tmp_path):
    state, message = PARTS[name]
    refused(write(tmp_path, state), message, config=configs_of("sd15"))


def test_whole_numbers_are_no_weights(tmp_path):
    state = {**T5, f"{Q}.weight": T5[f"{Q}.weight"].astype(np.int8)}
    message = rf"holds tensors of dtypes that are not read: .* found \(1\): {Q}\.weight is int8"
    refused(write(tmp_path, L, state), message, config=configs_of("flux"))


def test_a_missing_tensor_of_t5_is_named(tmp_path):
    state = less(T5, "encoder.block.1.layer.1.DenseReluDense.wo.weight")
    refused(
        write(tmp_path, L, state),
        r"missing \(1\): encoder\.block\.1\.layer\.1\.DenseReluDense\.wo\.weight",
        config=configs_of("flux"),
    )


def test_the_embedding_of_t5_may_be_there_twice_if_it_is_the_same(tmp_path):
    differs = with_both_embeddings(T5)
    differs["encoder.embed_tokens.weight"][7, 7] += 1
    sources = write(tmp_path, L, differs)
    stand_in_t5_tokenizer().save(tmp_path / "t5")
    with pytest.raises(
        CheckpointError, match=r"1\.weights: shared\.weight and encoder\.embed_tokens\.weight .* differ"
    ):
        clip_jax.load(sources, config=configs_of("flux"), tokenizer={"t5": tmp_path / "t5"})


# --- which towers


def test_the_width_of_clip_b_needs_a_config(tmp_path):
    refused(
        write(tmp_path, L),
        r"holds a CLIP text model of width 16; expected one of 768 \(clip_l\), 1024 \(clip_h\), 1280 \(clip_g\)\. "
        r"Which tower it is, and its activation, cannot be told from the weights: say so with config=",
    )


def test_two_of_a_kind_are_refused(tmp_path):
    refused(write(tmp_path, L, L), "holds clip_l twice, .* expected it once", config=configs_of("sd15"))


def test_t5_alone_is_no_family(tmp_path):
    refused(
        write(tmp_path, T5),
        r"holds t5 alone \(which clip_jax.compat.FlaxT5EncoderModel reads, from a folder of transformers\); expected "
        r"the text encoders of a family \(.*flux: clip_l, t5\)\. Name the files",
    )


def test_clip_l_and_clip_g_could_be_two_families(tmp_path):
    refused(
        write(tmp_path, L, G),
        "holds clip_l, clip_g, which could be of any of the families sdxl, sd3. Pass family=",
        config=configs_of("sdxl"),
    )
    info = clip_jax.info([tmp_path / "0.weights", tmp_path / "1.weights"], config=configs_of("sdxl"), family="sd3")
    assert info.towers.keys() == {"clip_l", "clip_g"}


def test_another_family_than_the_one_said_is_refused(tmp_path):
    refused(
        write(tmp_path, L),
        r"holds clip_l; expected the text encoders of a family \(flux: clip_l, t5\)",
        config=configs_of("sd15"),
        family="flux",
    )


def test_a_config_for_a_tower_that_is_not_there_is_refused(tmp_path):
    refused(write(tmp_path, L), "has no clip_g, for which a config was given", config=configs_of("sdxl"))


def test_a_config_of_another_model_is_refused(tmp_path):
    wrong = dataclasses.replace(CONFIGS["clip_l"], intermediate_size=128)
    refused(write(tmp_path, L), r"wrong shape \(6\): .*mlp\.fc1\.bias has shape \(32,\)", config={"clip_l": wrong})
    unknown = {**wrong.to_hf(), "hidden_act": "relu"}
    refused(write(tmp_path, L), "hidden_act must be one of", ConfigError, config={"clip_l": unknown})


# --- projections


def test_a_missing_projection_of_clip_g_is_never_made_up(tmp_path):
    message = (
        r"clip_g has no text_projection, without which there is no pooled embedding\. Take a checkpoint that has it"
    )
    plain = {"clip_g": dataclasses.replace(CONFIGS["clip_g"], projection_dim=None)}
    refused(write(tmp_path, less(G, "text_projection.weight")), message, config=plain)


def test_a_projection_of_ones_is_a_dummy(tmp_path):
    sources = write(tmp_path, {**bare_projection(G), "text_projection": array(32, 32)})
    with (
        pytest.warns(UserWarning, match=r"text_projection is all ones, a dummy .* pass text_projection=\"as_is\""),
        pytest.raises(CheckpointError, match="clip_g has no text_projection"),
    ):
        clip_jax.load(sources, config=configs_of("sdxl_refiner"))
    encoder = clip_jax.load(sources, config=configs_of("sdxl_refiner"), text_projection="as_is")
    assert np.all(encoder.params["clip_g"]["text_projection"]["kernel"] == 1)
    for look in (clip_jax.info, clip_jax.load_tokenizers):
        assert look(sources, config=configs_of("sdxl_refiner"), text_projection="as_is")


def test_a_projection_with_some_ones_is_no_dummy(tmp_path):
    kernel = G["text_projection.weight"].T.copy()  # [D, P]
    kernel[0] = 1
    sources = write(tmp_path, {**G, "text_projection.weight": kernel.T})
    encoder = clip_jax.load(sources, config=configs_of("sdxl_refiner"))
    np.testing.assert_array_equal(encoder.params["clip_g"]["text_projection"]["kernel"], kernel)


def test_a_projection_that_looks_transposed_is_told_and_can_be_mended(tmp_path):
    """The corner of SDXL's, as one of kohya's scripts leaves it: under the name of a Linear, but not transposed."""
    kernel = G["text_projection.weight"].T.copy()  # [D, P]
    kernel[0, :3], kernel[:3, 0] = (-0.0348, 0.0218, -0.0025), (-0.0348, -0.0037, 0.0261)
    config = configs_of("sdxl_refiner")
    right = clip_jax.load(write(tmp_path, {**G, "text_projection.weight": kernel.T}), config=config)  # and no warning
    sources = write(tmp_path, {**G, "text_projection.weight": kernel})
    with pytest.warns(UserWarning, match="looks like SDXL's projection transposed, .* pass text_projection="):
        wrong = clip_jax.load(sources, config=config)
    mended = clip_jax.load(sources, config=config, text_projection="as_is")

    found = [flatten(encoder.params["clip_g"])["text_projection/kernel"] for encoder in (right, wrong, mended)]
    np.testing.assert_array_equal(found[0], kernel)
    np.testing.assert_array_equal(found[1], kernel.T)
    np.testing.assert_array_equal(found[2], kernel)


@pytest.mark.parametrize("shape", [(16, 2), (2, 16), (3, 2), (1, 1)])
def test_a_projection_of_a_row_or_two_is_refused_as_any_of_another_shape(tmp_path, shape):
    sources = write(tmp_path, {**G, "text_projection.weight": 2 * array(*shape)})
    refused(sources, "text_projection.weight", config=configs_of("sdxl_refiner"))


def test_only_three_ways_to_read_a_projection(tmp_path):
    refused(write(tmp_path, L), "must be auto, as_is or transpose, found 'yes'", ClipJaxError, text_projection="yes")


# --- tokenizers


def test_a_file_of_t5_needs_a_tokenizer(tmp_path):
    sources = write(tmp_path, L, {name: tensor.astype(FLOAT8) for name, tensor in T5.items()})
    refused(sources, r"No T5 tokenizer in .*Pass the folder of a T5 tokenizer", config=configs_of("flux"))
    stand_in_t5_tokenizer().save(tmp_path / "elsewhere")
    encoder = clip_jax.load(sources, config=configs_of("flux"), tokenizer={"t5": tmp_path / "elsewhere"})
    assert encoder("a cat", max_sequence_length=8).prompt_embeds.shape == (1, 8, 96)


def test_the_tokenizer_beside_a_file_of_t5_is_its_own(tmp_path):
    sources = write(tmp_path, L, T5)
    stand_in_t5_tokenizer().save(tmp_path)
    encoder = clip_jax.load(sources, config=configs_of("flux"))
    assert encoder.tokenizers["t5"].vocab_size == stand_in_t5_tokenizer().vocab_size
    assert encoder.tokenizers["clip_l"].vocab_size == 49408
