"""What pipelines do with the classes: LoRA by interceptors, a training step, checkpoints of their own, logical axes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from orbax.checkpoint import v1 as ocp

from clip_jax.compat import FlaxCLIPTextModel
from clip_jax.params.shapes import flatten
from tests.compat.conftest import IDS, SMALL, T5_IDS

Q_PROJ = ("text_model", "encoder", "layers", "1", "self_attn", "q_proj")


class Lora(nn.Module):
    """What maxdiffusion's `LoRALinearLayer` is: x @ down @ up, as a child of the layer that it is added to."""

    features: int
    rank: int = 2

    @nn.compact
    def __call__(self, x):
        down = nn.Dense(self.rank, use_bias=False, name="down")(x)
        return nn.Dense(self.features, use_bias=False, name="up")(down)


def lora(next_function, args, kwargs, context):
    """Found by the path of HF names, as maxdiffusion's `make_lora_interceptor` finds it."""
    out = next_function(*args, **kwargs)
    if context.method_name == "__call__" and context.module.path == Q_PROJ:
        return out + Lora(context.module.features, name="lora-x")(*args, **kwargs)
    return out


def with_lora(params, seed=0):
    """Params with those of the LoRA added, and, with theirs merged into it, the kernel that does the same."""
    rng = np.random.default_rng(seed)
    down, up = (rng.standard_normal(shape, np.float32) for shape in ((32, 2), (2, 32)))
    added = jax.tree.map(lambda leaf: leaf, params)
    layer = functools.reduce(dict.__getitem__, Q_PROJ, added)
    layer["lora-x"] = {"down": {"kernel": down}, "up": {"kernel": up}}
    merged = jax.tree.map(lambda leaf: leaf, params)
    layer = functools.reduce(dict.__getitem__, Q_PROJ, merged)
    layer["kernel"] = layer["kernel"] + down @ up
    return added, merged


@pytest.mark.parametrize("jitted", [False, True])
def test_a_lora_by_interceptor_is_not_lost_in_compiled_code(clip, jitted):
    """The call before it leaves a trace without the LoRA; and the layer that is run twice has it twice."""
    added, merged = with_lora(clip.params)
    plain = clip(IDS, params=added).last_hidden_state
    run = lambda params: clip(IDS, params=params)[:]  # noqa: E731
    with nn.intercept_methods(lora):
        found = (jax.jit(run) if jitted else run)(added)
    for adapted, wanted in zip(found, clip(IDS, params=merged)[:], strict=True):
        np.testing.assert_allclose(adapted, wanted, atol=2e-5)
    assert np.abs(plain - found[0]).max() > 0.1
    np.testing.assert_array_equal(clip(IDS, params=added)[0], plain)


@pytest.mark.slow
def test_init_under_an_interceptor_makes_its_params(clip):
    with nn.intercept_methods(lora):
        params = clip.init_weights(jax.random.key(0), (1, 4))
    assert flatten(params)["/".join((*Q_PROJ, "lora-x", "down", "kernel"))].shape == (32, 2)


@pytest.mark.slow
def test_a_lora_goes_through_the_text_encoder_too(encoder):
    encoder("a cat")
    added, merged = with_lora(encoder.params["clip_l"])
    plain = encoder.params
    try:
        encoder.params = {"clip_l": added}
        with nn.intercept_methods(lora):
            found = encoder("a cat").prompt_embeds
        encoder.params = {"clip_l": merged}
        np.testing.assert_allclose(found, encoder("a cat").prompt_embeds, atol=2e-5)
    finally:
        encoder.params = plain
    assert np.abs(found - encoder("a cat").prompt_embeds).max() > 0.1


def dreambooth_state(clip):
    return TrainState.create(apply_fn=clip.__call__, params=clip.params, tx=optax.adam(1e-2))


def train_step(state, ids):
    """One of diffusers' `train_dreambooth_flax.py`: the text encoder is trained with the UNet."""

    def loss(params):
        hidden = state.apply_fn(ids, params=params, dropout_rng=jax.random.key(0), train=True)[0]
        return jnp.mean(jnp.square(hidden - 1))

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


@pytest.mark.slow
def test_the_encoder_learns(clip):
    state, step = dreambooth_state(clip), jax.jit(train_step)
    losses = []
    for _ in range(5):
        state, value = step(state, IDS)
        losses.append(float(value))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    moved = {path for path, leaf in flatten(state.params).items() if (leaf != flatten(clip.params)[path]).any()}
    assert moved == flatten(clip.params).keys()


@pytest.mark.slow
def test_a_train_state_is_saved_and_restored(clip, tmp_path):
    state, _ = train_step(dreambooth_state(clip), IDS)
    tree = {"step": jnp.asarray(state.step), "params": state.params, "opt_state": state.opt_state}
    ocp.save(tmp_path / "state", tree)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=device), tree)
    restored = ocp.load(tmp_path / "state", shapes)
    again, value = train_step(state.replace(**restored), IDS)
    expected, wanted = train_step(state, IDS)
    assert value == wanted
    jax.tree.map(np.testing.assert_array_equal, again.params, expected.params)


@pytest.mark.slow
def test_axes_are_read_from_init_and_parts_are_placed(clip, t5):
    """As maxdiffusion `max_utils.py` does: shapes, then shardings by the rules, then params into them."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tensor"))
    rules = (("embed", "fsdp"), ("heads", "tensor"), ("conv_batch", ("fsdp",)))
    for model, ids in ((clip, IDS), (t5, T5_IDS)):
        init = functools.partial(model.init_weights, rng=jax.random.key(0), input_shape=(1, 8))
        with nn.logical_axis_rules(rules):
            abstract = jax.eval_shape(functools.partial(init, eval_only=True))
            shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, rules)
            placed = jax.jit(lambda model=model: model.params, out_shardings=shardings)()
        specs = {path: leaf.spec for path, leaf in flatten(shardings).items()}
        query = next(path for path in specs if path.endswith(("q_proj/kernel", "SelfAttention/q/kernel")))
        assert specs[query] == jax.sharding.PartitionSpec("fsdp", "tensor")
        np.testing.assert_allclose(model(ids, params=placed)[0], model(ids)[0], atol=2e-5)


@pytest.mark.slow
def test_boxed_params_are_taken_too():
    model = FlaxCLIPTextModel(SMALL, _do_init=False)
    boxed = model.init_weights(jax.random.key(0))
    assert model.init_weights(jax.random.key(0), (1, 1), params=boxed) == boxed
    np.testing.assert_array_equal(model(IDS, params=boxed)[0], model(IDS, params=nn.meta.unbox(boxed))[0])
    shapes = model.init_weights(jax.random.key(0), eval_only=True)
    assert {type(leaf) for leaf in jax.tree.leaves(shapes)} == {jax.ShapeDtypeStruct}
