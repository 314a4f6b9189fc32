"""Quantised params: what is quantised, how exact that is, what it weighs, and that nothing else changes."""

import functools
import json
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwix

import clip_jax
from clip_jax import FAMILIES, CheckpointError, ClipJaxError, ClipTextConfig
from clip_jax.convert import convert, export
from clip_jax.models.quantized import Dense, DenseOfActivation, _quantized_product
from clip_jax.params import checkpoint as ckpt
from clip_jax.params.quantize import SCHEMES, join, scheme_called, scheme_of, split
from clip_jax.params.shapes import TensorSpec, flatten, param_shapes, unflatten
from tests.checkpoints import TINY, TINY_T5, write_family
from tests.test_imports import imported

# Relative norm of the error of the embeddings: 0.0126, 0.0374 and 0.156 for the small CLIP, and up to 1.3 times that
# for FLUX's two.
BOUNDS = {"int8": 0.014, "fp8": 0.04, "int4": 0.165}
SIZES = {"int8": 125e6, "fp8": 125e6, "int4": 80e6}
DTYPES = {"int8": ("int8", "float32"), "fp8": ("float8_e4m3fn", "float32"), "int4": ("int4", "bfloat16")}
FC1 = "text_model/encoder/layers/1/mlp/fc1/kernel"
TOKENS = "text_model/embeddings/token_embedding/embedding"


@pytest.fixture(
    scope="module", params=["int8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp8", "int4"))]
)
def quantize(request):
    return request.param


@pytest.fixture(scope="module")
def quantized(tiny_sd15, quantize):
    return clip_jax.load(tiny_sd15, family="sd15", quantize=quantize)


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "model"
    quantized.save(path)
    return path


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("flux") / "flux", FAMILIES["flux"])


def parts_of(encoder):
    return {(tower, p): leaf for tower, tree in encoder.params.items() for p, leaf in split(flatten(tree)).items()}


def assert_same(found, expected):
    assert jax.tree.structure(found.params) == jax.tree.structure(expected.params)
    found, expected = parts_of(found), parts_of(expected)
    for key, leaf in expected.items():
        assert found[key].dtype == leaf.dtype
        np.testing.assert_array_equal(found[key], leaf)


def error(encoder, params, expected):
    """Relative norm of the error of what `params` compute."""
    tokens = encoder.tokenize(["a cat", "two dogs in the rain"], negative_prompt="blurry")
    found = clip_jax.text_embeddings(params, tokens, family=encoder.family).prompt_embeds
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


@pytest.fixture(scope="module")
def expected(encoder):
    return encoder(["a cat", "two dogs in the rain"], negative_prompt="blurry").prompt_embeds


# What is quantised


@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("config", [TINY, TINY_T5], ids=["clip", "t5"])
def test_kernels_and_the_token_embedding_are_quantised(config, name):
    shapes = param_shapes(config)
    rest = {"bias", "scale", "weight", "position_embedding/embedding", "relative_attention_bias/embedding"}
    for path in shapes:
        assert SCHEMES[name].takes(path) != any(path.endswith(f"/{end}") for end in rest), path
    stored = SCHEMES[name].stored_shapes(shapes)
    assert len(stored) - len(shapes) == sum(map(SCHEMES[name].takes, shapes))


def test_leaves_are_qarrays_with_a_scale_for_each_output(quantized, quantize):
    leaves = flatten(quantized.params["clip_l"])
    qtype, scale_dtype = DTYPES[quantize]
    for path, shape, int8_scale, int4_scale in (
        (FC1, (32, 64), (1, 64), (1, 64)),
        (FC1.replace("fc1", "fc2"), (64, 32), (1, 32), (2, 32)),
        (TOKENS, (49408, 32), (49408, 1), (49408, 1)),
    ):
        leaf = leaves[path]
        assert (leaf.qvalue.shape, leaf.qvalue.dtype.name, leaf.scale.dtype.name) == (shape, qtype, scale_dtype)
        assert leaf.scale.shape == (int4_scale if quantize == "int4" else int8_scale)
        assert leaf.shape == shape
    assert {leaf.dtype.name for path, leaf in leaves.items() if not SCHEMES[quantize].takes(path)} == {"float32"}


def test_a_width_that_no_tile_divides_has_smaller_tiles():
    stored = SCHEMES["int4"].stored_shapes({"a/kernel": (40, 6), "shared/embedding": (10, 104)})
    assert stored["a/kernel/scale"] == (5, 6)
    assert stored["shared/embedding/scale"] == (10, 13)


def test_rows_of_zeros_stay_zeros():
    for scheme in SCHEMES.values():
        leaf = scheme.quantize("a/kernel", np.zeros((32, 4), np.float32))
        assert not np.asarray(leaf.qvalue).any()
        assert np.isfinite(np.asarray(leaf.scale, np.float32)).all()


def test_the_source_is_rounded_once_and_scales_are_never_cast(tiny_sd15, quantized, quantize):
    for dtype in ("bfloat16", "float16"):
        low = clip_jax.load(tiny_sd15, family="sd15", dtype=dtype, quantize=quantize)
        for key, leaf in parts_of(quantized).items():
            if key[1].endswith(("kernel/qvalue", "kernel/scale", "embedding/qvalue", "embedding/scale")):
                np.testing.assert_array_equal(parts_of(low)[key], leaf)
            else:
                assert parts_of(low)[key].dtype == dtype


def test_split_and_join():
    leaves = {"a/kernel": SCHEMES["int8"].quantize("a/kernel", np.eye(4, dtype=np.float32)), "n/scale": np.ones(3)}
    parts = split(leaves)
    assert list(parts) == ["a/kernel/qvalue", "a/kernel/scale", "n/scale"]
    assert jax.tree.structure(join(parts)) == jax.tree.structure(leaves)


# What is computed


def test_the_error_is_small(encoder, quantized, quantize, expected):
    assert 0 < error(encoder, quantized.params, expected) < BOUNDS[quantize]


@pytest.mark.parametrize("path", [FC1, TOKENS])
def test_a_scale_at_the_wrong_channel_is_seen(encoder, quantized, quantize, expected, path):
    leaves = flatten(quantized.params["clip_l"])
    axis = 0 if path == TOKENS else 1
    leaves[path] = leaves[path].replace(scale=jnp.roll(leaves[path].scale, 1, axis))
    assert error(encoder, {"clip_l": unflatten(leaves)}, expected) > BOUNDS[quantize]


@pytest.mark.parametrize("layer", [Dense, DenseOfActivation])
def test_rows_do_not_depend_on_the_others(quantized, layer):
    """One scale for all tokens would not do: a row is the same, however large the others are."""
    leaf = flatten(quantized.params["clip_l"])[FC1]
    x = jax.random.normal(jax.random.key(0), (2, 3, 32))
    variables = {"params": {"kernel": leaf, "bias": jnp.zeros(64)}}
    alone, beside = (layer(64).apply(variables, rows)[0, 0] for rows in (x, x.at[1].mul(1e4).at[0, 1:].mul(1e4)))
    np.testing.assert_allclose(alone, beside, rtol=1e-6)


@pytest.mark.slow
def test_what_an_activation_returns_has_a_zero_point():
    keys = jax.random.split(jax.random.key(0))
    x = jax.nn.gelu(jax.random.normal(keys[0], (2, 7, 512))).at[0, 0].set(0)
    kernel = jax.random.normal(keys[1], (512, 16))
    exact, int8 = ({"params": {"kernel": k}} for k in (kernel, qwix.quantize(kernel, jnp.int8, channelwise_axes=[1])))
    wanted = nn.Dense(16, use_bias=False).apply(exact, x)
    np.testing.assert_array_equal(DenseOfActivation(16, use_bias=False).apply(exact, x), wanted)

    def error(layer):
        found = layer(16, use_bias=False).apply(int8, x)
        np.testing.assert_array_equal(found[0, 0], 0)
        assert found.shape == wanted.shape
        return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))

    assert error(DenseOfActivation) < 0.011
    assert error(Dense) > 0.012  # with a scale alone


@pytest.mark.slow
def test_t5_and_pooled_outputs(flux, quantize):
    whole, low = (clip_jax.load(flux, quantize=name)("a cat", max_sequence_length=32) for name in (None, quantize))
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        found, wanted = getattr(low, name), getattr(whole, name)
        assert 0 < jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted) < 1.5 * BOUNDS[quantize]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_as_exact_as_the_scheme(tiny_sd15, encoder, quantize, expected, dtype):
    low = clip_jax.load(tiny_sd15, family="sd15", dtype=dtype, quantize=quantize)
    out = low(["a cat", "two dogs in the rain"], negative_prompt="blurry").prompt_embeds
    assert out.dtype == dtype
    found = jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert found < 1.5 * BOUNDS[quantize]
    tokens = low.tokenize("a cat")
    assert clip_jax.text_embeddings(low.params, tokens, family=low.family).prompt_embeds.dtype == dtype


def test_it_is_one_program_in_int8(quantized, quantize):
    tokens = quantized.tokenize("a cat", negative_prompt="blurry")
    lowered = clip_jax.text_embeddings.lower(quantized.params, tokens, family=quantized.family)
    products = re.findall(r"dot_general.*\(tensor<\S*xi8>, tensor<\S*xi8>\) -> tensor<\S*xi32>", lowered.as_text())
    assert len(products) == (6 if quantize == "int8" else 0)  # the kernels of a block, which stands for all three
    quantized.encode(tokens)
    before = clip_jax.text_embeddings._cache_size()
    quantized("another prompt", negative_prompt="")
    assert clip_jax.text_embeddings._cache_size() == before


def test_products_are_in_fp8_for_cuda_alone(quantized, quantize):
    tokens = quantized.tokenize("a cat", negative_prompt="blurry")
    fp8 = r"dot_general.*\(tensor<\S*xf8E4M3FN>, tensor<\S*xf8E4M3FN>\) -> tensor<\S*xf32>"
    for platform, count in (("cuda", 6 if quantize == "fp8" else 0), ("cpu", 0), ("tpu", 0)):
        traced = clip_jax.text_embeddings.trace(quantized.params, tokens, family=quantized.family)
        lowered = traced.lower(lowering_platforms=(platform,)).as_text()
        assert len(re.findall(fp8, lowered)) == count, platform


def test_what_cuda_computes_in_fp8():
    """The branch for CUDA, on a CPU, which widens fp8 before it multiplies: the same numbers."""
    keys = jax.random.split(jax.random.key(0))
    x, kernel = jax.random.normal(keys[0], (2, 7, 512)), jax.random.normal(keys[1], (512, 16))
    leaf = SCHEMES["fp8"].quantize("a/kernel", kernel)
    dimensions = (((2,), (0,)), ((), ()))
    found = _quantized_product(x, leaf, dimensions)
    wanted = jax.lax.dot_general(x, kernel, dimensions)
    assert 0.02 < jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted) < 0.05
    rounded = qwix.dequantize(qwix.quantize(x, jnp.float8_e4m3fn, channelwise_axes=(0, 1)))
    np.testing.assert_allclose(found, jax.lax.dot_general(rounded, qwix.dequantize(leaf), dimensions), atol=1e-4)
    beside = _quantized_product(x.at[1].mul(1e4), leaf, dimensions)
    np.testing.assert_allclose(found[0], beside[0], rtol=1e-6)


def test_int4_kernels_are_dequantised_one_after_the_other(quantized, quantize):
    tokens = quantized.tokenize("a cat")
    text = clip_jax.text_embeddings.lower(quantized.params, tokens, family=quantized.family).as_text()
    assert text.count("optimization_barrier") == (0 if quantize == "int8" else 6)


def test_in_a_jit_of_the_users_own_and_as_an_nnx_module(quantized):
    tokens = quantized.tokenize("a cat", negative_prompt="blurry")
    wanted = quantized.encode(tokens).prompt_embeds
    run = jax.jit(lambda p, t: clip_jax.text_embeddings(p, t, family=quantized.family).prompt_embeds)
    np.testing.assert_allclose(run(quantized.params, tokens), wanted, atol=1e-5)
    module = clip_jax.nnx.TextEncoder(quantized)
    np.testing.assert_allclose(module(tokens).prompt_embeds, wanted, atol=1e-5)


@pytest.mark.slow
def test_interceptors_see_every_layer_once(quantized, encoder):
    calls = []

    def interceptor(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense | nn.Embed) and context.method_name == "__call__":
            calls.append(context.module.path)
        return call(*args, **kwargs)

    seen = []
    for each in (encoder, quantized):
        with nn.intercept_methods(interceptor):
            each("a cat", guidance=False)
        seen.append(calls.copy())
        calls.clear()
    assert seen[0] == seen[1]
    assert sum(path[-1] == "token_embedding" for path in seen[0]) == 1


# What is saved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_exact(tiny_sd15, quantize, tmp_path, dtype):
    encoder = clip_jax.load(tiny_sd15, family="sd15", dtype=dtype, quantize=quantize)
    encoder.save(tmp_path / "model")
    for again in (None, quantize):
        loaded = clip_jax.load(tmp_path / "model", dtype=dtype, quantize=again)
        assert_same(loaded, encoder)
        np.testing.assert_array_equal(loaded("a cat").prompt_embeds, encoder("a cat").prompt_embeds)


def test_what_is_not_quantised_is_cast_when_it_is_read(tiny_sd15, saved, quantize):
    assert_same(
        clip_jax.load(saved, dtype="bfloat16"),
        clip_jax.load(tiny_sd15, family="sd15", dtype="bfloat16", quantize=quantize),
    )


def test_a_plain_checkpoint_is_quantised_when_it_is_read(encoder, quantized, quantize, tmp_path, monkeypatch):
    encoder.save(tmp_path / "plain")
    monkeypatch.setattr(ckpt, "_READ_BYTES", 10_000)
    assert_same(clip_jax.load(tmp_path / "plain", quantize=quantize), quantized)


def test_random_weights_are_quantised_as_they_are_drawn(encoder, quantize, monkeypatch):
    monkeypatch.setitem(FAMILIES, "sd15", encoder.family)
    with pytest.warns(UserWarning, match="random weights"):
        low, whole = (clip_jax.load("random:sd15", quantize=name) for name in (quantize, None))
    assert scheme_of(low.params).name == quantize
    leaf = flatten(low.params["clip_l"])[FC1]
    wanted = flatten(whole.params["clip_l"])[FC1]
    step = np.asarray(leaf.scale, np.float32).max() * (32 if quantize == "fp8" else 1)  # below 448 fp8 counts by 32
    found = np.asarray(leaf.qvalue, np.float32) * np.repeat(np.asarray(leaf.scale, np.float32), 32, axis=0)[:32]
    assert np.abs(found - wanted).max() < 0.51 * step


def test_convert_writes_what_load_makes(tiny_sd15, quantized, quantize, tmp_path):
    out = convert(tiny_sd15, tmp_path / "out", family="sd15", quantize=quantize)
    assert_same(clip_jax.load(out), quantized)
    assert ckpt.read_metadata(out).scheme.name == quantize


def test_the_metadata_and_info_say_so(saved, quantized, quantize):
    stored = json.loads((saved / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert (stored["quantize"], stored["format_version"]) == (quantize, 2)
    info = clip_jax.info(saved)
    assert info.quantize == quantize
    tower = info.towers["clip_l"]
    assert tower.dtypes == tuple(sorted({*DTYPES[quantize], "float32"}))
    assert tower.parameters == sum(map(math.prod, param_shapes(TINY).values()))
    specs = [TensorSpec(leaf.shape, np.dtype(leaf.dtype)) for leaf in parts_of(quantized).values()]
    assert tower.nbytes == sum(spec.nbytes for spec in specs)
    qtype, bits = DTYPES[quantize][0], 4 if quantize == "int4" else 8
    taken = [shape for path, shape in param_shapes(TINY).items() if SCHEMES[quantize].takes(path)]
    assert sum(spec.nbytes for spec in specs if spec.dtype.name == qtype) == sum(map(math.prod, taken)) * bits // 8


def test_what_is_not_quantised_stays_readable_by_older_versions(encoder, tmp_path):
    encoder.save(tmp_path / "plain")
    stored = json.loads((tmp_path / "plain" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert (stored["quantize"], stored["format_version"]) == (None, 1)
    assert clip_jax.info(tmp_path / "plain").quantize is None


def test_on_disk_it_takes_a_byte_or_about_half_of_one(saved, quantized):
    files = sum(path.stat().st_size for path in (saved / "state").rglob("*") if path.is_file())
    whole = sum(TensorSpec(leaf.shape, np.dtype(leaf.dtype)).nbytes for leaf in parts_of(quantized).values())
    assert files < 1.2 * whole  # at full size int4 is less than the whole


@pytest.mark.parametrize(("name", "limit"), SIZES.items())
def test_sd15_at_full_size_stays_below_its_limit(name, limit):
    scheme, size = SCHEMES[name], 0
    for path, shape in scheme.stored_shapes(param_shapes(ClipTextConfig.sd15())).items():
        dtype = scheme.qtype if path.endswith("/qvalue") else np.dtype(np.float32)
        if path.endswith(("/kernel/scale", "/embedding/scale")):
            dtype = scheme.scale_dtype
        size += TensorSpec(shape, dtype).nbytes
    assert 0.5 * limit < size < limit


def test_an_int4_takes_half_a_byte():
    assert TensorSpec((3, 5), np.dtype(ml_dtypes.int4)).nbytes == 8
    assert TensorSpec((3, 5), np.dtype(np.int8)).nbytes == 15


# What is refused


@pytest.mark.parametrize("name", ["int2", "", "INT8", 8, jnp.int8])
def test_another_scheme_is_refused(tiny_sd15, name):
    with pytest.raises(ClipJaxError, match=r"quantize must be None, 'int8', 'fp8', 'int4', found "):
        clip_jax.load(tiny_sd15, family="sd15", quantize=name)


def test_what_is_quantised_is_not_quantised_again(saved, quantize):
    other = next(name for name in SCHEMES if name != quantize)
    message = f"is quantised to {quantize}; quantize='{other}' was asked for. Load it as it is, or quantise the"
    with pytest.raises(CheckpointError, match=message):
        clip_jax.load(saved, quantize=other)


def test_it_is_not_exported(saved, quantize, tmp_path):
    message = f"is quantised to {quantize}, for which transformers has no names; .*Export the checkpoint that it was"
    with pytest.raises(CheckpointError, match=message):
        export(saved, tmp_path / "hf")
    assert not any(tmp_path.iterdir())


def test_it_is_not_verified(tiny_sd15, quantize, tmp_path):
    with pytest.raises(ClipJaxError, match="Verify a conversion without quantize"):
        convert(tiny_sd15, tmp_path / "out", family="sd15", quantize=quantize, verify=True)
    assert not any(tmp_path.iterdir())


def test_params_that_are_quantised_in_part_are_not_saved(encoder, quantized, quantize, tmp_path):
    leaves = {**flatten(quantized.params["clip_l"]), FC1: flatten(encoder.params["clip_l"])[FC1]}
    mixed = clip_jax.TextEncoder(encoder.family, {"clip_l": unflatten(leaves)}, encoder.tokenizers)
    with pytest.raises(ClipJaxError, match=f"of one kind, found None, {DTYPES[quantize][0]}. Quantise all of them"):
        mixed.save(tmp_path / "mixed")
    mixed("a cat")  # each leaf says what is to be computed


def test_a_checkpoint_that_lacks_a_scale_is_refused(saved, quantize, tmp_path):
    configs, other = ckpt.read_metadata(saved).configs, scheme_called(None)
    with pytest.raises(CheckpointError, match=r"missing \(\d+\): text_model/embeddings/token_embedding/embedding,"):
        ckpt.read_specs(saved, configs, other)


# What it costs those who do without


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8"], indirect=True)
def test_without_quantised_params_qwix_is_not_imported(tiny_sd15, saved):
    work = f"import clip_jax, clip_jax.cli; clip_jax.load({str(tiny_sd15)!r}, family='sd15')('a cat')"
    assert imported(work, ("qwix",)) == set()
    assert imported(f"import clip_jax; clip_jax.info({str(saved)!r})", ("qwix",)) == set()
    assert imported(f"import clip_jax; clip_jax.load({str(saved)!r})", ("qwix",)) == {"qwix"}


# Gradients

# 0.99986, 0.9985 and 0.972.
COSINES = {"int8": 0.9995, "fp8": 0.997, "int4": 0.96}


def cosine(a, b):
    return float(jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))


def test_gradients_come_through_quantised_kernels(quantized, encoder, quantize):
    """By the positions, below all blocks: rounding has no derivative, and is passed over."""
    tokens = encoder.tokenize("a cat", negative_prompt="blurry")
    noise = jax.random.normal(jax.random.key(0), encoder.encode(tokens).prompt_embeds.shape)
    path = ("clip_l", "text_model", "embeddings", "position_embedding", "embedding")

    def gradient(params):
        leaf = functools.reduce(lambda tree, key: tree[key], path, params)

        def loss(leaf):
            changed = jax.tree_util.tree_map_with_path(
                lambda where, old: leaf if tuple(getattr(key, "key", None) for key in where) == path else old, params
            )
            out = clip_jax.text_embeddings(changed, tokens, family=encoder.family)
            return (out.prompt_embeds * noise).sum()

        return jax.jit(jax.grad(loss))(leaf)

    found, wanted = gradient(quantized.params), gradient(encoder.params)
    assert cosine(found, wanted) > COSINES[quantize]


def test_what_cuda_differentiates_in_fp8():
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, 7, 512)), jax.random.normal(keys[1], (512, 16))
    back = 1e-3 * jax.random.normal(keys[2], (2, 7, 16))
    leaf = SCHEMES["fp8"].quantize("a/kernel", kernel)
    dimensions = (((2,), (0,)), ((), ()))
    found = jax.vjp(lambda x: _quantized_product(x, leaf, dimensions), x)[1](back)[0]
    np.testing.assert_allclose(found, back @ qwix.dequantize(leaf).T, rtol=1e-5, atol=1e-6)
