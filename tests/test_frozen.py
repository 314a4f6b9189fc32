"""Frozen programs compute what the others do, with the kernels in them; and never with kernels that were exchanged."""

import dataclasses
import os
import platform
import subprocess
import sys
import threading

import flax.linen as nn
import jax
import numpy as np
import pytest

import clip_jax
from clip_jax import ClipJaxError, ClipTextConfig, frozen
from tests.checkpoints import write_family, write_pipeline

# As XLA has been seen to do it. A version that no longer does must not go unnoticed: `freeze` would be refused.
PACKS = jax.__version_info__ >= (0, 11) and platform.system() == "Linux" and platform.machine() == "x86_64"

# Wide enough for oneDNN: XLA leaves it no small products.
WIDE = ClipTextConfig(
    hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4, hidden_act="gelu"
)


@pytest.fixture(autouse=True)
def constants_at_least(monkeypatch):
    """Where XLA has no oneDNN, all but its products is tested: constants, and when they are used."""
    if not PACKS:
        monkeypatch.setattr(frozen, "_packs", lambda dtype: True)
        monkeypatch.setattr(frozen, "_OPTIONS", {})


@pytest.fixture(scope="module", params=["sdxl", pytest.param("flux", marks=pytest.mark.slow)])
def loaded(request, tmp_path_factory):
    folder = write_family(tmp_path_factory.mktemp("frozen") / request.param, clip_jax.FAMILIES[request.param])
    return clip_jax.load(folder, family=request.param, cache_bytes=0)


def another(encoder, **options):
    """An encoder of its own, with params that may be exchanged."""
    options = {"dtype": encoder.dtype, "cache_bytes": 0, **options}
    params = jax.tree.map(lambda leaf: leaf, encoder.params)
    return clip_jax.TextEncoder(encoder.family, params, encoder.tokenizers, **options)


def programs(encoder):
    return encoder._frozen.programs if encoder._frozen else ()


def same(found, wanted, atol):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def test_xla_packs_kernels_where_it_is_said_to(monkeypatch):
    monkeypatch.undo()
    assert frozen._packs.__wrapped__("float32") is PACKS


def test_it_computes_the_same_without_the_kernels_that_it_was_given(loaded, monkeypatch):
    encoder, options = another(loaded), {"max_sequence_length": 32} if "t5" in loaded.config else {}
    encoder.warmup((1, 2), freeze=True, **options)
    assert len(programs(encoder)) == 2
    monkeypatch.setattr(encoder, "_compute", None)  # nothing but the frozen programs is left
    for prompts in (["a cat"], ["a cat", "two dogs"]):
        same(encoder(prompts, **options), loaded(prompts, **options), atol=1e-5)


def test_products_are_packed(tmp_path):
    encoder = clip_jax.load(write_pipeline(tmp_path / "wide", WIDE), family="sd15", cache_bytes=0)
    wanted = encoder("a cat", negative_prompt="blurry")
    encoder.warmup(freeze=True)
    (program,) = programs(encoder)
    packed = program.func.as_text().count('"weights_prepacked":true')
    assert packed == (6 * WIDE.num_hidden_layers if PACKS else 0)
    same(encoder("a cat", negative_prompt="blurry"), wanted, atol=2e-5)


@pytest.mark.slow
def test_bfloat16_of_float32_params(encoder):
    mine = another(encoder, dtype="bfloat16")
    wanted = mine("a cat").cond.prompt_embeds
    mine.warmup(freeze=True)
    found = mine("a cat").cond.prompt_embeds
    assert found.dtype == wanted.dtype == "bfloat16"
    assert relative(found, wanted) < 0.02
    assert relative(mine("two dogs").cond.prompt_embeds, wanted) > 0.1  # the measure tells prompts apart


def relative(found, wanted):
    found, wanted = (np.asarray(array, np.float32) for array in (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_exchanged_params_are_computed_with(encoder):
    mine = another(encoder)
    mine.warmup(freeze=True)
    frozen_out = mine("a cat")
    kernel = mine.params["clip_l"]["text_model"]["encoder"]["layers"]["0"]["mlp"]["fc1"]
    kernel["kernel"] = kernel["kernel"] * 2
    found = mine("a cat")
    assert programs(mine) == ()
    same(found, another(mine)("a cat"), atol=1e-5)
    assert np.abs(found.prompt_embeds - frozen_out.prompt_embeds).max() > 0.1
    mine.warmup(freeze=True)  # freezes those anew, and lets go of the others
    assert len(programs(mine)) == 1
    same(mine("a cat"), found, atol=1e-5)


@pytest.mark.slow
def test_two_warmups_at_once_keep_what_both_have_made(encoder):
    mine = another(encoder)
    threads = [threading.Thread(target=mine.warmup, args=((n,),), kwargs={"freeze": True}) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(programs(mine)) == 2


def test_a_call_that_began_before_params_were_exchanged_leaves_the_new_programs(encoder):
    mine = another(encoder)
    old = mine.params
    mine.params = jax.tree.map(lambda leaf: 2 * leaf, old)
    mine.warmup(freeze=True)
    tokens = mine.tokenize("a cat")
    same(mine._run(old, mine.dtype, tokens, (None, None)), encoder("a cat"), 1e-6)
    assert len(programs(mine)) == 1


@pytest.mark.slow
def test_they_are_left_aside_where_jit_is(encoder):
    mine = another(encoder)
    mine.warmup(freeze=True)
    with jax.disable_jit():
        found = mine("a cat")
    same(found, encoder("a cat"), atol=1e-5)


def test_another_dtype_or_family_is_computed_with(encoder):
    mine = another(encoder)
    mine.warmup(freeze=True)
    mine.dtype = "bfloat16"
    assert mine("a cat").prompt_embeds.dtype == "bfloat16"
    mine = another(encoder)
    mine.warmup(freeze=True)
    towers = tuple(dataclasses.replace(tower, layer=tower.layer - 1) for tower in mine.family.towers)
    mine.family = dataclasses.replace(mine.family, towers=towers)
    same(mine("a cat"), encoder("a cat", clip_skip=1, clip_skip_negative=1), atol=1e-5)
    assert programs(mine) == ()


def test_it_serves_texts_of_any_length(loaded):
    """FLUX's CLIP-L, whose ids are cut after the end of the text otherwise."""
    mine = another(loaded)
    length = {"max_sequence_length": 64} if "t5" in loaded.config else {}
    mine.warmup(freeze=True, **length)
    wanted = [another(loaded)(text, **length) for text in ("a cat", "a " * 12)]
    mine._compute = None  # nothing but the frozen programs is left
    for text, out in zip(("a cat", "a " * 12), wanted, strict=True):
        same(mine(text, **length), out, atol=2e-5)


def test_what_the_cache_holds_is_of_one_program(encoder):
    mine = another(encoder, cache_bytes=2**20)
    before = mine("a cat", negative_prompt="blurry")
    assert mine("a cat", negative_prompt="blurry") is before
    mine.warmup(freeze=True)
    assert len(programs(mine)) == 2  # with a negative, and alone
    after = mine("a cat", negative_prompt="blurry")
    assert after is not before
    assert mine("a cat", negative_prompt="blurry") is after
    mine.warmup(freeze=True)  # nothing is new
    assert mine("a cat", negative_prompt="blurry") is after
    layer = mine.params["clip_l"]["text_model"]["final_layer_norm"]
    layer["bias"] = layer["bias"] + 1
    exchanged = mine("a cat", negative_prompt="blurry")
    assert exchanged is not after
    assert mine("a cat", negative_prompt="blurry") is exchanged


def test_other_calls_go_as_before(encoder):
    mine = another(encoder)
    mine.warmup(freeze=True)
    for prompts, options in ((["a cat", "a dog"], {}), (["a cat"], {"guidance": False}), (["a cat"], {"clip_skip": 1})):
        same(mine(prompts, **options), encoder(prompts, **options), atol=0)
    mine.warmup(freeze=True, clip_skip=1)
    assert len(programs(mine)) == 2
    same(mine("a cat", clip_skip=1), encoder("a cat", clip_skip=1), atol=1e-5)


def test_skipped_layers_of_negatives_do_not_matter_to_prompts_alone(encoder):
    mine = another(encoder, cache_bytes=2**20)
    mine.warmup(freeze=True, clip_skip_negative=1)
    assert len(programs(mine)) == 2
    mine("a cat", negative_prompt="blurry", clip_skip_negative=1)
    mine._compute = None  # nothing but the frozen programs is left
    mine("a dog", negative_prompt="blurry", clip_skip_negative=1)


@pytest.mark.slow
def test_interceptors_are_heeded(encoder):
    mine = another(encoder)
    mine.warmup(freeze=True)

    def doubled(call, args, kwargs, context):
        out = call(*args, **kwargs)
        return out * 2 if context.module.name == "fc1" else out

    with nn.intercept_methods(doubled):
        found = mine("a cat")
        with pytest.raises(ClipJaxError, match="freeze is not for nn.intercept_methods"):
            mine.warmup(freeze=True)
    assert np.abs(found.prompt_embeds - mine("a cat").prompt_embeds).max() > 0.1


def test_an_exported_encoder_is_frozen_too(encoder, tmp_path):
    encoder.export(tmp_path / "out", platforms=("cpu",))
    exported = clip_jax.load_exported(tmp_path / "out", cache_bytes=0)
    exported.warmup(freeze=True)
    assert len(programs(exported)) == 1
    same(exported("a cat", negative_prompt="blurry"), encoder("a cat", negative_prompt="blurry"), atol=1e-5)


@pytest.mark.slow
def test_an_exported_encoder_with_params_of_another_dtype_is_not_frozen(tiny_sd15, tmp_path):
    """Kernels would be cast to what the exported program does not take."""
    wide = clip_jax.load(tiny_sd15, family="sd15", dtype="bfloat16", param_dtype="float32")
    wide.export(tmp_path / "out", platforms="cpu")
    exported = clip_jax.load_exported(tmp_path / "out")
    with pytest.raises(ClipJaxError, match="dtype of the computation, bfloat16; found float32. Leave it out"):
        exported.warmup(freeze=True)
    assert exported("a cat").prompt_embeds.dtype == "bfloat16"


@pytest.mark.slow
def test_exported_norms_may_be_wider_and_quantised_kernels_are_refused(tiny_sd15, tmp_path):
    narrow = clip_jax.load(tiny_sd15, family="sd15", dtype="bfloat16")
    narrow.params = jax.tree.map_with_path(
        lambda path, leaf: leaf.astype("float32") if "norm" in path[-2].key else leaf, narrow.params
    )
    narrow.export(tmp_path / "norms", platforms="cpu")
    exported = clip_jax.load_exported(tmp_path / "norms", cache_bytes=0)
    wanted = exported("a cat").prompt_embeds.astype("float32")
    exported.warmup(freeze=True)
    assert len(programs(exported)) == 1
    np.testing.assert_allclose(exported("a cat").prompt_embeds.astype("float32"), wanted, atol=0.05)
    clip_jax.load(tiny_sd15, family="sd15", quantize="int8").export(tmp_path / "int8", platforms="cpu")
    with pytest.raises(ClipJaxError, match="Quantised params cannot be frozen"):
        clip_jax.load_exported(tmp_path / "int8").warmup(freeze=True)


def test_quantised_params_are_refused(tiny_sd15):
    encoder = clip_jax.load(tiny_sd15, family="sd15", quantize="int8", cache_bytes=0)
    wanted = encoder("a cat")
    with pytest.raises(ClipJaxError, match=r"Quantised params cannot be frozen.* Leave it out\."):
        encoder.warmup(freeze=True)
    same(encoder("a cat"), wanted, atol=0)


def test_float16_is_refused(encoder):
    with pytest.raises(ClipJaxError, match="freeze is for float32 and bfloat16, found float16"):
        another(encoder, dtype="float16").warmup(freeze=True)


def test_an_xla_without_onednn_is_refused(encoder, monkeypatch):
    monkeypatch.setattr(frozen, "_packs", lambda dtype: False)
    mine = another(encoder)
    with pytest.raises(ClipJaxError, match=f"packs kernels of float32 by oneDNN.* found jax {jax.__version__}"):
        mine.warmup(freeze=True)
    same(mine("a cat"), encoder("a cat"), atol=0)


def test_options_that_xla_does_not_know_are_as_good_as_none(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(frozen, "_OPTIONS", {"xla_cpu_no_such_option": True})
    assert frozen._packs.__wrapped__("float32") is False


TWO_DEVICES = """
import sys, jax, clip_jax
encoder = clip_jax.load(sys.argv[1], family="sd15", mesh=jax.make_mesh((1, 2), ("data", "tensor")))
try:
    encoder.warmup(freeze=True)
except clip_jax.ClipJaxError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_mesh_is_refused(tiny_sd15):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES, str(tiny_sd15)], capture_output=True, text=True, env=environment
    )
    assert "freeze is for params on one CPU device, found them on" in done.stdout, done.stderr


ELSEWHERE = """
import sys, clip_jax, jax, numpy as np
from clip_jax import frozen
if sys.argv[2] == "False":
    frozen._packs, frozen._OPTIONS = lambda dtype: True, {}
encoder = clip_jax.load(sys.argv[1], family="sd15", cache_bytes=0)
tokens = encoder.tokenize("a cat")
before = encoder.encode(tokens).prompt_embeds
encoder.warmup(freeze=True)
compiled, = encoder._frozen.programs
for device in jax.devices():
    ids = jax.device_put(tokens, device)
    embeds = encoder.encode(ids).prompt_embeds
    print(encoder._frozen.find(ids, (None, None)) is compiled, embeds.devices() == {device})
    np.testing.assert_allclose(embeds, before, rtol=0, atol=1e-5)
    with jax.default_device(device):
        print(encoder.encode(tokens).prompt_embeds.devices() == {device})
"""


@pytest.mark.slow
def test_ids_on_another_device_go_as_before(tiny_sd15):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tiny_sd15), str(PACKS)], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["True", "True", "True", "False", "True", "True"], done.stderr


CACHED = """
import sys, warnings, clip_jax
warnings.simplefilter("error")
clip_jax.enable_compilation_cache(sys.argv[2])
encoder = clip_jax.load(sys.argv[1], family="sd15", cache_bytes=0)
try:
    encoder.warmup(freeze=True)
except clip_jax.ClipJaxError as error:
    assert "by oneDNN" in str(error), error
encoder("a cat").prompt_embeds.block_until_ready()
"""


@pytest.mark.slow
def test_a_compilation_cache_neither_warns_nor_fails(tmp_path):
    folder = write_pipeline(tmp_path / "wide", WIDE)
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CACHED, str(folder), str(tmp_path / "cache")],
            capture_output=True, text=True, env=environment,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("change", [lambda ids: ids.astype(np.uint16), lambda ids: ids[:, :70]])
def test_ids_of_another_dtype_or_length_go_as_before(encoder, change):
    mine = another(encoder)
    mine.warmup(freeze=True)
    tokens = jax.tree.map(change, encoder.tokenize("two dogs", "x"))
    same(mine.encode(tokens), encoder.encode(tokens), atol=0)
