"""An exported encoder computes what the one did that it was made from, without the modules."""

import json
import pickle
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

import clip_jax
from clip_jax import CheckpointError, ClipJaxError
from clip_jax.program import read_programs
from tests.checkpoints import digests, write_family


@pytest.fixture(scope="module", params=["sdxl", pytest.param("flux", marks=pytest.mark.slow)])
def pair(request, tmp_path_factory):
    """An encoder, and a folder that it was exported to."""
    folder = tmp_path_factory.mktemp("exported")
    name = request.param
    source = write_family(folder / "source", clip_jax.FAMILIES[name])
    encoder = clip_jax.load(source, family=name, cache_bytes=0)
    encoder.export(folder / "out", max_sequence_length=32 if name == "flux" else None)
    return encoder, folder / "out"


# What does not depend on it.
of_one_family = pytest.mark.parametrize("pair", ["sdxl"], indirect=True)


@pytest.fixture
def exported(pair):
    return clip_jax.load_exported(pair[1], cache_bytes=0)


def options(encoder):
    return {"max_sequence_length": 32} if encoder.family.name == "flux" else {}


CALLS = [
    (["a cat"], {}),
    (["a cat", "two dogs", "a boat"], {"negative_prompt": "blurry", "guidance": True}),
    (["a cat", "two dogs"], {"guidance": False}),
]


@pytest.mark.parametrize(("prompts", "kwargs"), CALLS)
def test_it_computes_the_same(pair, exported, prompts, kwargs):
    wanted = pair[0](prompts, **options(exported), **kwargs)
    found = exported(prompts, **options(exported), **kwargs)
    assert found.guidance == wanted.guidance
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_the_folder_is_a_checkpoint_too(pair):
    loaded = clip_jax.load(pair[1])
    for ours, theirs in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(pair[0].params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_module_is_run(pair):
    code = (
        "import sys, clip_jax, clip_jax.models.clip_text as clip, clip_jax.models.t5 as t5\n"
        "def never(*_, **__): raise AssertionError\n"
        "clip.ClipTextModel.__call__ = t5.T5Encoder.__call__ = never\n"
        "out = clip_jax.load_exported(sys.argv[1])('a cat', **eval(sys.argv[2]))\n"
        "print(*out.prompt_embeds.shape)"
    )
    arguments = [str(pair[1]), repr(options(pair[0]))]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(pair[0]("a cat", **options(pair[0])).prompt_embeds.shape[-1])


def test_what_it_was_not_made_for_is_refused(pair, exported):
    with pytest.raises(ClipJaxError, match="clip_skip|no hidden state of CLIP"):
        exported("a cat", clip_skip=1, **options(exported))


@pytest.mark.slow
@of_one_family
def test_damage_and_other_folders_are_told(pair, tmp_path):
    encoder, folder = pair
    before = digests(folder)
    with pytest.raises(CheckpointError, match="exists already"):
        encoder.export(folder)
    assert digests(folder) == before
    with pytest.raises(CheckpointError, match="is not a folder written by `TextEncoder.export`"):
        clip_jax.load_exported(tmp_path)
    encoder.save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="has no exported programs"):
        clip_jax.load_exported(tmp_path / "saved")
    encoder.export(tmp_path / "damaged", **options(encoder), platforms=["tpu"])
    with pytest.raises(CheckpointError, match="exported for tpu, this process runs on cpu"):
        clip_jax.load_exported(tmp_path / "damaged")
    program = tmp_path / "damaged" / "programs" / "both.jax"
    size = program.stat().st_size
    program.write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match="programs cannot be read"):
        clip_jax.load_exported(tmp_path / "damaged")
    program.unlink()
    with pytest.raises(CheckpointError, match=r"is not whole.*both.jax is missing"):
        clip_jax.load_exported(tmp_path / "damaged")


@pytest.mark.slow
@of_one_family
def test_a_newer_version_is_told(pair, tmp_path):
    encoder, _ = pair
    encoder.export(tmp_path / "newer", **options(encoder))
    facts = tmp_path / "newer" / "programs" / "programs.json"
    text = facts.read_text()
    facts.write_text(json.dumps({**json.loads(text), "version": 9}, separators=(",", ":")).ljust(len(text)))
    with pytest.raises(CheckpointError, match="has version 9, newer than 1"):
        clip_jax.load_exported(tmp_path / "newer")


@of_one_family
def test_other_platforms_are_refused(pair, tmp_path):
    for wrong, found in ((["abacus"], "abacus"), (iter(["abacus"]), "abacus"), ([], "none")):
        with pytest.raises(ClipJaxError, match=f"platforms must be among cpu, cuda, tpu, rocm, found {found}"):
            pair[0].export(tmp_path / "out", platforms=wrong, **options(pair[0]))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_layers_are_those_of_then_for_whatever_the_cache_lacks(tiny_sd15, tmp_path):
    encoder = clip_jax.load(tiny_sd15, family="sd15", cache_bytes=0)
    encoder.export(tmp_path / "out", clip_skip=1)
    found = clip_jax.load_exported(tmp_path / "out")
    for prompt, negative in (("a", "b"), ("a", "c"), ("d", "c"), (["a", "e"], "f")):
        np.testing.assert_allclose(
            found(prompt, negative_prompt=negative, clip_skip=1).prompt_embeds,
            encoder(prompt, negative_prompt=negative, clip_skip=1).prompt_embeds,
            atol=1e-5,
        )
    found("a", clip_skip=1, clip_skip_negative=0)
    with pytest.raises(ClipJaxError, match="exported for clip_skip=1 and clip_skip_negative=0, found 0 and 0"):
        found("x", negative_prompt="y")


@of_one_family
def test_another_dtype_is_refused(pair):
    exported = clip_jax.load_exported(pair[1])
    exported.dtype = "bfloat16"
    with pytest.raises(ClipJaxError, match="were exported for float32, found bfloat16. Export again"):
        exported("a cat", **options(exported))


@pytest.mark.slow
def test_lengths_of_absent_rows_are_those_of_then(tmp_path):
    """SD 3's zeros for T5, of which no ids tell how many there are."""
    source = write_family(tmp_path / "source", clip_jax.FAMILIES["sd3"])
    encoder = clip_jax.load(source, family="sd3", without="t5", cache_bytes=0)
    encoder.export(tmp_path / "out", max_sequence_length=100)
    found = clip_jax.load_exported(tmp_path / "out")
    for length in (None, 100):
        assert found("a cat", max_sequence_length=length).prompt_embeds.shape[1] == 177
    with pytest.raises(ClipJaxError, match="for max_sequence_length=100, found 50. Leave it out, or export again"):
        found("a cat", max_sequence_length=50)


@pytest.mark.parametrize("pair", ["flux"], indirect=True)
def test_the_length_of_t5_is_that_of_then(pair, exported):
    np.testing.assert_array_equal(
        exported("a cat").prompt_embeds, pair[0]("a cat", max_sequence_length=32).prompt_embeds
    )
    with pytest.raises(ClipJaxError, match="found {'clip_l': 77, 't5': 16}. Leave max_sequence_length= out, or export"):
        exported("a cat", max_sequence_length=16)


@pytest.mark.slow
@of_one_family
def test_it_may_be_copied_after_a_call(pair, exported):
    wanted = exported("a cat", **options(exported))
    found = pickle.loads(pickle.dumps(exported))("a cat", **options(exported))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_warmup_runs_the_lengths_that_there_are(pair, exported):
    exported.warmup((1,), **options(exported))


@of_one_family
def test_interceptors_are_refused(pair, exported):
    message = "take no notice of nn.intercept_methods, and a LoRA would be lost"
    interceptor = nn.intercept_methods(lambda call, args, kwargs, context: call(*args, **kwargs))
    with interceptor, pytest.raises(ClipJaxError, match=message):
        exported("a cat", **options(exported))


@of_one_family
def test_an_unknown_family_is_told(pair, tmp_path):
    folder = shutil.copytree(pair[1], tmp_path / "later")
    facts = folder / "_CHECKPOINT_METADATA"
    facts.write_text(facts.read_text().replace(f'"{pair[0].family.name}"', '"later"'))
    with pytest.raises(CheckpointError, match="is of family 'later', unknown to this clip_jax. Upgrade"):
        clip_jax.load_exported(folder)


@pytest.mark.slow
def test_a_layer_of_negatives_is_not_taken_for_prompts(tmp_path):
    source = write_family(tmp_path / "sdxl", clip_jax.FAMILIES["sdxl"])
    clip_jax.load(source, family="sdxl").export(tmp_path / "out", clip_skip_negative=1, platforms="cpu")
    skipping = clip_jax.load_exported(tmp_path / "out", cache_bytes=0)
    with pytest.raises(ClipJaxError, match="exported for clip_skip=0 and clip_skip_negative=1"):
        skipping("a cat", clip_skip=1)  # its negative is zeros


def test_programs_of_a_later_version_are_refused(pair, tmp_path):
    shutil.copytree(pair[1] / "programs", tmp_path / "programs")
    facts = tmp_path / "programs" / "programs.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"version": 2}))
    with pytest.raises(CheckpointError, match="newer than 1"):
        read_programs(tmp_path)


@of_one_family
def test_a_folder_of_the_home(pair, monkeypatch):
    monkeypatch.setenv("HOME", str(pair[1].parent))
    assert clip_jax.load_exported(f"~/{pair[1].name}").family == pair[0].family


@of_one_family
def test_its_cache_and_where_its_weights_are_from(pair, exported):
    assert exported.cache is None
    assert clip_jax.load_exported(pair[1], cache_bytes=1000).cache.max_bytes == 1000
    assert exported.provenance["format"] == pair[0].provenance["format"]


@of_one_family
def test_other_params_are_refused(pair):
    exported = clip_jax.load_exported(pair[1])
    exported.params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), exported.params)
    with pytest.raises(ClipJaxError, match="exported for params of other shapes or dtypes. Set such, export again"):
        exported("a cat")
    exported.params = {}
    with pytest.raises(ClipJaxError, match="exported for params of other shapes or dtypes. Set such, export again"):
        exported("a cat")


@of_one_family
def test_interceptors_are_not_exported(pair, tmp_path):
    with (
        nn.intercept_methods(lambda call, args, kwargs, _: call(*args, **kwargs)),
        pytest.raises(ClipJaxError, match="export is not for nn.intercept_methods: change the params instead"),
    ):
        pair[0].export(tmp_path / "out")
    assert not any(tmp_path.iterdir())
