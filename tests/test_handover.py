"""Params packed into few arguments, as accelerators are given them: here it is a CPU that takes them so."""

import copy
import pickle
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
import pytest

import clip_jax
from clip_jax import ClipJaxError, handover
from clip_jax import encoder as encoder_module
from clip_jax.handover import Layout, pack, pays, program
from clip_jax.structs import is_traced
from tests.checkpoints import write_family


@pytest.fixture(autouse=True)
def packed_on_cpus(monkeypatch):
    """What fits into `_SMALL` is everything of the small models; here their kernels are large."""
    monkeypatch.setattr(encoder_module, "pays", lambda params: True)
    monkeypatch.setattr(handover, "pays", lambda params: True)
    monkeypatch.setattr(handover, "_SMALL", 200)


@pytest.fixture(scope="module", params=["sdxl", pytest.param("sd3", marks=pytest.mark.slow)])
def loaded(request, tmp_path_factory):
    folder = write_family(tmp_path_factory.mktemp("handover") / request.param, clip_jax.FAMILIES[request.param])
    return clip_jax.load(folder, family=request.param, cache_bytes=0)


def another(encoder, **options):
    """An encoder of its own, which packs, with params that may be exchanged."""
    options = {"dtype": encoder.dtype, "cache_bytes": 0, **options}
    return clip_jax.TextEncoder(
        encoder.family, jax.tree.map(lambda leaf: leaf, encoder.params), encoder.tokenizers, **options
    )


def test_it_computes_the_same_bit_for_bit(loaded):
    packs = another(loaded)
    packs._compute = None  # what takes the params as they are
    options = {"max_sequence_length": 16} if "t5" in loaded.config else {}
    for prompts, clip_skip in ((["a cat"], None), (["a cat", "two dogs", "a bird"], 1)):
        tokens = loaded.tokenize(prompts, "blurry", **options)
        wanted = loaded._compute(loaded.params, loaded.dtype, tokens, (None, clip_skip))
        found = packs.encode(tokens, clip_skip=clip_skip)
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            # Three prompts are encoded as four.
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=0 if len(prompts) == 1 else 1e-5)
    assert np.abs(found.prompt_embeds[-1] - found.prompt_embeds[-2]).max() > 0.1


@pytest.mark.parametrize("scheme", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_quantised_params_are_packed_too(tiny_sd15, scheme):
    loaded = clip_jax.load(tiny_sd15, family="sd15", cache_bytes=0, quantize=scheme)
    tokens = loaded.tokenize("a cat", "blurry")
    wanted = loaded._compute(loaded.params, loaded.dtype, tokens, (None, None))
    loaded._compute = None
    np.testing.assert_array_equal(loaded.encode(tokens).prompt_embeds, wanted.prompt_embeds)


def test_small_params_are_joined_by_dtype():
    kernel = jax.numpy.ones((20, 20))
    params = {"a": {"kernel": kernel, "bias": jax.numpy.arange(3.0)}, "b": jax.numpy.ones((2, 2), "bfloat16"), "c": 7}
    packed, layout = pack(params)
    assert {name: array.shape for name, array in packed.joined.items()} == {"float32": (3,), "bfloat16": (4,)}
    assert packed.large[0] is kernel  # not a copy
    assert packed.large[1:] == [7]
    again = layout.unpacked(packed)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_shapes_are_packed_like_arrays(encoder):
    shapes = jax.eval_shape(lambda: encoder.params)
    (packed, layout), (of_shapes, the_same) = pack(encoder.params), pack(shapes)
    assert layout == the_same
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), packed) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), of_shapes
    )


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_what_is_quantised_is_handed_over_as_it_is(tiny_sd15, scheme):
    params = clip_jax.load(tiny_sd15, family="sd15", quantize=scheme).params
    packed, layout = pack(params)
    assert {leaf.qvalue.dtype.name for leaf in packed.large if hasattr(leaf, "qvalue")} == {scheme}
    assert packed.joined["float32"].size > 200
    jax.tree.map(np.testing.assert_array_equal, layout.unpacked(packed), params)


def test_encoders_laid_out_alike_share_a_program(tiny_sd15):
    one, two = (clip_jax.load(tiny_sd15, family="sd15", cache_bytes=0) for _ in range(2))
    programs = [program(pack(e.params)[1], e.family, e.dtype, e.attention, (None, None)) for e in (one, two)]
    assert programs[0] is programs[1]
    assert isinstance(pack(one.params)[1], Layout)


@pytest.mark.parametrize("in_place", [True, False])
def test_exchanged_params_are_computed_with(encoder, in_place):
    mine = another(encoder)
    before = mine("a cat").prompt_embeds
    exchanged = mine.params if in_place else jax.tree.map(lambda leaf: leaf, mine.params)
    norm = exchanged["clip_l"]["text_model"]["final_layer_norm"]
    norm["bias"] = norm["bias"] + 1
    if not in_place:
        mine.params = exchanged
    np.testing.assert_allclose(mine("a cat").prompt_embeds, before + 1, rtol=0, atol=1e-5)


def test_another_dtype_is_computed_with(encoder):
    mine = another(encoder)
    mine("a cat")
    mine.dtype = "bfloat16"
    assert mine("a cat").prompt_embeds.dtype == "bfloat16"


@pytest.mark.slow
def test_interceptors_are_heeded(encoder):
    mine = another(encoder)
    before = mine("a cat").prompt_embeds

    def doubled(call, args, kwargs, context):
        out = call(*args, **kwargs)
        return out * 2 if context.module.name == "fc1" else out

    with nn.intercept_methods(doubled):
        assert np.abs(mine("a cat").prompt_embeds - before).max() > 0.1
    np.testing.assert_array_equal(mine("a cat").prompt_embeds, before)


@pytest.mark.slow
def test_it_goes_through_jit_and_without(encoder):
    mine = another(encoder)
    wanted, tokens = mine("a cat").prompt_embeds, mine.tokenize("a cat")
    np.testing.assert_allclose(jax.jit(lambda t: mine.encode(t).prompt_embeds)(tokens), wanted, rtol=0, atol=1e-5)
    mine._handover = None
    with jax.disable_jit():
        np.testing.assert_allclose(mine("a cat").prompt_embeds, wanted, rtol=0, atol=1e-5)
    assert mine._handover is None  # it is a jit


def test_params_are_packed_once(encoder):
    mine = another(encoder)
    mine("a cat")
    first = mine._handover
    mine(["two dogs", "a bird"])
    assert mine._handover is first
    mine.dtype = "bfloat16"
    mine("a cat")
    assert mine._handover is not first


def test_what_computes_attention_reaches_the_program(encoder):
    mine = another(encoder)
    mine("a cat")
    mine.attention = "cudnn"
    with pytest.raises(ClipJaxError, match="attention='cudnn' is for bfloat16"):
        mine("a cat")


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("trace", [jax.jit, lambda f: lambda: jax.eval_shape(f)])
def test_the_first_call_may_be_traced(encoder, trace, bound):
    mine = another(encoder)
    if bound:
        mine.params = jax.device_put(mine.params, jax.devices()[0])
    tokens = mine.tokenize("a cat")
    assert trace(lambda: mine.encode(tokens).prompt_embeds)().shape == (2, 77, 32)
    np.testing.assert_array_equal(mine.encode(tokens).prompt_embeds, encoder.encode(tokens).prompt_embeds)


def test_traced_params_may_be_put_in_place(encoder, monkeypatch):
    monkeypatch.setattr(handover, "pays", lambda params: not is_traced(params))
    mine = another(encoder)
    tokens = mine.tokenize("a cat")
    wanted = mine.encode(tokens).prompt_embeds
    norm = mine.params["clip_l"]["text_model"]["final_layer_norm"]
    kept = norm["bias"]

    def loss(bias):
        norm["bias"] = bias
        return mine.encode(tokens).prompt_embeds.sum()

    np.testing.assert_allclose(jax.grad(loss)(kept), np.full(32, 2 * 77), rtol=1e-5)
    norm["bias"] = kept
    np.testing.assert_array_equal(mine.encode(tokens).prompt_embeds, wanted)
    assert mine._handover is not None


def test_exported_programs_and_meshes_take_params_as_they_are(encoder, tmp_path):
    mine = another(encoder)
    wanted = mine("a cat").prompt_embeds
    mine.export(tmp_path / "exported")
    exported = clip_jax.load_exported(tmp_path / "exported", cache_bytes=0)
    np.testing.assert_allclose(exported("a cat").prompt_embeds, wanted, rtol=0, atol=1e-5)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    meshed = another(encoder, batch_sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    np.testing.assert_allclose(meshed("a cat").prompt_embeds, wanted, rtol=0, atol=1e-5)
    assert (exported._handover, meshed._handover) == (None, None)


@pytest.mark.parametrize("duplicate", [copy.copy, lambda mine: pickle.loads(pickle.dumps(mine))])
def test_copies_hand_over_their_own(encoder, duplicate):
    mine = another(encoder)
    wanted = mine("a cat").prompt_embeds
    copied = duplicate(mine)
    assert copied._handover is None
    np.testing.assert_array_equal(copied("a cat").prompt_embeds, wanted)


def test_params_are_let_go_of_with_the_encoder(encoder):
    mine = another(encoder)
    mine.params = jax.tree.map(lambda leaf: leaf + 0, mine.params)
    mine("a cat")
    kernel = mine.params["clip_l"]["text_model"]["encoder"]["layers"]["0"]["mlp"]["fc1"]["kernel"]
    before = sum(array is kernel for array in jax.live_arrays())
    pointer = kernel.unsafe_buffer_pointer()
    del mine, kernel
    assert before == 1
    assert pointer not in [array.unsafe_buffer_pointer() for array in jax.live_arrays() if array.size > 200]


def test_what_is_on_a_device_stays_there_and_is_bound_as_before():
    loose = {"bias": jax.numpy.ones(3)}
    bound = jax.device_put(loose, jax.devices()[0])
    assert not pack(loose)[0].joined["float32"].committed
    assert pack(bound)[0].joined["float32"].committed


class Elsewhere(NamedTuple):
    """What tells of itself that it is on a GPU."""

    number: int
    platform: str = "gpu"


def test_it_is_for_one_accelerator(encoder, monkeypatch):
    assert not pays(encoder.params)
    one, other = {Elsewhere(0)}, {Elsewhere(1)}
    devices = iter([one, one, one, other, one | other, one])
    monkeypatch.setattr(type(jax.numpy.ones(1)), "devices", lambda _: next(devices))
    two = [jax.numpy.ones(1), jax.numpy.ones(1)]
    assert pays(two)
    assert not pays(two)  # on two GPUs
    assert not pays(two)  # one of them split
    monkeypatch.undo()
    jax.make_jaxpr(lambda leaf: leaf + pays({"kernel": leaf}))(1.0)  # traced ones have no devices to ask
