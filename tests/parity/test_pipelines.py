"""The whole way, folder to embeddings, against the `encode_prompt` of diffusers' own pipelines."""

import ast
import dataclasses
import functools
import inspect
import textwrap
from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import clip_jax
from clip_jax.tokenizers import ClipTokenizer
from tests.parity.pipelines import EOS, REFERENCES, build, reference

TOLERANCE = 2e-5

CAT, DOG, OWL = "a cat sitting on a windowsill", "two dogs! in the snow", "an owl, 35mm photograph"
BAD, WORSE, WORST = "blurry!! 100%", "low quality", "drawn by hand"
ON, OFF = {"guidance": True}, {"guidance": False}

# Arguments of both sides. Guidance is left to the family where no negative prompt is given. A family has the
# cases whose arguments its pipeline takes. Batches are of one or three, for each size is another compilation.
CASES = {
    "one prompt": {"prompt": CAT},
    "any characters": {"prompt": "Ünïcode 猫咪 🐈 don't <|endoftext|> </s> ½ stop"},
    "a batch": {"prompt": [CAT, DOG, ""]},
    "a list of one": {"prompt": [CAT]},
    "guidance on": {"prompt": CAT, **ON},
    "guidance on, a batch": {"prompt": [CAT, DOG, OWL], **ON},
    "guidance off": {"prompt": CAT, **OFF},
    "guidance off, a batch": {"prompt": [CAT, DOG, OWL], **OFF},
    "guidance off, a negative": {"prompt": CAT, "negative_prompt": BAD, **OFF},
    "an empty negative": {"prompt": CAT, "negative_prompt": "", **ON},
    "a negative": {"prompt": CAT, "negative_prompt": BAD, **ON},
    "no prompt but a negative": {"prompt": "", "negative_prompt": BAD, **ON},
    "one negative for a batch": {"prompt": [CAT, DOG, OWL], "negative_prompt": BAD, **ON},
    "an empty negative for a batch": {"prompt": [CAT, DOG, OWL], "negative_prompt": "", **ON},
    "negatives of a batch": {"prompt": [CAT, DOG, OWL], "negative_prompt": [BAD, "", WORSE], **ON},
    "prompt_2": {"prompt": CAT, "prompt_2": DOG},
    "prompt_2 empty": {"prompt": CAT, "prompt_2": ""},
    "prompt_2 of a batch": {"prompt": [CAT, DOG, OWL], "prompt_2": ["", OWL, CAT]},
    "prompt_2, guidance on": {"prompt": CAT, "prompt_2": DOG, **ON},
    "prompt_2, guidance off": {"prompt": CAT, "prompt_2": DOG, **OFF},
    "prompt_2, a negative": {"prompt": CAT, "prompt_2": DOG, "negative_prompt": BAD, **ON},
    "negative_prompt_2": {"prompt": CAT, "negative_prompt": BAD, "negative_prompt_2": WORSE, **ON},
    "negative_prompt_2 empty": {"prompt": CAT, "negative_prompt": BAD, "negative_prompt_2": "", **ON},
    "negative_prompt_2 alone": {"prompt": CAT, "negative_prompt_2": BAD, **ON},
    "negative_prompt_2, an empty negative": {
        "prompt": CAT,
        "negative_prompt": "",
        "negative_prompt_2": BAD,
        **ON,
    },
    "one negative_prompt_2 for a batch": {
        "prompt": [CAT, DOG, OWL],
        "negative_prompt": [BAD, WORST, ""],
        "negative_prompt_2": WORSE,
        **ON,
    },
    "negative_prompt_2 of a batch": {
        "prompt": [CAT, DOG, OWL],
        "negative_prompt": BAD,
        "negative_prompt_2": [WORSE, "", WORST],
        **ON,
    },
    "prompt_3": {"prompt": CAT, "prompt_3": DOG},
    "prompt_3 empty": {"prompt": CAT, "prompt_2": DOG, "prompt_3": ""},
    "prompt_2 and prompt_3": {"prompt": CAT, "prompt_2": DOG, "prompt_3": OWL},
    "prompt_2 and prompt_3 of a batch": {
        "prompt": [CAT, DOG, OWL],
        "prompt_2": [DOG, OWL, CAT],
        "prompt_3": [OWL, "", DOG],
    },
    "negative_prompt_3": {"prompt": CAT, "negative_prompt": BAD, "negative_prompt_3": WORSE, **ON},
    "negative_prompt_3 alone": {"prompt": CAT, "negative_prompt_3": BAD, **ON},
    "negative_prompt_2 and _3": {
        "prompt": [CAT, DOG, OWL],
        "prompt_2": [DOG, OWL, CAT],
        "prompt_3": [OWL, CAT, DOG],
        "negative_prompt": [BAD, WORSE, WORST],
        "negative_prompt_2": WORST,
        "negative_prompt_3": [WORSE, "", BAD],
        **ON,
    },
    **{f"clip_skip {skip}": {"prompt": CAT, "negative_prompt": BAD, "clip_skip": skip, **ON} for skip in (0, 1, 2)},
    "clip_skip, no negative": {"prompt": CAT, "clip_skip": 1},
    "clip_skip, guidance off": {"prompt": CAT, "clip_skip": 2, **OFF},
    **{f"max_sequence_length {length}": {"prompt": CAT, "max_sequence_length": length} for length in (77, 256, 512)},
    "max_sequence_length, a negative": {
        "prompt": CAT,
        "negative_prompt": BAD,
        "max_sequence_length": 77,
        **ON,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each family, made when first asked for: a small random pipeline, and the folder it is saved in."""

    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp(name)
        return build(name, folder), folder / "saved"

    return made


@pytest.fixture(scope="module")
def pairs(folders):
    """The pipeline, and our encoder of its folder."""

    @functools.cache
    def pair(name):
        pipeline, folder = folders(name)
        return pipeline, clip_jax.load(folder, family=name)

    return pair


@pytest.fixture(params=REFERENCES)
def name(request):
    return request.param


def compare(ours, theirs, assert_parity, record=None):
    """Every field that the pipeline has, and no other."""
    fields = [field.name for field in dataclasses.fields(ours) if field.name != "guidance"]
    assert theirs.keys() <= set(fields)
    for field in fields:
        if field in theirs:
            assert_parity(getattr(ours, field), theirs[field], TOLERANCE, record)
        else:
            assert getattr(ours, field) is None


def recorded(name):
    return f"{name}, encode_prompt of diffusers"


def test_every_family_has_a_reference():
    assert REFERENCES.keys() == clip_jax.FAMILIES.keys()


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in REFERENCES for case, given in CASES.items() if REFERENCES[name].takes(given)],
)
def test_embeddings(pairs, name, case, assert_parity):
    pipeline, encoder = pairs(name)
    theirs = reference(pipeline, name, **CASES[case])
    compare(encoder(**CASES[case]), theirs, assert_parity, recorded(name))


def test_truncation(pairs, name, assert_parity):
    """With T5 the prompts are too long for both: 77, and `max_sequence_length`, 77 too."""
    pipeline, encoder = pairs(name)
    arguments = {
        "prompt": "a photograph of an astronaut riding a horse! " * 12,
        "negative_prompt": "blurry, low quality, " * 30,
        **ON,
    }
    if encoder.family.max_sequence_length is not None:
        arguments["max_sequence_length"] = 77
    with pytest.warns(UserWarning, match="This text was dropped"):
        ours = encoder(**arguments, overflow="truncate")
    compare(ours, reference(pipeline, name, **arguments), assert_parity, recorded(name))


@pytest.mark.parametrize("name", [name for name in REFERENCES if name not in ("sd15", "sd21")])
def test_the_family_is_found_out(folders, name):
    """From the class name, that is: SD 1.x and 2.x share one, and their sizes are not in these folders."""
    _, folder = folders(name)
    assert clip_jax.load(folder).family.name == name


@pytest.mark.parametrize("name", ["sdxl", "sdxl_refiner"])
@pytest.mark.parametrize("zeros", [True, False])
def test_force_zeros_for_empty_prompt(name, zeros, tmp_path, assert_parity):
    """The folder says whether no negative prompt means zeros: the base model has it so, the refiner not."""
    pipeline = build(name, tmp_path, zeros=zeros)
    encoder = clip_jax.load(tmp_path / "saved", family=name)
    for negative in (None, "", BAD):
        arguments = {"prompt": [CAT, DOG, OWL], "negative_prompt": negative, **ON}
        theirs = reference(pipeline, name, **arguments)
        for array in theirs.values():
            assert (array[:3] == 0).all() == (zeros and negative is None)
        compare(encoder(**arguments), theirs, assert_parity, recorded(name))


@pytest.fixture(scope="module")
def without_t5(folders, tmp_path_factory):
    """The pipeline without T5, and the encoders of its folder and of one with a T5 that is not loaded."""
    folder = tmp_path_factory.mktemp("without_t5")
    pipeline = build("sd3", folder, t5=False)
    return pipeline, {
        "not in the folder": clip_jax.load(folder / "saved"),
        "not loaded": clip_jax.load(folders("sd3")[1], without=("t5",)),
    }


@pytest.mark.parametrize(
    "case",
    [
        *("one prompt", "a batch", "guidance off", "negatives of a batch", "negative_prompt_2"),
        *("clip_skip 1", "max_sequence_length 77"),
    ],
)
@pytest.mark.parametrize("where", ["not in the folder", "not loaded"])
def test_sd3_without_t5(without_t5, case, where, assert_parity):
    pipeline, encoders = without_t5
    theirs = reference(pipeline, "sd3", **CASES[case])
    assert theirs["prompt_embeds"].shape[-1] == 4096
    compare(encoders[where](**CASES[case]), theirs, assert_parity, recorded("sd3"))


# Negative controls: each of these faults must be seen by the very comparison that passes without it.


def assert_disagree(ours, theirs, assert_parity):
    with pytest.raises(AssertionError, match=r"max abs error|^assert \(\d"):
        compare(ours, theirs, assert_parity)


def faulty(encoder, tokenizers=None, **changes):
    """The same encoder around a family that is not quite right, or with other tokenizers."""
    family = dataclasses.replace(encoder.family, **changes)
    return clip_jax.TextEncoder(family, encoder.params, {**encoder.tokenizers, **(tokenizers or {})})


GIVEN = {"prompt": "a cat!", "negative_prompt": "bad!", **ON}
CLIP_TOWERS = [
    (family.name, tower.name)
    for family in clip_jax.FAMILIES.values()
    for tower in family.towers
    if isinstance(tower.config, clip_jax.ClipTextConfig)
]


def test_without_a_fault_the_comparison_passes(pairs, name, assert_parity):
    pipeline, encoder = pairs(name)
    compare(faulty(encoder)(**GIVEN), reference(pipeline, name, **GIVEN), assert_parity)


def test_control_rows_the_other_way_round(pairs, name, assert_parity):
    pipeline, encoder = pairs(name)
    theirs = reference(pipeline, name, **GIVEN)
    ours = encoder(**GIVEN)
    assert_disagree(dataclasses.replace(ours, prompt_embeds=jnp.flip(ours.prompt_embeds, 0)), theirs, assert_parity)
    if ours.pooled_prompt_embeds is not None:
        flipped = jnp.flip(ours.pooled_prompt_embeds, 0)
        assert_disagree(dataclasses.replace(ours, pooled_prompt_embeds=flipped), theirs, assert_parity)


@pytest.mark.parametrize(("name", "tower"), CLIP_TOWERS)
def test_control_the_other_pad_token(pairs, name, tower, assert_parity):
    pipeline, encoder = pairs(name)
    other = "!" if encoder.tokenizers[tower].pad_token == EOS else EOS
    wrong = faulty(encoder, {tower: ClipTokenizer.packaged(other)})
    assert_disagree(wrong(**GIVEN), reference(pipeline, name, **GIVEN), assert_parity)


def with_tower(encoder, name, change):
    towers = [change(tower) if tower.name == name else tower for tower in encoder.family.towers]
    return faulty(encoder, towers=tuple(towers))


@pytest.mark.parametrize(("name", "tower"), [pair for pair in CLIP_TOWERS if pair[0] != "flux"])
def test_control_another_layer(pairs, name, tower, assert_parity):
    """The last for the penultimate, and the other way round."""
    pipeline, encoder = pairs(name)
    wrong = with_tower(encoder, tower, lambda found: dataclasses.replace(found, layer=-3 - found.layer))
    assert_disagree(wrong(**GIVEN), reference(pipeline, name, **GIVEN), assert_parity)


@pytest.mark.parametrize(("name", "tower"), [pair for pair in CLIP_TOWERS if pair[0] in ("sd21", "sdxl")])
def test_control_final_norm(pairs, name, tower, assert_parity):
    """Applied where it should not be, and not where it should."""
    pipeline, encoder = pairs(name)
    wrong = with_tower(encoder, tower, lambda found: dataclasses.replace(found, final_norm=not found.final_norm))
    assert_disagree(wrong(**GIVEN), reference(pipeline, name, **GIVEN), assert_parity)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_control_l_and_g_the_other_way_round(pairs, name, assert_parity):
    pipeline, encoder = pairs(name)

    def join(outputs, length):
        exchanged = {**outputs, "clip_l": outputs["clip_g"], "clip_g": outputs["clip_l"]}
        return encoder.family.join(exchanged, length)[0], encoder.family.join(outputs, length)[1]

    assert_disagree(faulty(encoder, join=join)(**GIVEN), reference(pipeline, name, **GIVEN), assert_parity)


WRONG_POOLED = {
    "sdxl": lambda outputs: outputs["clip_l"].pooled,
    "sdxl_refiner": lambda outputs: outputs["clip_g"].pooled,
    "sd3": lambda outputs: jnp.concatenate([outputs["clip_g"].projected, outputs["clip_l"].projected], -1),
    "flux": lambda outputs: outputs["clip_l"].embeds[..., 0, :],
}


@pytest.mark.parametrize("name", WRONG_POOLED)
def test_control_pooled_of_another_row_or_tower(pairs, name, assert_parity):
    pipeline, encoder = pairs(name)

    def join(outputs, length):
        return encoder.family.join(outputs, length)[0], WRONG_POOLED[name](outputs)

    assert_disagree(faulty(encoder, join=join)(**GIVEN), reference(pipeline, name, **GIVEN), assert_parity)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_control_prompts_exchanged(pairs, name, assert_parity):
    pipeline, encoder = pairs(name)
    theirs = reference(pipeline, name, prompt=CAT, prompt_2=DOG)
    assert_disagree(encoder(DOG, prompt_2=CAT), theirs, assert_parity)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_control_negative_prompts_exchanged(pairs, name, assert_parity):
    pipeline, encoder = pairs(name)
    theirs = reference(pipeline, name, prompt=CAT, negative_prompt=BAD, negative_prompt_2=WORSE, **ON)
    assert_disagree(encoder(CAT, WORSE, negative_prompt_2=BAD, **ON), theirs, assert_parity)


def test_time_ids_of_the_refiner():
    """What `StableDiffusionXLImg2ImgPipeline.__call__` makes of its defaults, for two prompts with guidance."""
    size, crop = (1024, 768), (0, 16)
    unet = SimpleNamespace(
        config=SimpleNamespace(addition_time_embed_dim=256),
        add_embedding=SimpleNamespace(linear_1=SimpleNamespace(in_features=2560)),
    )
    refiner = SimpleNamespace(config=SimpleNamespace(requires_aesthetics_score=True), unet=unet)
    positive, negative = diffusers.StableDiffusionXLImg2ImgPipeline._get_add_time_ids(
        refiner, size, crop, size, 6.0, 2.5, size, crop, size, torch.float32, text_encoder_projection_dim=1280
    )
    theirs = torch.cat([negative.repeat(2, 1), positive.repeat(2, 1)])
    np.testing.assert_array_equal(clip_jax.refiner_time_ids(size, crop, rows=4), theirs)


@pytest.mark.parametrize("name", ["sdxl", "sdxl_refiner", "sd3"])
def test_control_zeros_for_no_negative(pairs, name, assert_parity):
    pipeline, encoder = pairs(name)
    wrong = faulty(encoder, zero_negative=not encoder.family.zero_negative)
    assert_disagree(wrong(CAT, **ON), reference(pipeline, name, prompt=CAT, **ON), assert_parity)


@pytest.mark.parametrize("name", [name for name in REFERENCES if REFERENCES[name].takes({"clip_skip": 1})])
def test_control_clip_skip_of_the_negative_too(pairs, name, assert_parity):
    pipeline, encoder = pairs(name)
    theirs = reference(pipeline, name, **GIVEN, clip_skip=1)
    assert_disagree(encoder(**GIVEN, clip_skip=1, clip_skip_negative=1), theirs, assert_parity)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_control_one_token_more(pairs, name, assert_parity):
    """T5 attends to its pads: another length changes the rows that both lengths have."""
    pipeline, encoder = pairs(name)
    theirs = reference(pipeline, name, prompt=CAT, max_sequence_length=64)
    longer = encoder(CAT, max_sequence_length=65)
    ours = dataclasses.replace(
        longer,
        prompt_embeds=longer.prompt_embeds[:, :-1],
        text_ids=None if longer.text_ids is None else longer.text_ids[:-1],
    )
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, encoder(CAT, max_sequence_length=64))
    with pytest.raises(AssertionError, match="max abs error"):
        compare(ours, theirs, assert_parity)


def encode_prompt(name):
    """What `encode_prompt` of a pipeline does; one name of an argument is told apart in some."""
    source = textwrap.dedent(inspect.getsource(getattr(diffusers, name).encode_prompt))
    (function,) = ast.parse(source.replace("num_videos_per_prompt", "num_images_per_prompt")).body
    _, *statements = function.body  # without the docstring
    return [ast.dump(statement) for statement in statements]


@pytest.mark.parametrize(
    ("name", "reference"),
    {
        "sd15": "StableDiffusionPipeline",
        "sd21": "StableDiffusionPipeline",
        "sdxl": "StableDiffusionXLPipeline",
        "sdxl_refiner": "StableDiffusionXLImg2ImgPipeline",
        "sd3": "StableDiffusion3Pipeline",
        "flux": "FluxPipeline",
    }.items(),
)
def test_pipelines_of_a_family_encode_alike(name, reference):
    """What `model_index.json` may name, less the Flax classes, which diffusers no longer has."""
    pipelines = {pipeline for pipeline in clip_jax.FAMILIES[name].pipelines if not pipeline.startswith("Flax")}
    assert reference in pipelines
    assert {pipeline for pipeline in pipelines if encode_prompt(pipeline) != encode_prompt(reference)} == set()


def test_a_pipeline_that_encodes_otherwise_is_of_no_family():
    for name in ("StableDiffusionLatentUpscalePipeline", "StableDiffusionXLInstructPix2PixPipeline"):
        assert encode_prompt(name) not in (encode_prompt(f"StableDiffusion{n}Pipeline") for n in ("", "XL", "3"))
        assert not any(name in family.pipelines for family in clip_jax.FAMILIES.values())
