"""Attention by cuDNN: what is asked of it, where it is asked, and that all others compute as ever. No GPU runs here."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

import clip_jax
from bench.kernels import pretended_cudnn
from clip_jax import FAMILIES, ClipJaxError, ClipTextModel, text_embeddings
from clip_jax.models import check_attention, functional
from tests.checkpoints import TINY, write_family

_CHECK_CUDNN_VERSION = fused_attention_stablehlo.check_cudnn_version


@pytest.fixture(scope="module")
def cudnn():
    """JAX believes that there is a GPU with cuDNN; programs can be lowered for it, and not run on it.

    For the rest of the module: what is traced meanwhile has to be forgotten, and is traced once for all tests.
    """
    with pretended_cudnn():
        yield
    jax.clear_caches()


@pytest.fixture
def on_cuda(monkeypatch):
    """The branch for CUDA is run here, with the kernel that JAX's function has for XLA."""
    fused = jax.nn.dot_product_attention

    def by_xla(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return fused(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, cuda, default: cuda(*arrays))


@pytest.fixture(scope="module", params=["sd15", pytest.param("flux", marks=pytest.mark.slow)])
def folder(request, tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("family") / request.param, FAMILIES[request.param])


def load(folder, **options):
    return clip_jax.load(folder, family=folder.name, dtype="bfloat16", **options)


def heads(*seeds):
    return [2 * jax.random.normal(jax.random.key(seed), (3, 9, 4, 8)) for seed in seeds]


def lowered(encoder, tokens, platform, attention="cudnn"):
    traced = text_embeddings.trace(
        encoder.params, tokens, family=encoder.family, compute_dtype=jnp.bfloat16, attention=attention
    )
    return traced.lower(lowering_platforms=(platform,)).as_text()


def asked(text):
    """Name, mask and scale of the calls of cuDNN in a lowered program."""
    found = set()
    for name, config in re.findall(r"custom_call @__cudnn\$(\w+)\(.*?backend_config = \"(.*?)\"[,}]", text):
        options = json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"]
        found.add((name, options["mask_type"], round(options["fmha_scale"], 6)))
    return found


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is one")
def test_no_cudnn_is_told_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", _CHECK_CUDNN_VERSION)
    with pytest.raises(ClipJaxError, match="cuDNN is not detected"):
        clip_jax.load(tmp_path / "absent", dtype="bfloat16", attention="cudnn")


def test_causal_attention_is_what_cudnn_is_asked_for(on_cuda):
    query, key, value = heads(0, 1, 2)
    wanted, _ = functional.attention(query, key, value, functional.causal_mask(9, None))
    np.testing.assert_allclose(functional.cudnn_attention(query, key, value), wanted, atol=1e-6)
    everywhere, _ = functional.attention(query, key, value, jnp.ones((1, 1, 9, 9), bool))
    assert not np.allclose(everywhere, wanted, atol=1e-1)


def test_biased_attention_is_what_cudnn_is_asked_for(on_cuda):
    query, key, value = heads(0, 1, 2)
    bias = 3 * jax.random.normal(jax.random.key(3), (1, 4, 9, 9))
    wanted, _ = functional.biased_attention(query, key, value, bias, None)
    np.testing.assert_allclose(functional.cudnn_biased_attention(query, key, value, bias), wanted, atol=1e-6)
    scaled, _ = functional.biased_attention(query * 8**-0.5, key, value, bias, None)
    assert not np.allclose(scaled, wanted, atol=1e-1)


def test_cuda_gets_cudnn_and_others_do_not(cudnn, folder):
    encoder = load(folder, attention="cudnn")
    tokens = encoder.tokenize(["a cat", "two dogs", "rain"], "blurry")
    causal, biased = ("fmhaSoftmax", "CAUSAL", round(8**-0.5, 6)), ("fmhaScaleBiasSoftmax", "NO_MASK", 1.0)
    assert asked(lowered(encoder, tokens, "cuda")) == ({causal, biased} if encoder.family.name == "flux" else {causal})
    assert not asked(lowered(encoder, tokens, "cuda", attention="xla"))
    assert not asked(lowered(encoder, tokens, "cpu"))
    assert not asked(lowered(encoder, tokens, "tpu"))


@pytest.mark.slow
def test_elsewhere_results_are_the_same(cudnn, folder):
    """Params may be moved to a CPU; and a program with cuDNN in it has the other computation for that."""
    prompts = ["a cat", "two dogs in the rain", "a lighthouse"]
    found, wanted = load(folder, attention="cudnn")(prompts, "blurry"), load(folder)(prompts, "blurry")
    np.testing.assert_array_equal(found.prompt_embeds, wanted.prompt_embeds)


def test_a_mask_of_tokens_is_not_for_cudnn(cudnn):
    model = ClipTextModel(TINY, jnp.bfloat16, attention="cudnn")
    ids = jnp.ones((1, 5), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)

    def calls(*arguments):
        text = jax.jit(model.apply).trace(params, ids, *arguments).lower(lowering_platforms=("cuda",)).as_text()
        return len(asked(text))

    assert (calls(), calls(jnp.ones((1, 5)))) == (1, 0)


@pytest.mark.slow
def test_weights_of_attention_are_still_to_be_had(cudnn):
    ids = jnp.arange(5)[None]
    plain, fused = (ClipTextModel(TINY, jnp.bfloat16, attention=attention) for attention in ("xla", "cudnn"))
    params = jax.jit(plain.init)(jax.random.key(0), ids)
    found, wanted = (jax.jit(model.apply)(params, ids).attentions for model in (fused, plain))
    assert len(found) == TINY.num_hidden_layers
    np.testing.assert_array_equal(found, wanted)


def test_the_cache_knows_of_it(cudnn, tiny_sd15):
    encoder = clip_jax.load(tiny_sd15, family="sd15", dtype="bfloat16")
    first = encoder("a cat").prompt_embeds
    assert encoder("a cat").prompt_embeds is first
    encoder.attention = "cudnn"
    assert encoder("a cat").prompt_embeds is not first


def test_nnx_takes_it_from_the_encoder(cudnn, tiny_sd15):
    encoder = clip_jax.load(tiny_sd15, family="sd15", dtype="bfloat16", attention="cudnn")
    module = clip_jax.nnx.TextEncoder(encoder)
    traced = jax.jit(lambda module, tokens: module(tokens)).trace(module, encoder.tokenize("a cat"))
    assert asked(traced.lower(lowering_platforms=("cuda",)).as_text())


def test_float32_is_refused(cudnn, tiny_sd15):
    with pytest.raises(ClipJaxError, match=r"attention='cudnn' is for bfloat16 and float16.*Leave it out"):
        clip_jax.load(tiny_sd15, family="sd15", attention="cudnn")
    check_attention("cudnn", jnp.bfloat16)


def test_another_name_is_refused(encoder):
    with pytest.raises(ClipJaxError, match="attention must be 'xla' or 'cudnn', found 'flash'"):
        text_embeddings(encoder.params, encoder.tokenize("a cat"), family=encoder.family, attention="flash")
