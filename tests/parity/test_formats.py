"""Real libraries write checkpoints and run them; ours are the same weights and the same outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import clip_jax
from clip_jax.convert.source import open_source
from clip_jax.params.shapes import flatten
from clip_jax.tokenizers.stand_in import stand_in_t5_tokenizer
from tests.formats.model import CONFIGS, configs_of, model
from tests.formats.names import llama_cpp
from tests.formats.values import is_linear
from tests.parity.writing import (
    CLIP_MODELS,
    TOLERANCE,
    Arrays,
    conditioning,
    tensors,
    write_bin,
    write_legacy,
    write_safetensors,
)

# --- transformers


def torch_clip(tower: str, *, projection: bool) -> transformers.PreTrainedModel:
    config = dataclasses.replace(CONFIGS[tower], projection_dim=CONFIGS[tower].hidden_size if projection else None)
    torch.manual_seed(0)
    made = CLIP_MODELS[projection](transformers.CLIPTextConfig(**config.to_hf()))
    return made.eval()


def saved_by_transformers_4(folder: Path) -> transformers.PreTrainedModel:
    """A model that was loaded from a file with `text_model.`, and is saved with it again."""
    made = torch_clip("clip_l", projection=False)
    made.config.save_pretrained(folder)
    write_safetensors(folder / "model.safetensors", {f"text_model.{n}": t for n, t in made.state_dict().items()})
    loaded = transformers.CLIPTextModel.from_pretrained(folder)
    loaded.save_pretrained(folder)
    return loaded.eval()


def saved_by_transformers_5(folder: Path) -> transformers.PreTrainedModel:
    made = torch_clip("clip_l", projection=False)
    made.save_pretrained(folder)
    return made


def saved_in_shards(folder: Path) -> transformers.PreTrainedModel:
    made = torch_clip("clip_l", projection=False)
    made.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return made


def saved_as_bin(folder: Path, write: Callable[[Path, Arrays], Path]) -> transformers.PreTrainedModel:
    made = torch_clip("clip_l", projection=False)
    made.config.save_pretrained(folder)
    write(folder / "pytorch_model.bin", made.state_dict())
    return made


SAVED = {
    "5, without text_model.": (saved_by_transformers_5, "embeddings.token_embedding.weight"),
    "4, with text_model.": (saved_by_transformers_4, "text_model.embeddings.token_embedding.weight"),
    "shards": (saved_in_shards, "embeddings.token_embedding.weight"),
    "pytorch_model.bin": (lambda folder: saved_as_bin(folder, write_bin), "embeddings.token_embedding.weight"),
    "old pytorch_model.bin": (lambda folder: saved_as_bin(folder, write_legacy), "embeddings.token_embedding.weight"),
}


@pytest.mark.parametrize("way", SAVED)
def test_clip_of_transformers(way, tmp_path, assert_parity):
    save, anchor = SAVED[way]
    reference = save(tmp_path)
    assert anchor in open_source(tmp_path).state  # else this tests another spelling than it says
    encoder = clip_jax.load(tmp_path, family="sd15")
    ids, ours = conditioning(encoder)
    with torch.no_grad():
        theirs = reference(ids["clip_l"]).last_hidden_state
    assert_parity(ours.prompt_embeds, theirs, TOLERANCE)


@pytest.mark.parametrize("whole", [False, True])
def test_projections_of_transformers(whole, tmp_path, assert_parity):
    if whole:
        text = CONFIGS["clip_g"].to_hf()
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(0)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
        reference = transformers.CLIPModel(config).eval()
    else:
        reference = torch_clip("clip_g", projection=True)
    reference.save_pretrained(tmp_path)
    encoder = clip_jax.load(tmp_path / "model.safetensors", config=configs_of("sdxl_refiner"))
    ids, ours = conditioning(encoder)
    with torch.no_grad():
        out = reference.text_model(ids["clip_g"], output_hidden_states=True)
        pooled = reference.text_projection(out.pooler_output)
    assert_parity(ours.prompt_embeds, out.hidden_states[-2], TOLERANCE)
    assert_parity(ours.pooled_prompt_embeds, pooled, TOLERANCE)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_t5_of_transformers(whole, write, tmp_path, assert_parity):
    torch.manual_seed(0)
    cls = transformers.T5ForConditionalGeneration if whole else transformers.T5EncoderModel
    config = transformers.T5Config(**{**CONFIGS["t5"].to_hf(), "is_encoder_decoder": whole})
    reference = cls(config).eval()
    state = reference.state_dict()
    if write is write_safetensors:  # which refuses tensors that share their memory
        state = {n: t for n, t in state.items() if "embed_tokens" not in n and n != "lm_head.weight"}
    low = torch_clip("clip_l", projection=False)
    sources = [write(tmp_path / "0", state), write(tmp_path / "1", low.state_dict())]
    stand_in_t5_tokenizer().save(tmp_path)
    encoder = clip_jax.load(sources, config=configs_of("flux"))
    ids, ours = conditioning(encoder)
    with torch.no_grad():
        theirs = reference.get_encoder()(ids["t5"]).last_hidden_state
        pooled = low(ids["clip_l"]).pooler_output
    assert_parity(ours.prompt_embeds, theirs, TOLERANCE)
    assert_parity(ours.pooled_prompt_embeds, pooled, TOLERANCE)


# --- OpenCLIP


def open_clip_model(name: str, tower: str) -> torch.nn.Module:
    """A small model of OpenCLIP, its text transformer like one of our towers."""
    library = pytest.importorskip("open_clip")
    config = CONFIGS[tower]
    torch.manual_seed(0)
    made = getattr(library, name)(
        embed_dim=config.hidden_size,
        vision_cfg=library.CLIPVisionCfg(layers=1, width=64, head_width=32, patch_size=16, image_size=32),
        text_cfg=library.CLIPTextCfg(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            layers=config.num_hidden_layers,
            mlp_ratio=config.intermediate_size / config.hidden_size,
        ),
        quick_gelu=config.hidden_act == "quick_gelu",
    )
    with torch.no_grad():  # most start as zeros or ones, which would hide a mistake
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def save_state(path: Path, made: torch.nn.Module) -> Path:
    return write_bin(path, {"epoch": 3, "state_dict": made.state_dict()})


def save_wrapped(path: Path, made: torch.nn.Module) -> Path:
    return write_bin(path, {"state_dict": {f"module.{name}": tensor for name, tensor in made.state_dict().items()}})


def save_safetensors(path: Path, made: torch.nn.Module) -> Path:
    return write_safetensors(path, made.state_dict())


def save_script(path: Path, made: torch.nn.Module) -> Path:
    torch.jit.save(torch.jit.script(made), str(path))
    return path


def save_trace(path: Path, made: torch.nn.Module) -> Path:
    example = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.long))
    torch.jit.save(torch.jit.trace(made, example, check_trace=False), str(path))
    return path


SAVERS = [save_state, save_wrapped, save_safetensors, save_script, save_trace]


def open_clip_outputs(made: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the text transformer: the block before the last, the last after the norm, and what `encode_text` returns."""
    text = getattr(made, "text", made)
    seen = {}
    hooks = [
        text.transformer.resblocks[-2].register_forward_hook(lambda m, i, out: seen.update(penultimate=out)),
        text.ln_final.register_forward_hook(lambda m, i, out: seen.update(last=out)),
    ]
    with torch.no_grad():
        seen["encoded"] = made.encode_text(ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("save", SAVERS, ids=lambda save: save.__name__)
@pytest.mark.parametrize("name", ["CLIP", "CustomTextCLIP"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
def test_open_clip(name, save, tmp_path, assert_parity):
    made = open_clip_model(name, "clip_g")
    encoder = clip_jax.load(save(tmp_path / "0", made), config=configs_of("sdxl_refiner"))
    ids, ours = conditioning(encoder)
    theirs = open_clip_outputs(made, ids["clip_g"])
    assert_parity(ours.prompt_embeds, theirs["penultimate"], TOLERANCE)
    assert_parity(ours.pooled_prompt_embeds, theirs["encoded"], TOLERANCE)
    # The projection is square; read the other way round it is another one.
    wrong = clip_jax.load(tmp_path / "0", config=configs_of("sdxl_refiner"), text_projection="transpose")
    assert np.abs(conditioning(wrong)[1].pooled_prompt_embeds - theirs["encoded"].numpy()).max() > 1000 * TOLERANCE


def test_open_clip_with_quick_gelu(tmp_path, assert_parity):
    made = open_clip_model("CLIP", "clip_l")
    encoder = clip_jax.load(save_state(tmp_path / "0", made), config=configs_of("sd15"))
    ids, ours = conditioning(encoder)
    assert_parity(ours.prompt_embeds, open_clip_outputs(made, ids["clip_l"])["last"], TOLERANCE)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
def test_openais_archive_of_halves_and_floats(tmp_path):
    """ViT-L-14.pt is a TorchScript archive with matrices in float16 and norms in float32."""
    made = open_clip_model("CLIP", "clip_l")
    pytest.importorskip("open_clip").model.convert_weights_to_lp(made, torch.float16)
    made.register_buffer("input_resolution", torch.tensor(32))
    path = tmp_path / "0"
    torch.jit.save(torch.jit.script(made), str(path))
    info = clip_jax.info(path, config=configs_of("sd15"))
    assert info.provenance["format"] == "single file, TorchScript archive"
    assert set(info.towers["clip_l"].dtypes) == {"float16", "float32"}
    params = flatten(clip_jax.load(path, config=configs_of("sd15")).params["clip_l"])
    weight = made.transformer.resblocks[1].attn.in_proj_weight.detach()
    assert weight.dtype == torch.float16
    kernel = params["text_model/encoder/layers/1/self_attn/v_proj/kernel"]
    np.testing.assert_array_equal(kernel, weight[32:].T.float().numpy())


# --- 8-bit floats


@pytest.mark.parametrize("write", [write_safetensors, write_bin, write_legacy], ids=lambda write: write.__name__)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_8_bit_floats_of_torch(scaled, dtype, write, tmp_path):
    state, values, scale = {}, {}, torch.tensor(0.0123)
    for name, tensor in tensors(model("t5")).items():
        quantised = (tensor / scale if scaled else tensor).to(dtype)
        state[name], values[name] = quantised, quantised.float()
        if scaled and is_linear(name):
            state[name.replace(".weight", ".scale_weight")] = scale.clone()
            values[name] = quantised.float() * scale
    sources = [write(tmp_path / "0", state), write_safetensors(tmp_path / "1", tensors(model("clip_l")))]
    write_safetensors(tmp_path / "2", values)
    stand_in_t5_tokenizer().save(tmp_path)

    found = clip_jax.load(sources, config=configs_of("flux")).params["t5"]
    expected = clip_jax.load([tmp_path / "2", sources[1]], config=configs_of("flux")).params["t5"]

    for path, array in flatten(expected).items():
        np.testing.assert_array_equal(flatten(found)[path], array, err_msg=path)


# --- GGUF


def test_the_names_of_llama_cpp_are_those_that_its_own_package_gives(tmp_path):
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, CONFIGS["t5"].num_layers)
    state = model("t5")
    theirs = {names.get_name(name, try_suffixes=(".weight",)): name for name in state}
    ours = llama_cpp(state)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is state[theirs[name]] for name in ours)
