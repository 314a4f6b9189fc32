"""Single-file checkpoints: what diffusers makes of their text encoders is what we do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils as diffusers_single_file

import clip_jax
from clip_jax import ClipTextConfig
from clip_jax.convert.layouts import find_encoders
from clip_jax.convert.source import open_source
from tests.checkpoints import hf_state
from tests.formats.model import CONFIGS, configs_of, model
from tests.formats.names import below, open_clip
from tests.parity.writing import CLIP_MODELS, TOLERANCE, Arrays, conditioning, tensors, write_safetensors

LAYERS_24 = dataclasses.replace(CONFIGS["clip_h"], num_hidden_layers=24)
"""The last block of SD 2 is known to diffusers by its number."""


def single_file(family: str) -> dict[str, np.ndarray]:
    low, bigg = model("clip_l"), open_clip(model("clip_g"))
    if family == "sd15":
        return below("cond_stage_model.transformer.", low)
    if family == "sd21":
        whole = open_clip(hf_state(dataclasses.replace(LAYERS_24, projection_dim=24)))
        return below("cond_stage_model.model.", {**whole, "logit_scale": np.ones((), np.float32)})
    if family == "sdxl":
        low = below("conditioner.embedders.0.transformer.", low)
        return {**low, **below("conditioner.embedders.1.model.", bigg)}
    if family == "sdxl_refiner":
        return below("conditioner.embedders.0.model.", bigg)
    low = below("text_encoders.clip_l.transformer.", low)
    return {**low, **below("text_encoders.clip_g.transformer.", model("clip_g"))}


CONVERTED = {
    # Family -> prefix of an encoder -> what diffusers makes of it
    ("sd15", "cond_stage_model.transformer."): diffusers_single_file.convert_ldm_clip_checkpoint,
    ("sdxl", "conditioner.embedders.0.transformer."): diffusers_single_file.convert_ldm_clip_checkpoint,
    **{
        (family, prefix): lambda state, prefix=prefix: diffusers_single_file.convert_open_clip_checkpoint(
            SimpleNamespace(config=SimpleNamespace()), state, prefix=prefix
        )
        for family, prefix in (
            ("sd21", "cond_stage_model.model."),
            ("sdxl", "conditioner.embedders.1.model."),
            ("sdxl_refiner", "conditioner.embedders.0.model."),
        )
    },
    **{
        ("sd3", prefix): lambda state, prefix=prefix: diffusers_single_file.convert_ldm_clip_checkpoint(state, prefix)
        for prefix in ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.")
    },
}


@pytest.mark.parametrize(("family", "prefix"), CONVERTED, ids=" ".join)
def test_the_view_of_a_single_file_is_what_diffusers_converts_it_to(family, prefix, tmp_path):
    state = tensors(single_file(family))
    theirs = CONVERTED[family, prefix](state)
    source = open_source(write_safetensors(tmp_path / "0", state))
    (encoder,) = (found for found in find_encoders(source.state, "here") if found.prefix == prefix)
    left_out = ("text_model.encoder.layers.23.", "text_projection.") if family == "sd21" else ()
    ours = {name: tensor for name, tensor in encoder.state.items() if not left_out or not name.startswith(left_out)}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name].read(), tensor.numpy(), err_msg=name)


def diffusers_model(state: Arrays, config: ClipTextConfig, folder: Path) -> transformers.PreTrainedModel:
    """What `from_single_file` makes of a text encoder."""
    cls = CLIP_MODELS[config.projection_dim is not None]
    transformers.CLIPTextConfig(**config.to_hf()).save_pretrained(folder)
    return diffusers_single_file.create_diffusers_clip_model_from_ldm(
        cls, state, config=str(folder), local_files_only=True
    )


def test_sd_2_from_a_single_file(tmp_path, assert_parity):
    state = tensors(single_file("sd21"))
    source = write_safetensors(tmp_path / "0", state)
    encoder = clip_jax.load(source, config={"clip_h": LAYERS_24})
    assert encoder.config["clip_h"].num_hidden_layers == 23
    ids, ours = conditioning(encoder)
    config = dataclasses.replace(LAYERS_24, num_hidden_layers=23)
    reference = diffusers_model(state, config, tmp_path / "config")
    with torch.no_grad():
        theirs = reference(ids["clip_h"]).last_hidden_state
    assert_parity(ours.prompt_embeds, theirs, TOLERANCE)


@pytest.mark.parametrize("projection", [False, True])
def test_clip_l_of_sd_3_is_not_projected(projection, tmp_path, assert_parity):
    """The identity stands in its place in diffusers, whether or not the file has a projection."""
    state = tensors(single_file("sd3"))
    if projection:
        state["text_encoders.clip_l.transformer.text_projection.weight"] = torch.full((16, 16), 0.5)
    encoder = clip_jax.load(write_safetensors(tmp_path / "0", state), config=configs_of("sd3"))
    ids, ours = conditioning(encoder)
    projected = {name: dataclasses.replace(c, projection_dim=c.hidden_size) for name, c in configs_of("sd3").items()}
    low, high = (diffusers_model(state, projected[name], tmp_path / name) for name in ("clip_l", "clip_g"))
    with torch.no_grad():
        outs = [low(ids["clip_l"], output_hidden_states=True), high(ids["clip_g"], output_hidden_states=True)]
    assert_parity(ours.pooled_prompt_embeds, torch.cat([out.text_embeds for out in outs], -1), TOLERANCE)
    embeds = torch.cat([out.hidden_states[-2] for out in outs], -1)
    assert_parity(np.asarray(ours.prompt_embeds)[:, :77, : embeds.shape[-1]], embeds, TOLERANCE)
