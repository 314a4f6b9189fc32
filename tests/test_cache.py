"""The cache of embeddings: what is computed, what is not, and that no answer is an old one."""

import collections
import copy
import dataclasses
import gc
import pickle
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clip_jax
from clip_jax import cache
from clip_jax.cache import EmbeddingCache
from tests.checkpoints import write_family


@pytest.fixture(scope="module", params=["sdxl", pytest.param("flux", marks=pytest.mark.slow)])
def loaded(request, tmp_path_factory):
    folder = write_family(tmp_path_factory.mktemp("cache") / request.param, clip_jax.FAMILIES[request.param])
    return clip_jax.load(folder, family=request.param)


@pytest.fixture
def cached(loaded, monkeypatch):
    """An encoder with an empty cache, and the numbers of rows that it computes, by call: (negatives, prompts)."""
    encoder = clip_jax.TextEncoder(loaded.family, loaded.params, loaded.tokenizers)
    computed = []
    run = encoder._run

    def counted(params, dtype, tokens, skips):
        computed.append(tuple(len(side["clip_l"]) if side else 0 for side in (tokens.uncond, tokens.cond)))
        return run(params, dtype, tokens, skips)

    monkeypatch.setattr(encoder, "_run", counted)
    return encoder, computed


@pytest.fixture
def uncached(loaded):
    return clip_jax.TextEncoder(loaded.family, loaded.params, loaded.tokenizers, cache_bytes=0)


def same(found, wanted, atol=0):
    assert found.guidance == wanted.guidance
    ours, theirs = jax.tree.leaves(found), jax.tree.leaves(wanted)
    assert [leaf.shape for leaf in ours] == [leaf.shape for leaf in theirs]
    for leaf, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=atol)


BOTH = {"guidance": True}


def ask(encoder, prompt, **options):
    """Calls it, with few tokens for T5: over hundreds of pads its float32 is noise of 1e-5 from batch to batch."""
    if "t5" in encoder.config:
        options = {"max_sequence_length": 32, **options}
    return encoder(prompt, **options)


def test_the_first_call_is_the_uncached_one_and_the_second_returns_the_same_arrays(cached, uncached):
    encoder, computed = cached
    first = ask(encoder, "a cat", negative_prompt="blurry", **BOTH)
    same(first, ask(uncached, "a cat", negative_prompt="blurry", **BOTH))
    assert ask(encoder, "a cat", negative_prompt="blurry", **BOTH) is first
    assert ask(encoder, ["a cat"], negative_prompt=["blurry"], **BOTH).prompt_embeds.shape == first.prompt_embeds.shape
    assert computed == [(1, 1)]


def test_a_new_prompt_with_a_known_negative_is_encoded_alone(cached, uncached):
    encoder, computed = cached
    ask(encoder, "a cat", negative_prompt="blurry", **BOTH)
    found = ask(encoder, "two dogs", negative_prompt="blurry", **BOTH)
    assert computed == [(1, 1), (0, 1)]
    same(found.cond, ask(uncached, "two dogs", guidance=False))  # the same bucket: the same bits
    same(found.uncond, ask(uncached, "a cat", negative_prompt="blurry", **BOTH).uncond)
    same(found, ask(uncached, "two dogs", negative_prompt="blurry", **BOTH), atol=1e-5)
    ask(encoder, "two dogs", negative_prompt="dark", **BOTH)
    ask(encoder, "blurry", negative_prompt="a cat", **BOTH)
    assert computed == [(1, 1), (0, 1), (0, 1)]


def test_equal_prompts_of_a_batch_are_encoded_once(cached, uncached):
    encoder, computed = cached
    prompts = ["a cat", "two dogs", "a cat", "a boat"]
    found = ask(encoder, prompts, negative_prompt="blurry", **BOTH)
    assert computed == [(0, 1), (0, 3)]
    same(found, ask(uncached, prompts, negative_prompt="blurry", **BOTH), atol=1e-5)
    for row, prompt in enumerate(prompts):
        same(ask(encoder, prompt, guidance=False), ask(uncached, [prompt], guidance=False), atol=1e-5)
        np.testing.assert_array_equal(
            ask(encoder, prompt, guidance=False).prompt_embeds[0], found.cond.prompt_embeds[row]
        )
    assert len(computed) == 2


def test_options_make_other_entries(cached, uncached):
    encoder, computed = cached
    family = encoder.family.name
    options = {"max_sequence_length": 64} if family == "flux" else {"clip_skip": 1}
    ask(encoder, "a cat", guidance=False)
    same(ask(encoder, "a cat", guidance=False, **options), ask(uncached, "a cat", guidance=False, **options), atol=1e-5)
    assert len(computed) == 2
    if family != "flux":
        same(
            ask(encoder, "a cat", negative_prompt="a cat", clip_skip=1),
            ask(uncached, "a cat", negative_prompt="a cat", clip_skip=1),
            atol=1e-5,
        )
        assert len(computed) == 2  # both are there


def test_zeros_are_not_encoded(loaded, cached, uncached):
    encoder, computed = cached
    if not loaded.family.zero_negative:
        assert encoder.tokenize("a cat").zero_uncond is False
        return
    same(ask(encoder, "a cat"), ask(uncached, "a cat"))
    assert computed == [(0, 1)]
    same(ask(encoder, ["a cat", "two dogs"]), ask(uncached, ["a cat", "two dogs"]), atol=1e-5)
    assert computed == [(0, 1), (0, 1)]


def test_statistics(cached):
    encoder, _ = cached
    ask(encoder, "a cat", negative_prompt="blurry", **BOTH)
    ask(encoder, "two dogs", negative_prompt="blurry", **BOTH)
    ask(encoder, "two dogs", negative_prompt="blurry", **BOTH)
    stats = encoder.cache.stats()
    assert (stats.misses, stats.hits) == (3, 3)
    assert stats.entries == 5  # three prompts, two calls
    assert 0 < stats.nbytes <= stats.max_bytes
    encoder.cache.clear()
    assert dataclasses.astuple(encoder.cache.stats()) == (0, 0, 0, 0, stats.max_bytes)


def test_other_params_tokenizers_or_dtypes_are_never_answered_from_it(cached):
    encoder, computed = cached
    before = ask(encoder, "a cat", guidance=False)
    params = encoder.params
    encoder.params = jax.tree.map(lambda leaf: leaf * 1.1, params)
    assert (ask(encoder, "a cat", guidance=False).prompt_embeds != before.prompt_embeds).any()
    encoder.params = params
    same(ask(encoder, "a cat", guidance=False), before)
    tower = next(iter(params))
    table = params[tower]["text_model"]["embeddings"]["token_embedding"]
    plain = table["embedding"]
    try:
        table["embedding"] = plain + 1  # in place
        ask(encoder, "a cat", guidance=False)
    finally:
        table["embedding"] = plain
    encoder.dtype = np.dtype(jnp.bfloat16)
    assert ask(encoder, "a cat", guidance=False).prompt_embeds.dtype == jnp.bfloat16
    encoder.tokenizers = dict(encoder.tokenizers)
    ask(encoder, "a cat", guidance=False)
    encoder.tokenizers[tower] = type("Other", (), {"__getattr__": lambda _, name: getattr(plain_tokenizer, name)})()
    plain_tokenizer = clip_jax.load_tokenizers("random:sd21")["clip_h"]
    ask(encoder, "a cat", guidance=False)
    assert len(computed) == 6


def exchange_while_running(encoder, monkeypatch, exchange):
    """Another thread does something once the next call has computed what it wants."""
    run = encoder._run

    def exchanged(params, dtype, tokens, skips):
        out = run(params, dtype, tokens, skips)
        monkeypatch.setattr(encoder, "_run", run)
        exchange()
        return out

    monkeypatch.setattr(encoder, "_run", exchanged)


def test_a_cache_that_is_exchanged_meanwhile_gets_nothing_of_the_call(cached, uncached, monkeypatch):
    encoder, _ = cached
    params = jax.tree.map(lambda leaf: leaf * 1.1, encoder.params)

    def exchange():
        encoder.cache, encoder.params = EmbeddingCache(2**20), params

    exchange_while_running(encoder, monkeypatch, exchange)
    ask(encoder, "a cat")
    assert encoder.cache.stats().entries == 0
    uncached.params = params
    same(ask(encoder, "a cat"), ask(uncached, "a cat"))


def test_a_dtype_that_was_another_meanwhile_leaves_nothing(cached, uncached, monkeypatch):
    encoder, _ = cached

    def exchange():
        encoder.dtype = "bfloat16"
        encoder.dtype = "float32"

    exchange_while_running(encoder, monkeypatch, exchange)
    ask(encoder, "a cat")
    assert encoder.cache.stats().entries == 0
    same(ask(encoder, "a cat"), ask(uncached, "a cat"))


def test_a_dtype_that_is_exchanged_meanwhile_is_for_the_next_call(cached, uncached, monkeypatch):
    encoder, _ = cached
    ask(encoder, "a", negative_prompt="n", guidance=True)
    run = encoder._run

    def exchanged(*arguments):
        encoder.dtype = "bfloat16"
        return run(*arguments)

    monkeypatch.setattr(encoder, "_run", exchanged)
    found = ask(encoder, "b", negative_prompt="n", guidance=True)
    same(found, ask(uncached, "b", negative_prompt="n", guidance=True), atol=1e-5)
    assert ask(encoder, "b", negative_prompt="n", guidance=True).prompt_embeds.dtype == jnp.bfloat16


def test_no_layers_to_skip_are_the_rows_of_none(cached):
    encoder, computed = cached
    before = ask(encoder, "a cat", negative_prompt="blurry", guidance=True)
    if any(not tower.pooled_only and "clip" in tower.name for tower in encoder.family.towers):
        after = ask(encoder, "a cat", negative_prompt="blurry", guidance=True, clip_skip=0, clip_skip_negative=0)
        same(after, before)
        assert len(computed) == 1


def test_what_it_holds_of_very_long_prompts_is_their_rows_alone(cached):
    encoder, computed = cached
    for _ in range(2):
        ask(encoder, "a cat" + " " * 2**16, guidance=False)
    assert len(computed) == 1
    assert encoder.cache.stats().entries == 1
    ask(encoder, "a cat", guidance=False)
    assert encoder.cache.stats().entries == 2  # the row, and the call


@pytest.mark.parametrize("change", [lambda ids: ids + 0.7, lambda ids: ids.astype(bool), lambda ids: ids.tolist()])
def test_ids_that_are_no_integers_are_refused_although_their_rows_are_known(cached, change):
    encoder, _ = cached
    tokens = encoder.tokenize("a cat", guidance=False)
    encoder.encode(tokens)
    with pytest.raises(
        clip_jax.ClipJaxError, match="Expected token ids of clip_l as arrays of integers of NumPy or JAX, found"
    ):
        encoder.encode(dataclasses.replace(tokens, cond={n: change(ids) for n, ids in tokens.cond.items()}))


def test_within_jit_nothing_is_kept(cached):
    encoder, computed = cached
    jax.make_jaxpr(lambda scale: ask(encoder, "a cat", guidance=False).prompt_embeds * scale)(2.0)
    assert encoder.cache.stats().entries == 0
    ask(encoder, "a cat", guidance=False).prompt_embeds.block_until_ready()
    assert computed == [(0, 1), (0, 1)]


def test_what_is_cut_is_told_every_time(cached):
    encoder, _ = cached
    for _ in range(2):
        with pytest.warns(UserWarning, match="This text was dropped"):
            ask(encoder, "cat " * 600, guidance=False, overflow="truncate")


def test_errors_stay_errors(cached):
    encoder, _ = cached
    for _ in range(2):
        with pytest.raises(clip_jax.ClipJaxError, match="must be a str or a list of str"):
            encoder(7)
        with pytest.raises(clip_jax.ClipJaxError, match="must be a str or a list of str"):
            encoder({"a": 1})
        with pytest.raises(clip_jax.PromptTooLongError):
            ask(encoder, "cat " * 600)


def test_what_equals_an_option_is_not_that_option(cached):
    encoder, _ = cached
    option, number = ("clip_skip", 1) if encoder.family.name == "sdxl" else ("max_sequence_length", 1)
    encoder("", guidance=False, **{option: number})
    with pytest.raises(clip_jax.ClipJaxError, match=f"{option} must be an int"):
        encoder("", guidance=False, **{option: True})
    with pytest.raises(clip_jax.ClipJaxError, match="guidance must be True, False or None, found 0"):
        encoder("", guidance=0, **{option: number})


def test_prompts_that_change_are_encoded_anew(cached):
    class Prompts(collections.UserList):
        __hash__ = object.__hash__

    encoder, computed = cached
    prompts = Prompts(["a cat"])
    before = ask(encoder, prompts, guidance=False)
    prompts[0] = "two dogs"
    assert (ask(encoder, prompts, guidance=False).prompt_embeds != before.prompt_embeds).any()
    assert len(computed) == 2


def test_ids_of_unequal_lengths_are_refused_although_some_rows_are_known(cached):
    encoder, _ = cached
    tokens = encoder.tokenize("a cat", negative_prompt="blurry", **BOTH)
    encoder.encode(tokens)
    tower = list(tokens.cond)[-1]
    cut = dataclasses.replace(tokens, cond={**tokens.cond, tower: tokens.cond[tower][:, :-2] + 1})
    with pytest.raises(clip_jax.ClipJaxError, match=f"Expected token ids .* of one shape .*{tower}"):
        encoder.encode(cut)


def test_arrays_of_numpy_are_copied_when_they_are_set(cached):
    encoder, computed = cached
    given = jax.tree.map(np.array, encoder.params)
    encoder.params = given
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(encoder.params))
    before = ask(encoder, "a cat", guidance=False)
    for leaf in jax.tree.leaves(given):
        leaf *= 2
    encoder.cache.clear()
    same(ask(encoder, "a cat", guidance=False), before)
    assert len(computed) == 2


def test_a_cache_of_no_bytes_is_none(uncached):
    assert uncached.cache is None
    assert ask(uncached, "a cat", guidance=False) is not ask(uncached, "a cat", guidance=False)


@pytest.mark.parametrize("wrong", [-1, 1.5, "1GB", True])
def test_other_sizes_are_refused(loaded, wrong):
    with pytest.raises(clip_jax.ClipJaxError, match="cache_bytes must be an int of 0 or more"):
        clip_jax.TextEncoder(loaded.family, loaded.params, loaded.tokenizers, cache_bytes=wrong)


def test_threads_share_it(cached, uncached):
    encoder, _ = cached
    prompts = [f"a cat number {number % 5}" for number in range(40)]
    found, errors = {}, []

    def work(number):
        try:
            found[number] = ask(encoder, prompts[number], negative_prompt="blurry", **BOTH)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for number, prompt in enumerate(prompts):
        same(found[number], ask(uncached, prompt, negative_prompt="blurry", **BOTH), atol=1e-5)
    stats = encoder.cache.stats()
    assert stats.entries == 11
    assert stats.nbytes == sum(size for _, size in encoder.cache._entries.values())


def test_what_was_donated_is_computed_again(cached):
    encoder, _ = cached
    out = encoder("a cat", guidance=True, negative_prompt="blurry")
    wanted = np.array(out.prompt_embeds)
    jax.jit(lambda x: x * 2, donate_argnums=0)(out.prompt_embeds)
    again = encoder("a cat", guidance=True, negative_prompt="blurry")
    np.testing.assert_array_equal(again.prompt_embeds, wanted)


@pytest.mark.parametrize("loaded", ["flux"], indirect=True)
def test_text_ids_may_be_donated_too(loaded):
    encoder = clip_jax.TextEncoder(loaded.family, loaded.params, loaded.tokenizers)
    for prompt in ("a cat", ["a cat", "a dog"]):
        out = ask(encoder, prompt)
        jax.jit(lambda x: x * 2, donate_argnums=0)(out.text_ids)
        assert out.text_ids.is_deleted()
        assert not ask(encoder, prompt).text_ids.is_deleted()


@pytest.mark.parametrize("loaded", ["sdxl"], indirect=True)
@pytest.mark.parametrize("setting", ["precision", "device", "mesh"])
def test_settings_of_jax_make_other_entries(cached, setting):
    encoder, computed = cached
    mesh = jax.sharding.Mesh(jax.devices()[:1], "data")
    context = {
        "precision": lambda: jax.default_matmul_precision("tensorfloat32"),
        "device": lambda: jax.default_device(jax.devices()[0]),
        "mesh": lambda: jax.set_mesh(mesh),
    }[setting]
    ask(encoder, "a cat", guidance=False)
    with context():
        ask(encoder, "a cat", guidance=False)
        ask(encoder, "a cat", guidance=False)
        encoder.encode(encoder.tokenize("a cat", guidance=False))
    assert len(computed) == 2
    ask(encoder, "a cat", guidance=False)
    assert len(computed) == 2


@pytest.mark.parametrize("loaded", ["flux"], indirect=True)  # SDXL takes no final norm
def test_arrays_of_numpy_that_are_put_there_later_are_not_trusted(cached):
    encoder, _ = cached
    norm = encoder.params["clip_l"]["text_model"]["final_layer_norm"]
    plain = norm["bias"]
    try:
        norm["bias"] = np.array(plain)
        before = jax.block_until_ready(ask(encoder, "a cat", guidance=True, negative_prompt="x"))
        norm["bias"] += 1
        after = ask(encoder, "a cat", guidance=True, negative_prompt="x")
    finally:
        norm["bias"] = plain
    outputs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    assert any((ours != theirs).any() for ours, theirs in outputs)


@pytest.mark.parametrize("loaded", ["sdxl"], indirect=True)
def test_tokenizers_that_change_places_make_other_entries(loaded):
    encoder = clip_jax.TextEncoder(loaded.family, loaded.params, loaded.tokenizers)
    before = encoder("a cat")
    encoder.tokenizers = dict(zip(reversed(encoder.tokenizers), encoder.tokenizers.values(), strict=True))
    assert (encoder("a cat").prompt_embeds != before.prompt_embeds).any()


@pytest.mark.parametrize("loaded", ["sdxl"], indirect=True)
def test_ids_of_another_width_are_not_those_of_the_same_bytes(cached):
    encoder, computed = cached
    names = list(encoder.config)
    wide, narrow = (np.zeros(shape, dtype) for shape, dtype in (((1, 4), np.int64), ((1, 8), np.int32)))
    found = [encoder.encode(clip_jax.Tokens(cond=dict.fromkeys(names, ids))) for ids in (wide, narrow)]
    assert [out.prompt_embeds.shape[1] for out in found] == [4, 8]
    assert len(computed) == 2


def test_the_order_of_towers_does_not_matter(cached, uncached):
    encoder, _ = cached
    tokens = encoder.tokenize("cat " * 75, prompt_2="dog " * 75, guidance=False)
    swapped = encoder.tokenize("dog " * 75, prompt_2="cat " * 75, guidance=False)
    for each in (tokens, dataclasses.replace(swapped, cond=dict(reversed(swapped.cond.items())))):
        jax.tree.map(np.testing.assert_array_equal, encoder.encode(each), uncached.encode(each))


def test_params_that_are_replaced_are_let_go_of_at_once(loaded):
    encoder = clip_jax.TextEncoder(loaded.family, jax.tree.map(jnp.copy, loaded.params), loaded.tokenizers)
    encoder("a cat")
    old = [weakref.ref(leaf) for leaf in jax.tree.leaves(encoder.params)]
    encoder.params = loaded.params
    gc.collect()
    assert not any(ref() is not None for ref in old)


def test_one_call_computes_with_one_set_of_params(loaded, monkeypatch):
    """Another thread exchanges them while the first of two programs runs; they are back before the next call."""
    encoder = clip_jax.TextEncoder(loaded.family, loaded.params, loaded.tokenizers)
    other = jax.tree.map(lambda leaf: leaf * 2, loaded.params)
    compute, kept = encoder._compute, encoder.params

    def exchanged(params, *arguments):
        encoder.params = other
        out = compute(params, *arguments)
        encoder.params = kept
        return out

    options = {"guidance": True, "negative_prompt": ["blurry", "low"]}
    wanted = clip_jax.TextEncoder(loaded.family, loaded.params, loaded.tokenizers)(["a", "b"], **options)
    monkeypatch.setattr(encoder, "_compute", exchanged)
    jax.tree.map(np.testing.assert_array_equal, encoder(["a", "b"], **options), wanted)
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, encoder(["a", "b"], **options), wanted)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_a_copy_has_an_empty_cache_of_the_same_size(loaded, copied):
    encoder = clip_jax.TextEncoder(loaded.family, loaded.params, loaded.tokenizers, cache_bytes=2**20)
    wanted = encoder("a cat")
    found = copied(encoder)
    assert (found.cache.stats().entries, found.cache.stats().max_bytes) == (0, 2**20)
    jax.tree.map(np.testing.assert_array_equal, found("a cat"), wanted)


def test_many_rows_are_joined_a_few_at_a_time(loaded, monkeypatch):
    encoder = clip_jax.TextEncoder(loaded.family, loaded.params, loaded.tokenizers, cache_bytes=2**30)
    prompts = [f"{number} cats" for number in range(70)]
    wanted = encoder(prompts, guidance=False)
    sizes, concatenated = [], cache._concatenated

    def noted(parts):
        sizes.append(len(parts))
        return concatenated(parts)

    monkeypatch.setattr(cache, "_concatenated", noted)
    again = encoder(prompts[::-1], guidance=False)
    np.testing.assert_array_equal(again.prompt_embeds, wanted.prompt_embeds[::-1])
    np.testing.assert_array_equal(again.pooled_prompt_embeds, wanted.pooled_prompt_embeds[::-1])
    assert sizes == [16, 16, 16, 16, 6, 5]


@pytest.mark.slow
def test_rows_of_zeros_of_another_length_are_others(tmp_path):
    folder = write_family(tmp_path / "sd3", clip_jax.FAMILIES["sd3"])
    encoder = clip_jax.load(folder, family="sd3", without="t5")
    for length in (16, 32):
        assert encoder("a cat", max_sequence_length=length).prompt_embeds.shape[-2] == 77 + length


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["sdxl"], indirect=True)
def test_pooled_rows_may_be_donated_too(cached):
    encoder, _ = cached
    out = encoder("a cat")
    wanted = np.array(out.pooled_prompt_embeds)
    jax.jit(lambda x: x * 2, donate_argnums=0)(out.pooled_prompt_embeds)
    np.testing.assert_array_equal(encoder("a cat").pooled_prompt_embeds, wanted)


@pytest.mark.parametrize("loaded", ["sdxl"], indirect=True)
def test_a_call_is_known_by_all_that_it_is_given(cached, monkeypatch):
    """Also by what this family does not take."""
    encoder, _ = cached
    out, asked = encoder("a cat"), []
    monkeypatch.setattr(encoder, "tokenize", lambda *prompts, **options: asked.append(prompts))
    monkeypatch.setattr(encoder, "encode", lambda tokens, **options: out)
    names = ["prompt", *(f"{side}prompt{n}" for side in ("", "negative_") for n in ("_2", "_3")), "negative_prompt"]
    numbers = ["clip_skip", "clip_skip_negative", "max_sequence_length"]
    given = {**dict.fromkeys(names, "a"), **dict.fromkeys(numbers, 1), "guidance": True}
    others = {**dict.fromkeys(names, "b"), **dict.fromkeys(numbers, 2), "guidance": False}
    for change in ({}, *({name: other} for name, other in others.items())):
        before = len(asked)
        for _ in range(2):
            encoder(**given | change)
        assert len(asked) == before + 1, change


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["sdxl"], indirect=True)
def test_a_call_under_another_setting_is_another(cached):
    encoder, computed = cached
    ask(encoder, "a cat", guidance=False)
    with jax.default_matmul_precision("tensorfloat32"):
        ask(encoder, "a cat", guidance=False)
    assert len(computed) == 2


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["sdxl"], indirect=True)
def test_ids_of_one_tower_may_be_traced(cached, uncached):
    encoder, _ = cached
    ids = encoder.tokenize("a cat", guidance=False).cond

    def run(traced):
        return encoder.encode(clip_jax.Tokens(cond={**ids, "clip_l": traced}))

    same(jax.jit(run)(jnp.asarray(ids["clip_l"])), uncached("a cat", guidance=False), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["sdxl"], indirect=True)
def test_each_side_keeps_its_layers_where_both_lack_as_many_rows(cached, uncached):
    encoder, computed = cached
    ask(encoder, ["a", "b"], negative_prompt=["c", "d"], clip_skip=1)
    found = ask(encoder, ["a", "e"], negative_prompt=["c", "f"], clip_skip=1)
    assert computed == [(2, 2), (1, 1)]
    same(found, ask(uncached, ["a", "e"], negative_prompt=["c", "f"], clip_skip=1), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["sdxl"], indirect=True)
def test_every_id_of_a_row_counts(cached):
    encoder, computed = cached
    ids = encoder.tokenize("a cat", guidance=False).cond
    encoder.encode(clip_jax.Tokens(cond=ids))
    for column in range(0, 77, 19):  # the first and the last as well
        encoder.encode(clip_jax.Tokens(cond={**ids, "clip_g": np.where(np.arange(77) == column, 7, ids["clip_g"])}))
    assert len(computed) == 6
