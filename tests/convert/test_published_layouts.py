"""Published files are recognised by what they hold, in their full size, and without reading their weights."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

import clip_jax
from clip_jax import CheckpointError, ClipTextConfig, T5EncoderConfig
from clip_jax.convert.detect import find_family_of
from clip_jax.convert.readers.safetensors import SafetensorsFile
from tests.convert.published import (
    CLIP_G,
    CLIP_L,
    FILES,
    OTHERS,
    T5XXL,
    G,
    H,
    Header,
    L,
    clip,
    flux,
    open_clip,
    scaled_t5,
    sd1,
    sd3,
    sdxl,
    stored,
    t5,
)

L_PARAMETERS, H_PARAMETERS, G_PARAMETERS = 123_060_480, 340_387_840, 694_659_840
T5_PARAMETERS = 4_762_310_656
MODEL, REFINER = "cond_stage_model.model.", "conditioner.embedders.0.model."


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the tensors that are read."""
    names: list[str] = []
    original = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda file, name: names.append(name) or original(file, name))
    return names


def write(folder: Path, *headers: Header) -> list[Path]:
    return [header.write(folder / f"{i}.weights") for i, header in enumerate(headers)]


@pytest.mark.parametrize("name", FILES)
def test_the_header_has_the_published_length_to_the_byte(name, tmp_path):
    header, nbytes = FILES[name]
    assert header.write(tmp_path / "file").stat().st_size == nbytes


def test_the_keys_and_parameters_are_those_of_the_models():
    def counted(shapes) -> tuple[int, int]:
        return len(shapes), stored(shapes, "F16").parameters

    assert counted(clip(*L)) == (196, L_PARAMETERS)
    assert counted(clip(*H)) == (372, H_PARAMETERS)
    assert counted(clip(1024, 24)) == (388, 352_984_064)
    assert counted(clip(*G)) == (516, 693_021_440)
    assert counted(clip(*G, projection=True)) == (517, G_PARAMETERS)
    assert counted(open_clip(*L)) == (148, L_PARAMETERS)
    assert counted(open_clip(1024, 24)) == (292, 352_984_064)
    assert counted(open_clip(*G)) == (388, 693_021_440)
    assert counted(t5()) == (219, T5_PARAMETERS)
    assert len(FILES["t5xxl_fp8_e4m3fn"][0].tensors) == 220


# Source -> its files, family, tower -> (blocks, parameters, dtypes) and what is ignored.
T5_QUANTISED = (24, T5_PARAMETERS, {"bfloat16"})
L_HALF, G_HALF = (12, L_PARAMETERS, {"float16"}), (32, G_PARAMETERS, {"float16"})
H_HALF, COUNTS = (23, H_PARAMETERS, {"float16"}), {"model.": 1, "first_stage_model.": 1, "model_ema.": 1}
SOURCES = {
    "clip_l": ([FILES["clip_l"][0]], "sd15", {"clip_l": L_HALF}, {}),
    "SD 1.5's text encoder": ([FILES["SD 1.5 text_encoder/model.fp16"][0]], "sd15", {"clip_l": L_HALF}, {}),
    "SD 2.1's text encoder": ([FILES["SD 2.1 text_encoder/model.fp16"][0]], "sd21", {"clip_h": H_HALF}, {}),
    "clip_g": ([FILES["clip_g"][0]], "sdxl_refiner", {"clip_g": G_HALF}, {}),
    "clip_l, t5xxl_fp16": (
        [FILES["t5xxl_fp16"][0], FILES["clip_l"][0]],
        "flux",
        {"clip_l": L_HALF, "t5": (24, T5_PARAMETERS, {"float16"})},
        {},
    ),
    "clip_l, t5xxl_fp8_e4m3fn": (
        [FILES["clip_l"][0], FILES["t5xxl_fp8_e4m3fn"][0]],
        "flux",
        {"clip_l": L_HALF, "t5": T5_QUANTISED},
        {},
    ),
    "clip_l, t5xxl_fp8_e4m3fn_scaled": (
        [FILES["clip_l"][0], scaled_t5()],
        "flux",
        {"clip_l": L_HALF, "t5": (24, T5_PARAMETERS, {"bfloat16", "float16"})},
        {},
    ),
    "clip_l, clip_g, t5xxl_fp16": (
        [FILES[name][0] for name in ("clip_g", "t5xxl_fp16", "clip_l")],
        "sd3",
        {"clip_l": L_HALF, "clip_g": G_HALF, "t5": (24, T5_PARAMETERS, {"float16"})},
        {},
    ),
    "SD 3.5's CLIP-L with a projection, clip_g, t5xxl_fp8_e4m3fn": (
        [FILES[name][0] for name in ("SD 3.5 text_encoder/model", "clip_g", "t5xxl_fp8_e4m3fn")],
        "sd3",
        {"clip_l": L_HALF, "clip_g": G_HALF, "t5": T5_QUANTISED},
        {},
    ),
    "SD 1": ([sd1("F32")], "sd15", {"clip_l": (12, L_PARAMETERS, {"float32"})}, COUNTS),
    "SD 1 without text_model.": ([sd1("F16", "")], "sd15", {"clip_l": L_HALF}, COUNTS),
    "SD 2": (
        [stored(open_clip(1024, 24, text_alone=False), "F16", prefix=MODEL) | OTHERS],
        "sd21",
        {"clip_h": H_HALF},
        {**COUNTS, "cond_stage_model.": 1},
    ),
    "SD 2 without the last block": (
        [stored(open_clip(*H), "F16", prefix=MODEL) | OTHERS],
        "sd21",
        {"clip_h": H_HALF},
        COUNTS,
    ),
    "SD 2, sgm": (
        [stored(open_clip(1024, 24, text_alone=False), "F16", prefix=REFINER) | OTHERS],
        "sd21",
        {"clip_h": H_HALF},
        {**COUNTS, "conditioner.": 1},
    ),
    "SDXL": ([sdxl()], "sdxl", {"clip_l": L_HALF, "clip_g": G_HALF}, {**COUNTS, "conditioner.": 1}),
    "SDXL refiner": (
        [stored(open_clip(*G, text_alone=False), "F16", prefix=REFINER) | OTHERS],
        "sdxl_refiner",
        {"clip_g": G_HALF},
        {**COUNTS, "conditioner.": 1},
    ),
    "SD 3 without T5": ([sd3(t5_dtype=None)], "sd3", {"clip_l": L_HALF, "clip_g": G_HALF}, {"model.": 1}),
    "SD 3 with T5 in float8": (
        [sd3(t5_dtype="F8_E4M3")],
        "sd3",
        {"clip_l": L_HALF, "clip_g": G_HALF, "t5": T5_QUANTISED},
        {"model.": 1},
    ),
    "FLUX": ([flux()], "flux", {"clip_l": L_HALF, "t5": T5_QUANTISED}, {"model.": 1, "text_encoders.": 2}),
    "OpenCLIP's bigG": (
        [stored({**open_clip(*G, text_alone=False), "visual.class_embedding": (1664,)}, "F32")],
        "sdxl_refiner",
        {"clip_g": (32, G_PARAMETERS, {"float32"})},
        {"visual.": 1, "logit_scale": 1},
    ),
    "OpenCLIP's H": (
        [stored(open_clip(1024, 24, text_alone=False), "F32")],
        "sd21",
        {"clip_h": (23, H_PARAMETERS, {"float32"})},
        {"logit_scale": 1},
    ),
    "OpenAI's L": (
        [stored({**open_clip(*L, text_alone=False), "visual.class_embedding": (1024,)}, "F16")],
        "sd15",
        {"clip_l": L_HALF},
        {"visual.": 1, "logit_scale": 1},
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_info_tells_family_towers_and_parameters(name, tmp_path, read):
    headers, family, expected, ignored = SOURCES[name]
    info = clip_jax.info(write(tmp_path, *headers))

    assert info.family.name == family
    found = {}
    for tower, about in info.towers.items():
        config = about.config
        blocks = config.num_layers if isinstance(config, T5EncoderConfig) else config.num_hidden_layers
        found[tower] = (blocks, about.parameters, set(about.dtypes))
    assert found == expected
    assert info.provenance.get("ignored", {}) == ignored
    # The projection is looked at, to tell a dummy from one that was trained.
    assert set(read) <= {key for header in headers for key in header.tensors if "text_projection" in key}


def test_the_architectures_are_those_of_the_pipelines(tmp_path):
    (towers,) = [clip_jax.info(write(tmp_path, sd3(t5_dtype="F16"))).towers]
    assert towers["clip_l"].config == ClipTextConfig.sd15()  # whose projection is the identity
    assert towers["clip_g"].config == ClipTextConfig.sdxl_clip_g()
    assert towers["t5"].config == T5EncoderConfig.xxl()
    sd2 = stored(open_clip(1024, 24, text_alone=False), "F16", prefix=MODEL)
    assert clip_jax.info(write(tmp_path, sd2)).towers["clip_h"].config == ClipTextConfig.sd21()


def test_info_names_every_prefix(tmp_path):
    towers = clip_jax.info(write(tmp_path, sd3(t5_dtype="F16"))).provenance["towers"]
    assert {name: tower["names"] for name, tower in towers.items()} == {
        "clip_l": f"transformers, below {CLIP_L!r}",
        "clip_g": f"transformers, below {CLIP_G!r}",
        "t5": f"transformers, below {T5XXL!r}",
    }


def test_what_sd_2_leaves_out_is_listed(tmp_path):
    header = stored(open_clip(1024, 24, text_alone=False), "F16", prefix=MODEL)
    ignored = clip_jax.info(write(tmp_path, header)).provenance["towers"]["clip_h"]["ignored"]
    counts = Counter(name.startswith(f"{MODEL}transformer.resblocks.23.") for name in ignored)
    assert counts == {True: 12, False: 1}
    assert f"{MODEL}text_projection" in ignored


def test_longclip_is_told_by_its_positions(tmp_path):
    shapes = {**clip(*L), "text_model.embeddings.position_embedding.weight": (248, 768)}
    config = clip_jax.info(write(tmp_path, stored(shapes, "F16"))).towers["clip_l"].config
    assert isinstance(config, ClipTextConfig)
    assert config.max_position_embeddings == 248


@pytest.mark.parametrize(
    ("quick", "width", "activation"),
    [(True, 1280, "quick_gelu"), (False, 1280, "gelu"), (True, 1024, "gelu")],
    ids=["quick gelu", "gelu", "of another model"],
)
def test_the_config_of_open_clip_tells_the_activation(tmp_path, quick, width, activation):
    """The folder of a model such as MetaCLIP's: the shapes of bigG, and OpenAI's activation."""
    stored(open_clip(*G, text_alone=False), "F16").write(tmp_path / "open_clip_model.safetensors")
    model = {"quick_gelu": quick, "text_cfg": {"width": width, "heads": 10, "layers": 32}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    config = clip_jax.info(tmp_path).towers["clip_g"].config
    assert isinstance(config, ClipTextConfig)
    assert (config.hidden_act, config.num_attention_heads) == (activation, 10 if width == 1280 else 20)


@pytest.mark.parametrize(
    "unusual",
    [
        {"no_causal_mask": True},
        {"embed_cls": True},
        {"final_ln_after_pool": True},
        {"pool_type": "last"},
        {"act_kwargs": {"approximate": "tanh"}},
        {"norm_kwargs": {"eps": 1e-6}},
    ],
)
def test_a_config_of_open_clip_that_asks_for_other_maths_is_refused(tmp_path, unusual):
    stored(open_clip(*G, text_alone=False), "F16").write(tmp_path / "open_clip_model.safetensors")
    model = {"text_cfg": {"width": 1280, "heads": 20, **unusual}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    ((name, value),) = unusual.items()
    with pytest.raises(
        CheckpointError, match=f"open_clip_config.json asks for {name}={re.escape(repr(value))}; expected"
    ):
        clip_jax.info(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"model_cfg": 1}', '{"model_cfg": {"text_cfg": null}}'])
def test_a_config_of_open_clip_that_says_nothing_changes_nothing(tmp_path, content):
    stored(open_clip(*G, text_alone=False), "F16").write(tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(content)
    assert clip_jax.info(tmp_path).towers["clip_g"].config == ClipTextConfig.sdxl_clip_g()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (clip(768, 11), r"clip_l has 11 blocks below '', expected 12\. If the model is really like that, say so with"),
        (clip(1024, 22), r"clip_h has 22 blocks below '', expected 23 or 24"),
        (open_clip(1280, 24, text_alone=False), "clip_g has 24 blocks below '', expected 32"),
        (clip(512, 8), r"a CLIP text model of width 512; expected one of 768 \(clip_l\)"),
        (clip(1280, 32), "clip_g has no text_projection"),
        (t5(), "holds t5 alone .*; expected the text encoders of a family"),
    ],
    ids=["11 blocks", "22 blocks of H", "24 blocks of bigG", "CLIP-B", "bigG without projection", "T5"],
)
def test_files_that_no_pipeline_has_are_refused(tmp_path, shapes, message):
    with pytest.raises(CheckpointError, match=message):
        clip_jax.info(write(tmp_path, stored(shapes, "F16")))


def test_a_config_says_that_there_are_fewer_blocks(tmp_path):
    config = {**ClipTextConfig.sd15().to_hf(), "num_hidden_layers": 11}
    info = clip_jax.info(write(tmp_path, stored(clip(768, 11), "F16")), config={"clip_l": config})
    assert info.towers["clip_l"].parameters == L_PARAMETERS - 7_087_872


@pytest.mark.parametrize("training", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize(("prefix", "family"), [("conditioner.embedders.0.", "sdxl"), ("text_encoders.clip_l.", "sd3")])
def test_a_prefix_tells_sd3_without_t5_from_sdxl(training, prefix, family):
    configs = {tower.name: tower.config for tower in clip_jax.FAMILIES["sdxl"].towers}
    assert find_family_of("a file", configs, [training + prefix], None).name == family
