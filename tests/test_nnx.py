"""The NNX module: the same arrays, through jit, split and grad."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import clip_jax


@pytest.fixture(scope="module")
def module(encoder):
    return clip_jax.nnx.TextEncoder(encoder)


def test_it_holds_the_same_arrays_as_nnx_params(module, encoder):
    assert all(isinstance(leaf, nnx.Param) for leaf in jax.tree.leaves(module.params, is_leaf=nnx_variable))
    ours, theirs = jax.tree.leaves_with_path(encoder.params), jax.tree.leaves_with_path(module.plain_params())
    assert [(path, id(leaf)) for path, leaf in ours] == [(path, id(leaf)) for path, leaf in theirs]


def nnx_variable(node):
    return isinstance(node, nnx.Variable)


def test_it_goes_through_jit_and_computes_the_same(module, encoder):
    tokens = encoder.tokenize("a cat", negative_prompt="blurry")
    found = jax.jit(lambda module, tokens: module(tokens, clip_skip=1))(module, tokens)
    wanted = encoder("a cat", negative_prompt="blurry", clip_skip=1)
    np.testing.assert_allclose(found.prompt_embeds, wanted.prompt_embeds, atol=1e-5)


@pytest.mark.parametrize("before", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_lora_is_neither_lost_nor_kept(encoder, before):
    """Whether the program was traced without it before, or is to be traced without it afterwards."""
    module, tokens = clip_jax.nnx.TextEncoder(encoder), encoder.tokenize("a cat")
    tokens = tokens if before else jax.tree.map(lambda ids: ids[:, :9], tokens)  # of a length that has no program yet
    plain = module(tokens).prompt_embeds if before else None

    def doubled(call, args, kwargs, context):
        out = call(*args, **kwargs)
        return out * 2 if isinstance(context.module, nn.Dense) else out

    with nn.intercept_methods(doubled):
        changed = module(tokens).prompt_embeds
        if not before:
            with pytest.raises(clip_jax.ClipJaxError, match="jitted, and takes no notice of nn.intercept_methods"):
                clip_jax.text_embeddings(encoder.params, tokens, family=encoder.family)
    after = module(tokens).prompt_embeds
    assert np.abs(changed - after).max() > 0.1
    np.testing.assert_allclose(
        clip_jax.text_embeddings(encoder.params, tokens, family=encoder.family).prompt_embeds, after
    )
    if before:
        np.testing.assert_array_equal(after, plain)


def test_it_is_split_and_merged(module, encoder):
    tokens = encoder.tokenize("a cat")
    graphdef, state = nnx.split(module)
    run = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens).prompt_embeds)
    np.testing.assert_allclose(run(state, tokens), module(tokens).prompt_embeds, atol=1e-5)
    pure = nnx.to_pure_dict(state)["params"]
    assert jax.tree.structure(pure) == jax.tree.structure(encoder.params)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, state)
    assert np.abs(run(doubled, tokens) - run(state, tokens)).max() > 0.1


@pytest.mark.slow
def test_it_is_differentiated(module, encoder):
    tokens = encoder.tokenize("a cat")
    gradients = nnx.grad(lambda module: jnp.square(module(tokens).prompt_embeds).mean())(module)
    wanted = jax.grad(
        lambda params: jnp.square(clip_jax.text_embeddings(params, tokens, family=encoder.family).prompt_embeds).mean()
    )(encoder.params)
    for found, leaf in zip(
        jax.tree.leaves(nnx.to_pure_dict(nnx.state(gradients))), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(found, leaf, atol=1e-6)
