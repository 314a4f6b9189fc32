"""Every family, small: shapes, which prompt reaches which tower, what runs and what does not."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clip_jax
from clip_jax import FAMILIES, CheckpointError, ClipJaxError, ConfigError, PromptTooLongError, Tokens, text_embeddings
from clip_jax.buckets import of_every_length, without_tails
from clip_jax.tokenizers import ClipTokenizer
from tests.checkpoints import TINY, TINY_G, TINY_T5, hf_state, t5_state, write_family, write_text_encoder

L, G, T5 = TINY.hidden_size, TINY_G.hidden_size, TINY_T5.d_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_family(tmp_path_factory.mktemp(name), family) for name, family in FAMILIES.items()}


@pytest.fixture(scope="module")
def encoders(folders):
    # Without a cache: what it holds was computed in other batches, and so in other last bits.
    return {name: clip_jax.load(folder, family=name, cache_bytes=0) for name, folder in folders.items()}


# SD 3 has the towers of SDXL and FLUX, the refiner one of SDXL's.
EVERY_FAMILY = [
    pytest.param(name, marks=pytest.mark.slow if name in ("sd3", "sdxl_refiner") else ()) for name in FAMILIES
]

SHAPES = {
    "sd15": ((2, 77, L), None),
    "sd21": ((2, 77, G), None),
    "sdxl": ((2, 77, L + G), (2, 40)),
    "sdxl_refiner": ((2, 77, G), (2, 40)),
    "sd3": ((2, 77 + 256, T5), (2, 24 + 40)),
    "flux": ((1, 512, T5), (1, L)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes(encoders, name):
    out = encoders[name]("a cat")
    embeds, pooled = SHAPES[name]
    assert out.prompt_embeds.shape == embeds
    assert pooled is None if out.pooled_prompt_embeds is None else out.pooled_prompt_embeds.shape == pooled
    assert out.guidance == (name != "flux")
    assert (out.text_ids is not None) == (name == "flux")


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_batches_are_row_for_row_their_prompts(encoders, name):
    encoder = encoders[name]
    out = encoder(["one", "two words", "three"], ["bad", "worse", "worst"], guidance=True)
    pair = encoder("two words", "worse", guidance=True)
    for one, batch in ((pair.uncond, out.uncond), (pair.cond, out.cond)):
        np.testing.assert_allclose(batch.prompt_embeds[1], one.prompt_embeds[0], atol=2e-5)
        if one.pooled_prompt_embeds is not None:
            np.testing.assert_allclose(batch.pooled_prompt_embeds[1], one.pooled_prompt_embeds[0], atol=2e-5)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_a_call_is_one_program(encoders, name):
    encoder = encoders[name]
    tokens = encoder.tokenize("a cat", "bad")
    text = text_embeddings.lower(encoder.params, tokens, family=encoder.family).compile().as_text()
    assert text.count("ENTRY") == 1


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_convert_save_and_load_give_the_same(folders, encoders, name, tmp_path):
    from clip_jax.convert import convert

    convert(folders[name], tmp_path / "converted", family=name)
    clip_jax.load(tmp_path / "converted").save(tmp_path / "saved")
    loaded = clip_jax.load(tmp_path / "saved")
    assert loaded.family == encoders[name].family
    jax.tree.map(np.testing.assert_array_equal, loaded("a cat!"), encoders[name]("a cat!"))


@pytest.mark.parametrize("name", ["sdxl", "sdxl_refiner", "sd3", "flux"])
def test_the_family_is_found_by_its_pipeline_and_towers(folders, name):
    assert clip_jax.load_tokenizers(folders[name]).keys() == {tower.name for tower in FAMILIES[name].towers}
    assert clip_jax.info(folders[name]).family.name == name


def changed(one, other):
    """Which parts of the last row differ: blocks of the embeddings, and pooled."""
    columns = np.abs(np.asarray(one.prompt_embeds[-1] - other.prompt_embeds[-1])).max(0) > 1e-4
    rows = np.abs(np.asarray(one.prompt_embeds[-1] - other.prompt_embeds[-1])).max(1) > 1e-4
    pooled = np.abs(np.asarray(one.pooled_prompt_embeds[-1] - other.pooled_prompt_embeds[-1])) > 1e-4
    return columns, rows, pooled


def test_sdxl_prompt_2_is_for_bigg(encoders):
    columns, _, pooled = changed(encoders["sdxl"]("a cat"), encoders["sdxl"]("a cat", prompt_2="a dog"))
    assert not columns[:L].any()
    assert columns[L:].all()
    assert pooled.any()


def test_sd3_prompts_are_for_their_towers(encoders):
    plain = encoders["sd3"]("a cat")
    columns, rows, pooled = changed(plain, encoders["sd3"]("a cat", prompt_2="a dog"))
    assert (columns[:L].any(), columns[L : L + G].all(), columns[L + G :].any()) == (False, True, False)
    assert (rows[:77].any(), rows[77:].any()) == (True, False)
    assert (pooled[:24].any(), pooled[24:].any()) == (False, True)
    columns, rows, pooled = changed(plain, encoders["sd3"]("a cat", prompt_3="a dog"))
    assert (rows[:77].any(), rows[77:].all(), pooled.any()) == (False, True, False)


def test_flux_prompt_2_is_for_t5(encoders):
    _, rows, pooled = changed(encoders["flux"]("a cat"), encoders["flux"]("a cat", prompt_2="a dog"))
    assert rows.all()
    assert not pooled.any()


def test_an_empty_prompt_2_is_the_prompt(encoders):
    for name in ("sdxl", "sd3", "flux"):
        same = encoders[name]("a cat", prompt_2="", negative_prompt="bad", negative_prompt_2="")
        plain = encoders[name]("a cat", negative_prompt="bad")
        np.testing.assert_array_equal(same.prompt_embeds, plain.prompt_embeds)


def test_sdxl_without_a_negative_has_zeros_and_runs_the_prompt_alone(encoders):
    encoder = encoders["sdxl"]
    out = encoder("a cat")
    assert not out.uncond.prompt_embeds.any()
    assert not out.uncond.pooled_prompt_embeds.any()
    assert encoder("a cat", negative_prompt="").uncond.prompt_embeds.any()
    assert not encoder("a cat", negative_prompt_2="bad").uncond.prompt_embeds.any()  # as diffusers does
    tokens = encoder.tokenize("a cat")
    assert (tokens.uncond, tokens.zero_uncond) == (None, True)
    assert flops(encoder, tokens) < 0.6 * flops(encoder, encoder.tokenize("a cat", ""))


def test_the_refiner_encodes_the_empty_negative(encoders):
    assert encoders["sdxl_refiner"]("a cat").uncond.prompt_embeds.any()


@pytest.mark.slow
def test_force_zeros_of_the_pipeline_decides(folders, tmp_path):
    folder = write_family(tmp_path, FAMILIES["sdxl"])
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    encoder = clip_jax.load(folder)
    assert encoder("a cat").uncond.prompt_embeds.any()
    encoder.save(tmp_path / "saved")
    assert clip_jax.load(tmp_path / "saved").family.zero_negative is False


def test_sd3_pads_clip_with_zeros_and_works_without_t5(folders, encoders, tmp_path):
    whole = encoders["sd3"]("a cat", max_sequence_length=77)
    assert whole.prompt_embeds.shape == (2, 154, T5)
    assert not whole.prompt_embeds[:, :77, L + G :].any()
    for encoder in (
        clip_jax.load(folders["sd3"], without=("t5",)),
        clip_jax.load(write_family(tmp_path / "none", FAMILIES["sd3"], leave_out=["t5"])),
    ):
        assert encoder.params.keys() == {"clip_l", "clip_g"}
        out = encoder("a cat", max_sequence_length=100)
        assert out.prompt_embeds.shape == (2, 177, 4096)
        np.testing.assert_allclose(out.prompt_embeds[:, :77, : L + G], whole.prompt_embeds[:, :77, : L + G], atol=1e-5)
        assert not out.prompt_embeds[:, 77:].any()
        np.testing.assert_allclose(out.pooled_prompt_embeds, whole.pooled_prompt_embeds, atol=1e-5)
        encoder.save(tmp_path / "saved", overwrite=True)
        assert clip_jax.load(tmp_path / "saved").params.keys() == {"clip_l", "clip_g"}


def test_flux_has_text_ids_and_no_guidance_unless_asked(encoders):
    encoder = encoders["flux"]
    out = encoder("a cat", max_sequence_length=256)
    assert out.prompt_embeds.shape == (1, 256, T5)
    assert out.text_ids.shape == (256, 3)
    assert not out.text_ids.any()
    guided = encoder("a cat", negative_prompt="bad", guidance=True, max_sequence_length=256)
    assert guided.prompt_embeds.shape == (2, 256, T5)
    np.testing.assert_allclose(guided.cond.prompt_embeds, out.prompt_embeds, atol=1e-5)
    assert guided.uncond.text_ids.shape == (256, 3)
    assert encoder(["a", "b", "c"]).text_ids.shape == (512, 3)


def flops(encoder, tokens, **kwargs):
    lowered = text_embeddings.lower(encoder.params, tokens, family=encoder.family, **kwargs)
    return lowered.compile().cost_analysis()["flops"]


@pytest.mark.parametrize(("prompt", "length"), [("a cat", 8), ("a cat sitting on a windowsill in warm light", 16)])
def test_flux_runs_clip_only_to_the_end_of_the_text(encoders, prompt, length):
    encoder = encoders["flux"]
    tokens = encoder.tokenize(prompt, max_sequence_length=16 * 16)
    whole = text_embeddings(encoder.params, tokens, family=encoder.family)
    np.testing.assert_allclose(encoder.encode(tokens).pooled_prompt_embeds, whole.pooled_prompt_embeds, atol=1e-5)
    cut = without_tails(tokens, encoder.family)
    assert cut.cond["clip_l"].shape[1] == length
    clip_alone = dataclasses.replace(
        encoder.family, towers=encoder.family.towers[:1], join=lambda out, _: (out["clip_l"].pooled[..., None, :], None)
    )

    def clip_flops(tokens):
        only = Tokens(cond={"clip_l": tokens.cond["clip_l"]})
        params = {"clip_l": encoder.params["clip_l"]}
        return text_embeddings.lower(params, only, family=clip_alone).compile().cost_analysis()["flops"]

    assert clip_flops(cut) < 0.35 * clip_flops(tokens)


def test_the_last_block_runs_for_the_pooled_row_alone(encoders):
    """BigG of the refiner: all rows of 3 blocks and one row of the fourth, instead of all rows of 4."""
    encoder = encoders["sdxl_refiner"]
    tokens = encoder.tokenize("a cat", guidance=False)
    every_row = dataclasses.replace(encoder.family.towers[0], layer=-1)
    spent = flops(encoder, tokens)
    all_of_it = flops(
        clip_jax.TextEncoder(dataclasses.replace(encoder.family, towers=(every_row,)), encoder.params, {}), tokens
    )
    # Of the last block only keys and values are left for the other rows: 1/6 of its products.
    assert 0.75 < spent / all_of_it < 0.85


def test_sdxl_does_not_run_the_last_block_of_clip_l(encoders):
    encoder = encoders["sdxl"]
    tokens = encoder.tokenize("a cat", guidance=False)
    without_it = jax.tree.map(lambda x: x, encoder.params)
    broken = without_it["clip_l"]["text_model"]["encoder"]["layers"]["2"]["mlp"]["fc1"]
    broken["kernel"] = jnp.full_like(broken["kernel"], jnp.nan)
    out = text_embeddings(without_it, tokens, family=encoder.family)
    assert np.isfinite(out.prompt_embeds).all()
    assert np.isfinite(out.pooled_prompt_embeds).all()
    text = text_embeddings.lower(encoder.params, tokens, family=encoder.family).compile().as_text()
    f = TINY.intermediate_size
    assert len(re.findall(rf"f32\[\S*,{f}\]\S* dot\(", text)) <= 2 + 4 + 4  # two blocks of L; bigG's are 96 wide


@pytest.mark.slow
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip_counts_from_the_penultimate_layer(encoders, skip):
    encoder = encoders["sdxl"]
    out = encoder("a cat", "bad", clip_skip=skip)
    ids = jnp.asarray(encoder.tokenize("a cat", guidance=False).cond["clip_l"])
    model = clip_jax.ClipTextModel(encoder.config["clip_l"])
    hidden = jax.jit(model.apply)({"params": encoder.params["clip_l"]}, ids).hidden_states[-(skip + 2)]
    np.testing.assert_allclose(out.cond.prompt_embeds[..., :L], hidden, atol=1e-5)
    np.testing.assert_allclose(out.uncond.prompt_embeds, encoder("a cat", "bad").uncond.prompt_embeds, atol=1e-5)
    np.testing.assert_allclose(out.pooled_prompt_embeds, encoder("a cat", "bad").pooled_prompt_embeds, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_and_float16_are_near_float32(folders, encoders):
    exact = encoders["sd3"]("a cat", "bad")
    for dtype, tolerance in (("bfloat16", 0.02), ("float16", 0.005)):
        encoder = clip_jax.load(folders["sd3"], dtype=dtype)
        out = encoder("a cat", "bad")
        for ours, reference in zip(jax.tree.leaves(out), jax.tree.leaves(exact), strict=True):
            assert ours.dtype == dtype
            error = np.linalg.norm(np.asarray(ours, np.float32) - reference) / np.linalg.norm(reference)
            assert error < tolerance


@pytest.mark.slow
def test_float16_keeps_wo_of_t5_in_float32(folders, tmp_path):
    encoder = clip_jax.load(folders["flux"], dtype="float16")
    encoder.save(tmp_path / "saved")
    for params in (encoder.params, clip_jax.load(tmp_path / "saved", dtype="float16").params):
        layer = params["t5"]["encoder"]["block"]["1"]["layer"]["1"]["DenseReluDense"]
        assert (layer["wo"]["kernel"].dtype, layer["wi_0"]["kernel"].dtype) == (jnp.float32, jnp.float16)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sd15", {"prompt_2": "x"}, "sd15 takes no prompt_2"),
        ("sdxl", {"negative_prompt_3": "x"}, "sdxl takes no negative_prompt_3"),
        ("sdxl", {"max_sequence_length": 77}, "sdxl takes no max_sequence_length: it has no T5"),
        ("sd3", {"max_sequence_length": 513}, "max_sequence_length must be an int from 1 to 512, found 513"),
        ("flux", {"max_sequence_length": 0}, "max_sequence_length must be an int from 1 to 512, found 0"),
        ("flux", {"clip_skip": 1}, "flux takes no clip_skip"),
        ("sdxl", {"clip_skip": 3}, "clip_skip must be an int from 0 to 2 for clip_l, found 3"),
        ("sdxl", {"negative_prompt": "x", "clip_skip_negative": 9}, "clip_skip_negative must be an int from 0 to 2"),
        ("sdxl", {"clip_skip_negative": 9}, "clip_skip_negative must be an int from 0 to 2 for clip_l, found 9"),
        ("flux", {"clip_skip_negative": 1}, "flux takes no clip_skip_negative"),
        ("sd15", {"guidance": "no"}, "guidance must be True, False or None, found 'no'"),
        ("sd3", {"prompt_2": []}, "prompt_2 has 0 entries for 1 prompts"),
        ("sdxl", {"prompt_2": ["a", "b"]}, "prompt_2 has 2 entries for 1 prompts"),
        ("sd3", {"negative_prompt_3": ["a", "b"]}, "negative_prompt_3 has 2 entries for 1 prompts"),
        ("flux", {"prompt_2": 7}, "prompt_2 must be a str or a list of str, found int"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(encoders, name, arguments, message):
    with pytest.raises(ClipJaxError, match=message):
        encoders[name]("a cat", **arguments)


def test_a_prompt_too_long_for_t5_is_an_error_and_truncation_keeps_its_end(encoders):
    long = "x" * 300
    with pytest.raises(PromptTooLongError, match=r"prompt_3: 302 tokens, 46 too many"):
        encoders["sd3"]("a cat", prompt_3=long)
    with pytest.warns(UserWarning, match="302 tokens"):
        tokens = encoders["sd3"].tokenize("a cat", prompt_3=long, overflow="truncate", guidance=False)
    assert tokens.cond["t5"][0, -1] == 1


class TestBadFolders:
    def write(self, folder, name, tower, config, state=None):
        """A whole pipeline, with another text encoder in the folder of one tower."""
        write_family(folder, FAMILIES[name])
        write_text_encoder(folder / FAMILIES[name].tower(tower).folder, config, state or {})
        return folder

    def test_a_tower_is_missing(self, tmp_path):
        folder = write_family(tmp_path, FAMILIES["sdxl"], leave_out=["clip_g"])
        with pytest.raises(CheckpointError, match="sdxl: expected text_encoder, text_encoder_2, found text_encoder"):
            clip_jax.load(folder)

    def test_the_folder_of_a_tower_is_missing(self, tmp_path):
        shutil.rmtree(write_family(tmp_path, FAMILIES["sd3"]) / "text_encoder_3")
        with pytest.raises(CheckpointError, match="lacks the folders text_encoder_3, which its model_index.json names"):
            clip_jax.load(tmp_path)

    def test_towers_are_swapped(self, tmp_path):
        l_config = clip_jax.ClipTextConfig.sd15().to_hf()
        folder = self.write(tmp_path, "sdxl", "clip_g", l_config)
        message = r"sdxl: text_encoder_2: expected width 1280 \(clip_g\), found 768, that of clip_l"
        with pytest.raises(CheckpointError, match=message):
            clip_jax.load(folder)

    def test_clip_in_the_place_of_t5(self, tmp_path):
        folder = self.write(tmp_path, "flux", "t5", TINY.to_hf())
        message = r"flux: text_encoder_2: expected a T5 encoder \(t5\), found a CLIP text model"
        with pytest.raises(CheckpointError, match=message):
            clip_jax.load(folder)

    def test_bigg_without_its_projection(self, tmp_path):
        folder = self.write(tmp_path, "sdxl", "clip_g", dataclasses.replace(TINY_G, projection_dim=None).to_hf())
        with pytest.raises(CheckpointError, match=r"text_encoder_2: expected a CLIPTextModelWithProjection \(clip_g\)"):
            clip_jax.load(folder, family="sdxl")

    def test_t5_v1_0(self, tmp_path):
        config = TINY_T5.to_hf() | {"feed_forward_proj": "relu"}
        for key in ("dense_act_fn", "is_gated_act"):
            config.pop(key, None)
        with pytest.raises(ConfigError, match=r"text_encoder_2/config.json: .*T5 v1\.0"):
            clip_jax.load(self.write(tmp_path, "flux", "t5", config))

    def test_umt5(self, tmp_path):
        with pytest.raises(ConfigError, match=r"text_encoder_2/config.json: .*UMT5"):
            clip_jax.load(self.write(tmp_path, "flux", "t5", TINY_T5.to_hf() | {"model_type": "umt5"}))

    @pytest.mark.parametrize(
        ("key", "what"),
        [
            ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "T5 v1.0"),
            ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", "UMT5"),
        ],
    )
    def test_weights_of_a_relative_under_a_config_of_v1_1(self, tmp_path, key, what):
        state = t5_state(TINY_T5) | {key: np.ones((32, 5), np.float32)}
        folder = self.write(tmp_path, "flux", "t5", TINY_T5.to_hf(), state)
        with pytest.raises(CheckpointError, match=f"not a T5 v1.1 encoder.*found the tensors of a {what}"):
            clip_jax.load(folder)

    def test_both_spellings_of_the_embedding_are_one_parameter(self, tmp_path, encoders):
        state = t5_state(TINY_T5, seed=2)
        twin = state | {"encoder.embed_tokens.weight": state["shared.weight"], "lm_head.weight": state["shared.weight"]}
        folder = self.write(tmp_path, "flux", "t5", TINY_T5.to_hf(), twin)
        np.testing.assert_array_equal(
            clip_jax.load(folder)("a cat").prompt_embeds, encoders["flux"]("a cat").prompt_embeds
        )
        twin["encoder.embed_tokens.weight"] = state["shared.weight"] + 1
        self.write(tmp_path, "flux", "t5", TINY_T5.to_hf(), twin)
        with pytest.raises(CheckpointError, match="shared.weight and encoder.embed_tokens.weight are .* differ"):
            clip_jax.load(folder)

    def test_t5_without_a_tokenizer(self, tmp_path, folders):
        shutil.rmtree(write_family(tmp_path, FAMILIES["flux"]) / "tokenizer_2")
        with pytest.raises(CheckpointError, match="No T5 tokenizer in .*tokenizer_2"):
            clip_jax.load(tmp_path)
        other = clip_jax.load(tmp_path, tokenizer={"t5": folders["flux"] / "tokenizer_2"})
        assert other("a cat").prompt_embeds.shape == (1, 512, T5)

    @pytest.mark.parametrize("name", ["sdxl", "flux"])
    def test_a_tower_that_cannot_be_left_out(self, folders, name):
        tower = FAMILIES[name].towers[-1].name
        with pytest.raises(ClipJaxError, match=f"{name} cannot do without {tower}; it can do without none"):
            clip_jax.load(folders[name], without=[tower])

    def test_an_unknown_family(self, folders):
        with pytest.raises(CheckpointError, match="Unknown family 'sd4'; expected one of sd15, sd21, sdxl,"):
            clip_jax.load(folders["sdxl"], family="sd4")

    def test_another_family(self, folders):
        with pytest.raises(CheckpointError, match="is not of family flux: text_encoder_2: expected a T5 encoder"):
            clip_jax.load(folders["sdxl"], family="flux")


def test_ids_of_another_batch_in_one_tower_are_refused(encoders):
    encoder = encoders["sdxl"]
    tokens = encoder.tokenize(["a", "b"], "bad")
    tokens.uncond["clip_g"] = tokens.uncond["clip_g"][:1]
    with pytest.raises(ClipJaxError, match=r"clip_g, found \(1, 77\) and \(2, 77\)"):
        text_embeddings(encoder.params, tokens, family=encoder.family)


def test_a_new_family_is_a_file_and_a_name_in_the_list(folders, tmp_path, monkeypatch):
    """What a file in clip_jax/families/ would hold; conversion, loading and encoding know nothing of it."""
    from clip_jax.convert import convert

    pair = dataclasses.replace(
        FAMILIES["sdxl"], name="pair", pipelines=frozenset({"PairPipeline"}), zero_negative=False,
        join=lambda out, _: (jnp.concatenate([out["clip_g"].embeds, out["clip_l"].embeds], -1), out["clip_g"].pooled),
    )  # fmt: skip
    monkeypatch.setitem(FAMILIES, "pair", pair)
    folder = write_family(tmp_path / "source", pair)
    convert(folder, tmp_path / "out")
    out = clip_jax.load(tmp_path / "out")("a cat", "bad")
    sdxl = clip_jax.load(folders["sdxl"])("a cat", "bad").prompt_embeds
    np.testing.assert_allclose(out.prompt_embeds[..., :G], sdxl[..., L:], atol=1e-5)
    assert out.pooled_prompt_embeds.shape == (2, G)


def test_towers_of_different_batches_are_refused(encoders):
    encoder = encoders["sdxl"]
    tokens = encoder.tokenize(["a", "b"], guidance=False)
    tokens.cond["clip_g"] = tokens.cond["clip_g"][:1]
    with pytest.raises(ClipJaxError, match=r"one batch of token ids in all towers, found the sizes \[1, 2\]"):
        encoder.encode(tokens)
    with pytest.raises(ClipJaxError, match="tokens.cond has t5"):
        encoders["flux"].encode(Tokens(cond={"t5": np.ones((1, 8), np.int32)}))
    with pytest.raises(ClipJaxError, match="both uncond and zero_uncond"):
        text_embeddings(
            encoder.params, dataclasses.replace(encoder.tokenize("a", "b"), zero_uncond=True), family=encoder.family
        )


def test_random_weights_of_t5_are_not_all_zeros(monkeypatch):
    flux = FAMILIES["flux"]
    small = flux.with_configs({"clip_l": TINY, "t5": TINY_T5})
    monkeypatch.setitem(FAMILIES, "flux", small)
    with pytest.warns(UserWarning, match="random:flux has random weights"):
        encoder = clip_jax.load("random:flux")
    one, other = encoder("a cat").prompt_embeds, encoder("two dogs").prompt_embeds
    assert np.abs(one).max() > 0.1
    assert not np.allclose(one, other, atol=1e-3)


@pytest.mark.slow
def test_a_tower_that_is_left_out_need_not_be_there(tmp_path):
    folder = write_family(tmp_path, FAMILIES["sd3"])
    (folder / "text_encoder_3" / "config.json").write_text("damaged")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        clip_jax.load(folder)
    assert clip_jax.load(folder, without="t5").params.keys() == {"clip_l", "clip_g"}
    shutil.rmtree(folder / "text_encoder_3")
    assert clip_jax.load(folder, without=["t5"])("a", prompt_3="ignored").prompt_embeds.shape == (2, 333, 4096)


@pytest.mark.parametrize("name", ["sdxl", "sdxl_refiner"])
def test_a_pipeline_that_does_not_say_has_zeros(name, tmp_path):
    """As diffusers reads it, for the refiner too."""
    folder = write_family(tmp_path, FAMILIES[name])
    index = json.loads((folder / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert not clip_jax.load(folder)("a cat").uncond.prompt_embeds.any()


def test_force_zeros_is_for_the_families_that_know_it(tmp_path):
    folder = write_family(tmp_path, FAMILIES["sd15"])
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": True}))
    assert clip_jax.load(folder, family="sd15")("a cat").uncond.prompt_embeds.any()
    folder = write_family(tmp_path / "xl", FAMILIES["sdxl"])
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": "no"}))
    with pytest.raises(CheckpointError, match="force_zeros_for_empty_prompt must be true or false, found 'no'"):
        clip_jax.load(folder)


def test_the_default_length_given_by_name_compiles_nothing_new(encoders):
    encoders["flux"]("a cat")
    before = text_embeddings._cache_size()
    encoders["flux"]("a cat", max_sequence_length=512)
    assert text_embeddings._cache_size() == before


@pytest.mark.slow
def test_half_precision_params_are_computed_with_in_half_precision(folders):
    encoder = clip_jax.load(folders["flux"], dtype="float16")
    out = text_embeddings(encoder.params, encoder.tokenize("a cat"), family=encoder.family)
    assert out.prompt_embeds.dtype == jnp.float16
    with pytest.raises(ClipJaxError, match="must be floating point"):
        text_embeddings(encoder.params, encoder.tokenize("a cat"), family=encoder.family, dtype=jnp.int32)


def test_long_clip_without_a_tokenizer_takes_all_its_positions(tmp_path):
    long = dataclasses.replace(TINY, max_position_embeddings=248)
    write_text_encoder(tmp_path, long.to_hf(), hf_state(long))
    encoder = clip_jax.load(tmp_path, family="sd15")
    assert encoder(" ".join(["cat"] * 200)).prompt_embeds.shape == (2, 248, L)


@pytest.mark.parametrize("name", ["sdxl", pytest.param("flux", marks=pytest.mark.slow)])
def test_encode_goes_within_a_jit(folders, name):
    encoder = clip_jax.load(folders[name], dtype="float16")
    tokens = encoder.tokenize(["a", "b", "c"])
    wanted = encoder.encode(tokens)
    for ours, theirs in zip(jax.tree.leaves(jax.jit(encoder.encode)(tokens)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=2e-2)


def test_no_prompts_are_an_error(folders):
    encoder = clip_jax.load(folders["sdxl"])
    tokens = jax.tree.map(lambda ids: ids[:0], encoder.tokenize("a"))
    with pytest.raises(ClipJaxError, match="Token ids have no rows; expected at least one prompt"):
        text_embeddings(encoder.params, tokens, family=encoder.family)


def test_time_ids():
    ids = clip_jax.time_ids((1024, 768), (0, 16), (512, 640), rows=4)
    assert ids.shape == (4, 6)
    assert ids.tolist() == [[1024, 768, 0, 16, 512, 640]] * 4


def test_rows_of_towers_that_are_joined_have_one_length(encoders):
    encoder = encoders["sdxl"]
    ids = {name: np.zeros((1, length), np.int32) for name, length in (("clip_l", 10), ("clip_g", 12))}
    with pytest.raises(ClipJaxError, match=r"as many token ids .* found \{'clip_l': 10, 'clip_g': 12\}"):
        encoder.encode(clip_jax.Tokens(cond=ids))


def test_guidance_may_be_what_numpy_compares_to(encoders):
    for scale in (7.5, 0.0):
        wanted = encoders["sd15"].tokenize("a cat", guidance=scale > 1)
        found = encoders["sd15"].tokenize("a cat", guidance=np.float32(scale) > 1)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_sizes_are_pairs():
    for wrong in ({"original_size": (8, 8, 3)}, {"crops_coords_top_left": (0,)}):
        for function in (clip_jax.time_ids, clip_jax.refiner_time_ids):
            with pytest.raises(ClipJaxError, match="are pairs, height and width or top and left; found"):
                function(**wrong)
    with pytest.raises(ClipJaxError, match=r"are pairs, .*found \(8, 8, 3\)"):
        clip_jax.time_ids(target_size=(8, 8, 3))


def test_time_ids_of_the_refiner():
    ids = clip_jax.refiner_time_ids((1024, 768), (0, 16), 7.5, 1.5, rows=4, dtype=jnp.bfloat16)
    assert ids.dtype == jnp.bfloat16
    assert ids.tolist() == [[1024, 768, 0, 16, 1.5]] * 2 + [[1024, 768, 0, 16, 7.5]] * 2
    assert clip_jax.refiner_time_ids(rows=3, guidance=False).tolist() == [[1024, 1024, 0, 0, 6.0]] * 3
    with pytest.raises(ClipJaxError, match="rows must be even, a negative prompt for each prompt; found 3"):
        clip_jax.refiner_time_ids(rows=3)


def test_rows_are_as_long_as_positions_and_tokenizer_allow():
    config = dataclasses.replace(clip_jax.ClipTextConfig.sd15(), max_position_embeddings=248)
    family = FAMILIES["sd15"].with_configs({"clip_l": config})
    assert [family.row_length(family.towers[0], length) for length in (77, 1000)] == [77, 248]


@pytest.mark.slow
def test_rows_that_are_joined_are_as_long_as_the_shorter(tmp_path):
    """A LongCLIP beside bigG: SDXL joins the rows of both, and FLUX takes of CLIP-L none but the pooled one."""
    long = dataclasses.replace(TINY, max_position_embeddings=248)
    folder = write_family(tmp_path / "sdxl", FAMILIES["sdxl"])
    state = hf_state(long, seed=1)
    write_text_encoder(folder / "text_encoder", long.to_hf(), state)
    ClipTokenizer.packaged(model_max_length=248).save(folder / "tokenizer")
    encoder = clip_jax.load(folder, family="sdxl")
    assert encoder("a cat").prompt_embeds.shape == (2, 77, L + G)
    cut = {name: array[:77] if "position_embedding" in name else array for name, array in state.items()}
    write_text_encoder(folder / "text_encoder", dataclasses.replace(long, max_position_embeddings=77).to_hf(), cut)
    short = clip_jax.load(folder, family="sdxl")
    np.testing.assert_allclose(encoder("a cat").prompt_embeds, short("a cat").prompt_embeds, atol=1e-6)
    with pytest.raises(PromptTooLongError, match="more than 77 tokens"):
        encoder(" ".join(["cat"] * 100))
    towers = FAMILIES["flux"].towers
    flux = FAMILIES["flux"].with_configs({"clip_l": long, "t5": towers[1].config})
    assert flux.row_length(flux.towers[0], 1000) == 248


@pytest.mark.parametrize(("longest", "lengths"), [(6, [6]), (64, [8, 16, 32, 48, 64]), (248, [154, 231, 248])])
def test_every_length_that_texts_are_cut_to_is_there(longest, lengths):
    config = dataclasses.replace(clip_jax.ClipTextConfig.sd15(), max_position_embeddings=longest)
    family = FAMILIES["flux"].with_configs({"clip_l": config, "t5": FAMILIES["flux"].tower("t5").config})
    ids = np.zeros((1, longest), np.int32)
    made = of_every_length(Tokens(cond={"clip_l": ids, "t5": np.zeros((1, 4), np.int32)}), family)
    found = [tokens.cond["clip_l"].shape[1] for tokens in made]
    assert found[-len(lengths) :] == lengths
    for size in range(1, longest + 1):
        ids = np.where(np.arange(longest) == size - 1, config.eos_token_id, 1)[None]
        cut = without_tails(Tokens(cond={"clip_l": ids, "t5": np.zeros((1, 4), np.int32)}), family)
        assert cut.cond["clip_l"].shape[1] in found


@pytest.mark.parametrize("end", [0, 2, 49407])
def test_ids_of_every_length_are_cut_to_it(end):
    """Also where the end of the text is the first id, or said to be 2 (the highest); and no longer than rows."""
    config = dataclasses.replace(clip_jax.ClipTextConfig.sd15(), eos_token_id=end, max_position_embeddings=20)
    family = FAMILIES["flux"].with_configs({"clip_l": config, "t5": FAMILIES["flux"].tower("t5").config})
    tokens = Tokens(cond={"clip_l": np.zeros((1, 20), np.int32), "t5": np.zeros((1, 4), np.int32)})
    made = of_every_length(tokens, family)
    assert [ids.cond["clip_l"].shape[1] for ids in made] == [8, 16, 20]
    assert [without_tails(ids, family).cond["clip_l"].shape[1] for ids in made] == [8, 16, 20]


@pytest.mark.slow
def test_flux_runs_clip_to_the_end_of_the_longest_text(encoders):
    encoder, long, few = encoders["flux"], " ".join(["cat"] * 20), {"prompt_2": "x", "max_sequence_length": 16}
    both = encoder("a", long, negative_prompt_2="x", guidance=True, **few)
    for half, prompt in ((both.uncond, long), (both.cond, "a")):
        alone = encoder(prompt, guidance=False, **few)
        np.testing.assert_allclose(half.pooled_prompt_embeds, alone.pooled_prompt_embeds, atol=1e-5)


@pytest.mark.slow
def test_text_ids_have_the_dtype_of_the_embeddings(folders):
    out = clip_jax.load(folders["flux"], dtype="bfloat16")("a cat", max_sequence_length=16)
    assert out.text_ids.dtype == out.prompt_embeds.dtype == jnp.bfloat16


@pytest.mark.slow
def test_clip_skip_is_for_the_clip_rows_of_sd3(encoders):
    plain, skipped = (encoders["sd3"]("a cat", clip_skip=skip, max_sequence_length=16) for skip in (None, 1))
    _, rows, pooled = changed(plain, skipped)
    assert (rows[:77].all(), rows[77:].any(), pooled.any()) == (True, False, False)


def test_towers_of_two_dtypes_are_computed_in_the_wider(encoders):
    encoder = encoders["sdxl"]
    tokens = encoder.tokenize("a cat")
    for tower in encoder.params:
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), encoder.params[tower])
        params = {**encoder.params, tower: low}
        out = jax.eval_shape(lambda p: text_embeddings(p, tokens, family=encoder.family), params)
        assert out.prompt_embeds.dtype == jnp.float32
