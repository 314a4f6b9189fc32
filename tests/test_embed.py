"""text_embeddings: pure, jitted, one program, usable inside a caller's transformations."""

import subprocess
import sys

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clip_jax
from clip_jax import ClipJaxError, ClipTextModel, Tokens, text_embeddings
from clip_jax.params.shapes import flatten, unflatten
from clip_jax.structs import TextEmbeddings

TOWER = "clip_l"


@pytest.fixture(scope="module")
def tokens(encoder):
    return encoder.tokenize(["a cat", "two dogs in the rain"], "blurry")


def embed(encoder, tokens, **kwargs):
    return text_embeddings(encoder.params, tokens, family=encoder.family, **kwargs)


def alone(encoder, ids):
    """The model applied to one batch of ids, without any of what `text_embeddings` adds."""
    (tower,) = encoder.family.towers
    return jax.jit(ClipTextModel(tower.config).apply)({"params": encoder.params[TOWER]}, jnp.asarray(ids))


def test_unconditional_rows_come_first(encoder, tokens):
    out = embed(encoder, tokens)
    assert out.prompt_embeds.shape == (4, 77, 32)
    uncond, cond = alone(encoder, tokens.uncond[TOWER]), alone(encoder, tokens.cond[TOWER])
    np.testing.assert_allclose(out.prompt_embeds[:2], uncond.last_hidden_state, atol=1e-5)
    np.testing.assert_allclose(out.prompt_embeds[2:], cond.last_hidden_state, atol=1e-5)
    assert not np.allclose(out.prompt_embeds[:2], out.prompt_embeds[2:], atol=1e-2)
    np.testing.assert_array_equal(out.uncond.prompt_embeds, out.prompt_embeds[:2])
    np.testing.assert_array_equal(out.cond.prompt_embeds, out.prompt_embeds[2:])
    assert out.pooled_prompt_embeds is None


def test_without_guidance_there_is_the_prompt_alone(encoder, tokens):
    out = embed(encoder, Tokens(cond=tokens.cond))
    assert out.prompt_embeds.shape == (2, 77, 32)
    assert out.uncond is None
    assert out.cond is out
    np.testing.assert_allclose(out.prompt_embeds, embed(encoder, tokens).cond.prompt_embeds, atol=1e-5)


def test_dtype_is_cast_at_the_end(encoder, tokens):
    exact = embed(encoder, tokens).prompt_embeds
    half = embed(encoder, tokens, dtype=jnp.float16).prompt_embeds
    assert (exact.dtype, half.dtype) == (jnp.float32, jnp.float16)
    np.testing.assert_array_equal(half, exact.astype(jnp.float16))


@pytest.mark.slow
def test_compute_dtype_is_that_of_the_params_by_default(encoder, tokens):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), encoder.params)
    out = text_embeddings(low, tokens, family=encoder.family)
    same = text_embeddings(low, tokens, family=encoder.family, compute_dtype=jnp.bfloat16)
    exact = text_embeddings(low, tokens, family=encoder.family, compute_dtype=jnp.float32)
    assert out.prompt_embeds.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.prompt_embeds, same.prompt_embeds)
    assert exact.prompt_embeds.dtype == jnp.float32


def test_a_call_is_one_program(encoder, tokens):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    try:
        with jax.log_compiles(False):
            embed(encoder, tokens, clip_skip=2, clip_skip_negative=1)  # a combination of its own
    finally:
        jax.monitoring.clear_event_listeners()
    assert len(compiled) == 1
    text = text_embeddings.lower(encoder.params, tokens, family=encoder.family).compile().as_text()
    assert text.count("HloModule") == 1
    assert text.count("ENTRY") == 1


def test_both_prompts_go_through_the_same_products(encoder, tokens):
    """Guidance doubles the rows of each matrix product, not the number of products."""

    def dots(tokens):
        return text_embeddings.lower(encoder.params, tokens, family=encoder.family).as_text().count("dot_general")

    assert dots(tokens) == dots(Tokens(cond=tokens.cond))


def test_a_second_call_does_not_retrace(encoder, tokens):
    embed(encoder, tokens)
    before = text_embeddings._cache_size()
    again = encoder.tokenize(["other", "words"], ["entirely", "different"])
    embed(encoder, again)
    assert text_embeddings._cache_size() == before
    embed(encoder, encoder.tokenize("one prompt"))  # the control: other shapes do
    assert text_embeddings._cache_size() == before + 1


def test_usable_inside_a_callers_jit(encoder, tokens):
    inside = jax.jit(lambda params, tokens: embed_mean(params, tokens, encoder.family))(encoder.params, tokens)
    np.testing.assert_allclose(inside, embed_mean(encoder.params, tokens, encoder.family), rtol=1e-5)


def embed_mean(params, tokens, family):
    return (text_embeddings(params, tokens, family=family).prompt_embeds ** 2).mean()


def test_gradient_reaches_every_parameter_and_is_right(encoder, tokens):
    gradient = jax.grad(embed_mean)(encoder.params, tokens, encoder.family)
    norms = jax.tree.map(lambda g: float(jnp.abs(g).max()), gradient)
    # A key bias shifts all scores of a query alike, which softmax does not see.
    flat = jax.tree_util.tree_flatten_with_path(norms)[0]
    silent = {jax.tree_util.keystr(path) for path, norm in flat if norm < 1e-7}
    assert silent == {jax.tree_util.keystr(path) for path, _ in flat if "k_proj" in str(path) and "bias" in str(path)}
    direction = jax.tree.map(lambda g: g / 10, gradient)
    eps = 1e-2
    up = jax.tree.map(lambda p, d: p + eps * d, encoder.params, direction)
    down = jax.tree.map(lambda p, d: p - eps * d, encoder.params, direction)
    slope = (embed_mean(up, tokens, encoder.family) - embed_mean(down, tokens, encoder.family)) / (2 * eps)
    expected = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    np.testing.assert_allclose(slope, expected, rtol=0.05)


def test_usable_under_a_callers_vmap(encoder, tokens):
    stacked = jax.tree.map(lambda ids: jnp.stack([ids, ids[::-1]]), tokens)
    out = jax.vmap(lambda t: embed(encoder, t).prompt_embeds)(stacked)
    np.testing.assert_allclose(out[0], embed(encoder, tokens).prompt_embeds, atol=1e-5)
    np.testing.assert_allclose(out[1, :2], out[0, 1::-1], atol=1e-5)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip_norms_an_earlier_layer_of_the_prompts_only(encoder, tokens, skip):
    out = embed(encoder, tokens, clip_skip=skip)
    (tower,) = encoder.family.towers
    model = ClipTextModel(tower.config).bind({"params": encoder.params[TOWER]})
    hidden = model(jnp.asarray(tokens.cond[TOWER])).hidden_states[-1 - skip]
    np.testing.assert_allclose(out.cond.prompt_embeds, model.final_norm(hidden), atol=1e-5)
    np.testing.assert_allclose(out.uncond.prompt_embeds, embed(encoder, tokens).uncond.prompt_embeds, atol=1e-5)


def test_clip_skip_negative_is_the_same_for_the_negatives(encoder, tokens):
    swapped = Tokens(cond=tokens.uncond, uncond=tokens.cond)
    out = embed(encoder, tokens, clip_skip_negative=2)
    mirrored = embed(encoder, swapped, clip_skip=2)
    np.testing.assert_allclose(out.uncond.prompt_embeds, mirrored.cond.prompt_embeds, atol=1e-5)
    np.testing.assert_allclose(out.cond.prompt_embeds, mirrored.uncond.prompt_embeds, atol=1e-5)


@pytest.mark.parametrize("skip", [-1, 4, 1.0, True])
def test_clip_skip_out_of_range_is_refused(encoder, tokens, skip):
    with pytest.raises(ClipJaxError, match="clip_skip must be an int from 0 to 3 for clip_l, found"):
        embed(encoder, tokens, clip_skip=skip)


def test_unused_layers_cost_nothing(encoder, tokens):
    def flops(**kwargs):
        lowered = text_embeddings.lower(encoder.params, tokens, family=encoder.family, **kwargs)
        return lowered.compile().cost_analysis()["flops"]

    assert flops(clip_skip=1, clip_skip_negative=1) < 0.75 * flops()
    assert flops(clip_skip=1) == pytest.approx(flops(), rel=0.01)


def test_params_of_another_family_are_refused(encoder, tokens):
    sd21 = clip_jax.FAMILIES["sd21"]
    with pytest.raises(ClipJaxError, match="'sd21' has the towers clip_h; params has clip_l"):
        text_embeddings(encoder.params, tokens, family=sd21)
    with pytest.raises(ClipJaxError, match="tokens.uncond has none"):
        embed(encoder, Tokens(cond=tokens.cond, uncond={}))


def test_params_that_do_not_fit_are_refused(encoder, tokens):
    def changed(path, change):
        leaves = flatten(encoder.params[TOWER])
        return {TOWER: unflatten({**leaves, path: change(leaves.pop(path))})}

    table, bias = "text_model/embeddings/token_embedding/embedding", "text_model/encoder/layers/2/mlp/fc1/bias"
    longer = changed(table, lambda leaf: jnp.concatenate([leaf, leaf[:1]]))
    message = rf"params\['clip_l'\] does not match its architecture. wrong shape \(1\): {table} has shape"
    with pytest.raises(ClipJaxError, match=message):
        text_embeddings(longer, tokens, family=encoder.family)
    whole = flatten(encoder.params[TOWER])
    for left in ({}, unflatten({path: leaf for path, leaf in whole.items() if path != bias})):
        with pytest.raises(ClipJaxError, match=r"params\['clip_l'\] does not match its architecture. missing"):
            text_embeddings({TOWER: left}, tokens, family=encoder.family)
    beside = {TOWER: {**encoder.params[TOWER], "lora": jnp.ones(3)}}
    found = text_embeddings(beside, tokens, family=encoder.family).prompt_embeds
    np.testing.assert_array_equal(found, embed(encoder, tokens).prompt_embeds)


def test_params_may_be_of_other_mappings_and_have_others_beside(encoder, tokens):
    wanted = embed(encoder, tokens).prompt_embeds
    for params in (flax.core.freeze(encoder.params), {TOWER: {**encoder.params[TOWER], "lora": {0: jnp.ones(3)}}}):
        found = text_embeddings(params, tokens, family=encoder.family).prompt_embeds
        np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ClipJaxError, match="does not match its architecture. missing"):
        text_embeddings({TOWER: jnp.ones(3)}, tokens, family=encoder.family)


@pytest.mark.slow
def test_interceptors_may_put_other_params_in_the_place_of_ours(encoder, tokens):
    name, fc1 = "fc1", flatten(encoder.params[TOWER])["text_model/encoder/layers/2/mlp/fc1/kernel"]
    leaves = {**flatten(encoder.params[TOWER]), "text_model/encoder/layers/2/mlp/fc1/kernel": 2 * fc1[None]}

    def first(call, args, kwargs, context):
        if context.module.path[-4:] != ("layers", "2", "mlp", name) or context.method_name != "__call__":
            return call(*args, **kwargs)
        params = context.module.variables["params"]
        return args[0] @ params["kernel"][0] + params["bias"]

    with nn.intercept_methods(first):
        mine = clip_jax.TextEncoder(encoder.family, {TOWER: unflatten(leaves)}, encoder.tokenizers)
        found = mine.encode(tokens).prompt_embeds
    leaves["text_model/encoder/layers/2/mlp/fc1/kernel"] = 2 * fc1
    wanted = text_embeddings({TOWER: unflatten(leaves)}, tokens, family=encoder.family).prompt_embeds
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda family, tokens: {"family": "sd15", "tokens": tokens}, "Expected a family, such as .*, found 'sd15'"),
        (lambda family, tokens: {"family": family, "tokens": tokens.cond}, "Expected Tokens, .* found dict"),
        (
            lambda family, tokens: {"family": family, "tokens": Tokens(cond=tokens.cond[TOWER])},
            "Expected tokens.cond as a dict, of clip_l, found ",
        ),
        (
            lambda family, tokens: {"family": family, "tokens": tokens, "dtype": "bf16"},
            "must be floating point, found 'bf16'",
        ),
    ],
)
def test_other_arguments_are_refused(encoder, tokens, change, message):
    with pytest.raises(ClipJaxError, match=message):
        text_embeddings(encoder.params, **change(encoder.family, tokens))


@pytest.mark.parametrize("wrong", ["a cat", np.zeros((1, 77), np.int32)])
def test_what_is_no_tokens_is_refused(encoder, wrong):
    with pytest.raises(
        ClipJaxError, match=f"Expected Tokens, as of TextEncoder.tokenize, found {type(wrong).__name__}"
    ):
        encoder.encode(wrong)


def test_ids_of_different_shapes_are_refused(encoder, tokens):
    short = Tokens(cond=tokens.cond, uncond={TOWER: tokens.uncond[TOWER][:1]})
    with pytest.raises(ClipJaxError, match=r"one shape .* found \(1, 77\) and \(2, 77\)"):
        embed(encoder, short)


def test_functions_of_them_are_exported(encoder, tokens):
    """And read back, with what is static in them."""

    def encode(params, tokens):
        return text_embeddings(params, tokens, family=encoder.family)

    for given in (tokens, Tokens(cond=tokens.cond, zero_uncond=True), Tokens(cond=tokens.cond)):
        written = jax.export.export(jax.jit(encode))(encoder.params, given).serialize()
        found, wanted = jax.export.deserialize(written).call(encoder.params, given), encode(encoder.params, given)
        assert found.guidance == wanted.guidance
        np.testing.assert_allclose(found.prompt_embeds, wanted.prompt_embeds, atol=1e-5)


def test_what_was_exported_is_read_by_another_process(encoder, tokens, tmp_path):
    """Which imports the package, more than once."""

    def half(embeddings):
        return embeddings.cond.prompt_embeds

    out = embed(encoder, tokens)
    (tmp_path / "half").write_bytes(jax.export.export(jax.jit(half))(out).serialize())
    np.save(tmp_path / "rows.npy", out.prompt_embeds)
    code = """
import importlib, sys, numpy as np, clip_jax.structs
from jax import export
half = export.deserialize(bytearray(open("half", "rb").read()))
rows = np.load("rows.npy")
np.testing.assert_array_equal(half.call(clip_jax.TextEmbeddings(prompt_embeds=rows)), rows[2:])
importlib.reload(clip_jax.structs)
for name in [name for name in sys.modules if name.startswith("clip_jax")]:
    del sys.modules[name]
from clip_jax import Tokens
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_embeddings_are_a_pytree():
    whole = TextEmbeddings(
        prompt_embeds=jnp.arange(8.0).reshape(4, 1, 2), pooled_prompt_embeds=jnp.arange(4.0)[:, None]
    )
    doubled = jax.tree.map(lambda x: 2 * x, whole)
    np.testing.assert_array_equal(doubled.uncond.pooled_prompt_embeds, [[0], [2]])
    np.testing.assert_array_equal(doubled.cond.prompt_embeds, [[[8, 10]], [[12, 14]]])
    assert jax.jit(lambda e: e.cond)(whole).guidance is False


def test_halves_of_mapped_embeddings_are_those_of_each():
    whole = TextEmbeddings(
        prompt_embeds=jnp.arange(24.0).reshape(3, 4, 1, 2), pooled_prompt_embeds=jnp.arange(12.0).reshape(3, 4, 1)
    )
    for half in ("cond", "uncond"):
        each = jax.vmap(lambda e, half=half: getattr(e, half))(whole)
        jax.tree.map(np.testing.assert_array_equal, getattr(whole, half), each)
    assert whole.cond.prompt_embeds.shape == (3, 2, 1, 2)


def test_params_may_be_boxed_with_their_axes(encoder, tokens):
    """As `init` makes them; of which `compute_dtype` is told, too."""
    boxed = jax.tree.map(lambda leaf: nn.LogicallyPartitioned(leaf, (None,) * leaf.ndim), encoder.params)
    found = text_embeddings(boxed, tokens, family=encoder.family)
    np.testing.assert_allclose(found.prompt_embeds, embed(encoder, tokens).prompt_embeds, atol=1e-5)
