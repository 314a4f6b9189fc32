"""TextEncoder: batches, guidance, buckets, saving, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clip_jax
from clip_jax import ClipJaxError, PromptTooLongError, TextEncoder
from clip_jax.compat import FlaxCLIPTextModel
from clip_jax.convert import convert, export
from clip_jax.params.shapes import param_shapes
from tests.checkpoints import write_family

LONG = " ".join(["cat"] * 80)


def test_one_prompt_gives_a_guidance_pair(encoder):
    out = encoder("a cat", negative_prompt="blurry")
    assert out.prompt_embeds.shape == (2, 77, 32)
    assert out.prompt_embeds.dtype == jnp.float32
    np.testing.assert_allclose(out.cond.prompt_embeds, encoder("a cat", guidance=False).prompt_embeds, atol=1e-5)
    np.testing.assert_allclose(out.uncond.prompt_embeds, encoder("blurry", guidance=False).prompt_embeds, atol=1e-5)


def test_no_negative_prompt_is_the_empty_prompt(encoder):
    np.testing.assert_array_equal(encoder("a cat").prompt_embeds, encoder("a cat", "").prompt_embeds)


def test_empty_prompt_is_valid(encoder):
    tokens = encoder.tokenize("")
    assert tokens.cond["clip_l"].tolist() == [[49406, *[49407] * 76]]
    assert np.isfinite(encoder("").prompt_embeds).all()


def test_families_pad_with_their_own_token(tiny_sd21):
    tokens = clip_jax.load(tiny_sd21, family="sd21").tokenize("a cat!", guidance=False)
    assert tokens.cond["clip_h"].tolist() == [[49406, 320, 2368, 0, 49407, *[0] * 72]]


@pytest.mark.parametrize("size", [2, 3, 5, 33])
def test_batches_are_row_for_row_their_prompts(encoder, size):
    prompts = [f"picture number {i}" for i in range(size)]
    negatives = [f"mistake {i}" for i in range(size)]
    out = encoder(prompts, negative_prompt=negatives)
    assert out.prompt_embeds.shape == (2 * size, 77, 32)
    for i in (0, size - 1):
        pair = encoder(prompts[i], negative_prompt=negatives[i]).prompt_embeds
        np.testing.assert_allclose(out.prompt_embeds[i], pair[0], atol=1e-5)
        np.testing.assert_allclose(out.prompt_embeds[size + i], pair[1], atol=1e-5)


def test_a_str_negative_is_for_all_prompts(encoder):
    one = encoder(["a", "b"], negative_prompt="blurry")
    each = encoder(["a", "b"], negative_prompt=["blurry", "blurry"])
    np.testing.assert_array_equal(one.prompt_embeds, each.prompt_embeds)


def test_batch_sizes_share_programs(encoder):
    encoder(["x"] * 8)
    before = clip_jax.text_embeddings._cache_size()
    for size in (5, 6, 7):
        encoder(["x"] * size)
    assert clip_jax.text_embeddings._cache_size() == before


def test_prompts_and_negatives_are_tokenised_as_one_batch(encoder, monkeypatch):
    calls = []
    tokenizer = encoder.tokenizers["clip_l"]
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda p, **kw: calls.append(list(p)) or encode(p, **kw))
    encoder.tokenize(["a", "b"], negative_prompt="c")
    assert calls == [["c", "a", "b"]]


def test_dtype_is_that_of_the_computation_and_the_result(tiny_sd15, encoder):
    exact = np.asarray(encoder("a cat").prompt_embeds)
    low = clip_jax.load(tiny_sd15, family="sd15", dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(low.params)} == {"bfloat16"}
    out = low("a cat").prompt_embeds
    assert out.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(out, np.float32) - exact) < 0.02 * np.linalg.norm(exact)
    kept = clip_jax.load(tiny_sd15, family="sd15", dtype=jnp.bfloat16, param_dtype="float32")
    assert {x.dtype.name for x in jax.tree.leaves(kept.params)} == {"float32"}
    assert kept("a cat").prompt_embeds.dtype == jnp.bfloat16


def test_save_and_load_give_the_same_embeddings(encoder, tmp_path):
    encoder.save(tmp_path / "saved")
    loaded = clip_jax.load(tmp_path / "saved")
    assert loaded.config == encoder.config
    assert loaded.provenance["format"] == encoder.provenance["format"]
    np.testing.assert_array_equal(loaded("a cat!").prompt_embeds, encoder("a cat!").prompt_embeds)


def test_paths_may_be_relative(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder.save("saved")
    loaded = clip_jax.load("saved")
    np.testing.assert_array_equal(loaded("a cat!").prompt_embeds, encoder("a cat!").prompt_embeds)
    assert clip_jax.info("saved").towers.keys() == encoder.config.keys()
    export("saved", "exported")
    np.testing.assert_array_equal(
        clip_jax.load("exported", family="sd15")("a cat!").prompt_embeds, encoder("a cat!").prompt_embeds
    )


def test_config_is_per_tower(encoder):
    assert encoder.config["clip_l"].hidden_size == 32


@pytest.mark.parametrize(
    ("prompt", "negative", "name"),
    [(LONG, "", "prompt"), (["a", LONG], "", r"prompt\[1\]"), ("a", LONG, "negative_prompt")],
)
def test_a_prompt_that_does_not_fit_is_an_error_that_shows_the_rest(encoder, prompt, negative, name):
    with pytest.raises(PromptTooLongError, match=rf"{name}: 82 tokens, 5 too many.*cat cat cat cat cat"):
        encoder(prompt, negative_prompt=negative)


def test_truncate_warns_with_the_same_text_and_encodes_what_fits(encoder):
    with pytest.warns(UserWarning, match=r"prompt\b.* 82 .*cat cat cat cat cat"):
        cut = encoder(LONG, overflow="truncate")
    fits = encoder(" ".join(["cat"] * 75))
    np.testing.assert_array_equal(cut.prompt_embeds, fits.prompt_embeds)


def test_lists_of_different_lengths_are_refused(encoder):
    with pytest.raises(ClipJaxError, match="negative_prompt has 3 entries for 2 prompts"):
        encoder(["a", "b"], negative_prompt=["c", "d", "e"])
    with pytest.raises(ClipJaxError, match="negative_prompt has 0 entries for 1 prompts"):
        encoder("a", negative_prompt=[])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompt must be a str or a list of str, found NoneType"),
        (b"a cat", "prompt must be a str or a list of str, found bytes"),
        (7, "prompt must be a str or a list of str, found int"),
        (["a", None], r"prompt\[1\] must be a str, \w+ NoneType"),
        ([], "prompt is an empty list"),
    ],
)
def test_prompts_that_are_not_text_are_refused(encoder, prompt, message):
    with pytest.raises(ClipJaxError, match=message):
        encoder(prompt)


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
@pytest.mark.parametrize(
    ("negatives", "prompts", "message"),
    [
        ((2, 77), (3, 77), r"one shape .* found \(2, 77\) and \(3, 77\)"),
        ((2, 77), (5, 77), r"one shape .* found \(2, 77\) and \(5, 77\)"),
        ((2, 70), (2, 77), r"one shape .* found \(2, 70\) and \(2, 77\)"),
        ((77,), (77,), r"\[B, L\] of one shape .* found \(77,\) and \(77,\)"),
        ((0, 77), (0, 77), "no rows; expected at least one prompt"),
        ((1, 0), (1, 0), "no rows; expected at least one prompt, and ids of it"),
    ],
)
def test_ids_of_other_shapes_are_refused(encoder, cache_bytes, negatives, prompts, message):
    """Before they are padded to a bucket, which would make one shape of them."""
    mine = TextEncoder(encoder.family, encoder.params, encoder.tokenizers, cache_bytes=cache_bytes)
    sides = ({"clip_l": np.ones(shape, np.int32)} for shape in (negatives, prompts))
    with pytest.raises(ClipJaxError, match=message):
        mine.encode(clip_jax.Tokens(**dict(zip(("uncond", "cond"), sides, strict=True))))


def test_towers_of_other_batches_are_refused(tmp_path):
    mine = clip_jax.load(write_family(tmp_path / "sdxl", clip_jax.FAMILIES["sdxl"]), family="sdxl")
    ids = {name: np.ones((rows, 77), np.int32) for name, rows in (("clip_l", 3), ("clip_g", 2))}
    with pytest.raises(ClipJaxError, match=r"one batch of token ids in all towers, found the sizes \[2, 3\]"):
        mine.encode(clip_jax.Tokens(cond=ids))


@pytest.mark.parametrize("wrong", [-1, 49408])
def test_ids_without_a_row_in_the_embedding_are_refused(encoder, wrong):
    """JAX makes NaN of them."""
    tokens = encoder.tokenize("a cat", guidance=False)
    tokens.cond["clip_l"][0, 3] = wrong
    with pytest.raises(ClipJaxError, match=f"clip_l are from .*{wrong}.*; expected 0 to 49407. Use the tokenizer"):
        encoder.encode(tokens)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype("bfloat16")])
def test_another_dtype_may_be_set(encoder, dtype):
    mine = TextEncoder(encoder.family, encoder.params, encoder.tokenizers)
    mine("a cat")
    mine.dtype = dtype
    assert mine.dtype == jnp.bfloat16
    assert mine("a cat").prompt_embeds.dtype == jnp.bfloat16
    with pytest.raises(ClipJaxError, match="dtype must be one of"):
        mine.dtype = "int8"


def test_unknown_overflow_is_refused(encoder):
    with pytest.raises(ClipJaxError, match="overflow must be one of .*'error', 'truncate'.*'cut'"):
        encoder("a", overflow="cut")


def test_unknown_dtype_is_refused(tiny_sd15):
    with pytest.raises(ClipJaxError, match="dtype must be one of float32, bfloat16, float16, found 'int8'"):
        clip_jax.load(tiny_sd15, family="sd15", dtype="int8")


def test_float16_that_overflows_is_an_error(encoder):
    params = jax.tree.map(lambda x: x, encoder.params)
    params["clip_l"]["text_model"]["final_layer_norm"]["scale"] = jnp.full(32, 60000.0)
    half = TextEncoder(encoder.family, params, encoder.tokenizers, dtype="float16")
    with pytest.raises(ClipJaxError, match="overflow float16.*dtype='bfloat16'"):
        half("a cat")
    single = TextEncoder(encoder.family, params, encoder.tokenizers)
    assert np.isfinite(single("a cat").prompt_embeds).all()


@pytest.mark.parametrize("name", ["sd15", pytest.param("flux", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float16"},
        {"dtype": "bfloat16", "quantize": "int8"},
        *(pytest.param(options, marks=pytest.mark.slow) for options in ({}, {"param_dtype": "bfloat16"})),
    ],
)
def test_it_runs_where_jax_is_told_to_be_strict(tmp_path, name, options):
    folder = write_family(tmp_path / name, clip_jax.FAMILIES[name])
    encoder = clip_jax.load(folder, family=name, **options)
    strict = jax.numpy_dtype_promotion("strict")
    with jax.numpy_rank_promotion("raise"), strict, jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="[Dd]isallowed"):
            jax.jit(lambda x: x + 1)(np.ones(3, np.float32))
        if name == "sd15":  # FLUX has a program for every length of CLIP-L's ids
            encoder.warmup()
        encoder("a cat", negative_prompt="blurry", guidance=True)
        out = encoder(["two dogs", "a cat"], negative_prompt="blurry", guidance=True)
        _ = out.cond, out.uncond, clip_jax.time_ids((8, 8)), clip_jax.refiner_time_ids((8, 8))
        encoder.params = jax.tree.map(jax.device_get, encoder.params)
    assert np.isfinite(out.prompt_embeds).all()


@pytest.mark.parametrize("quantize", ["int4", *(pytest.param(name, marks=pytest.mark.slow) for name in (None, "int8"))])
def test_files_are_read_and_written_under_a_transfer_guard(tiny_sd15, tmp_path, quantize):
    param_shapes.cache_clear()
    with jax.transfer_guard("disallow"):
        encoder = clip_jax.load(tiny_sd15, family="sd15", quantize=quantize)
        encoder.save(tmp_path / "saved")
        convert(tiny_sd15, tmp_path / "converted", family="sd15", quantize=quantize, verify=quantize is None)
        for folder in ("saved", "converted"):
            again = clip_jax.load(tmp_path / folder)
            assert jax.tree.structure(again.params) == jax.tree.structure(encoder.params)
        FlaxCLIPTextModel.from_pretrained(tiny_sd15, subfolder="text_encoder")


def test_float16_within_a_jit(tiny_sd15):
    """Nothing is looked at there: there is nothing yet."""
    half = clip_jax.load(tiny_sd15, family="sd15", dtype="float16")
    tokens = half.tokenize("a cat")
    assert jax.jit(lambda: half.encode(tokens).prompt_embeds)().dtype == jnp.float16


@pytest.mark.parametrize("wrong", [-1, 49408])
def test_ids_of_negatives_without_a_row_in_the_embedding_are_refused(encoder, wrong):
    tokens = encoder.tokenize("a cat", negative_prompt="blurry")
    tokens.uncond["clip_l"][0, 3] = wrong
    with pytest.raises(ClipJaxError, match=f"clip_l are from .*{wrong}.*; expected 0 to 49407. Use the tokenizer"):
        encoder.encode(tokens)


@pytest.mark.slow
def test_a_pooled_row_that_overflows_float16_is_an_error(tmp_path):
    half = clip_jax.load(write_family(tmp_path, clip_jax.FAMILIES["sdxl"]), family="sdxl", dtype="float16")
    params = jax.tree.map(lambda x: x, half.params)
    for leaves, name, value in (
        (params["clip_g"]["text_model"]["final_layer_norm"], "bias", 6e4),  # of which SDXL's embeddings know nothing
        (params["clip_g"]["text_projection"], "kernel", 1),
    ):
        leaves[name] = jnp.full_like(leaves[name], value)
    half.params = params
    with pytest.raises(ClipJaxError, match="overflow float16"):
        half("a cat", guidance=False)


@pytest.mark.parametrize(("dtype", "wrong"), [(np.int8, -1), (np.int16, 49406 - 2**16)])
def test_negative_ids_of_few_bits_are_refused(encoder, dtype, wrong):
    """The latter is what CLIP's first id becomes in an int16; as unsigned numbers both are below 49408."""
    with pytest.raises(ClipJaxError, match=f"clip_l are from {wrong} to {wrong}; expected 0 to 49407"):
        encoder.encode(clip_jax.Tokens(cond={"clip_l": np.full((1, 4), wrong, dtype)}))
