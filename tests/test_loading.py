"""`load` and `info`: random weights, what is not found, families, progress bars."""

import hashlib
import os
import shutil
import subprocess
import sys
import termios
import textwrap
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax import FAMILIES, CheckpointError, ClipJaxError, Family
from clip_jax.convert import convert
from clip_jax.families import Tower
from clip_jax.params import checkpoint as ckpt
from tests.checkpoints import TINY

SMALL = Family(name="small", title="Small", pipelines=frozenset(), towers=(Tower(name="clip_l", config=TINY),))


@pytest.fixture
def small(monkeypatch):
    """A family "small" with the architecture of TINY."""
    monkeypatch.setitem(FAMILIES, "small", SMALL)


def load_random(**options):
    with pytest.warns(UserWarning, match="random:small has random weights: .* no meaning") as caught:
        encoder = clip_jax.load("random:small", **options)
    assert [warning.filename for warning in caught] == [__file__]
    return encoder


def digest(params):
    leaves = jax.tree.leaves(params)
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


# --- random weights


def test_random_weights_warn_and_work(small):
    encoder = load_random()
    out = encoder(["a cat", "a dog"])
    assert out.prompt_embeds.shape == (4, 77, 32)
    assert np.isfinite(out.prompt_embeds).all()
    assert encoder.provenance == {"source": "random:small", "format": "seeded random weights"}


@pytest.mark.slow
def test_random_weights_are_the_same_in_every_process(small):
    code = """
        import warnings
        from clip_jax import FAMILIES, load
        from tests.test_loading import SMALL, digest
        warnings.simplefilter("ignore")
        FAMILIES["small"] = SMALL
        print(digest(load("random:small").params))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(load_random().params) == digest(load_random().params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_random_weights_of_another_dtype_are_the_same_rounded(small, dtype):
    exact, low = load_random().params, load_random(dtype=dtype).params
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(dtype), y), exact, low)


def test_random_weights_are_saved_like_others(small, tmp_path):
    encoder = load_random()
    encoder.save(tmp_path / "saved")
    assert digest(clip_jax.load(tmp_path / "saved").params) == digest(encoder.params)


def test_full_size():
    with pytest.warns(UserWarning, match="random weights"):
        encoder = clip_jax.load("random:sd15", dtype="bfloat16")
    assert sum(leaf.size for leaf in jax.tree.leaves(encoder.params)) == 123_060_480


@pytest.mark.parametrize(
    ("family", "layers", "width", "parameters"),
    [("sd15", 12, 768, 123_060_480), ("sd21", 23, 1024, 340_387_840)],
)
def test_info_of_a_family(family, layers, width, parameters):
    info = clip_jax.info(f"random:{family}")
    (tower,) = info.towers.values()
    assert info.family == FAMILIES[family]
    assert (tower.config.num_hidden_layers, tower.config.hidden_size) == (layers, width)
    assert (tower.parameters, tower.nbytes, tower.dtypes) == (parameters, 4 * parameters, ("float32",))


def test_info_allocates_no_params():
    tracemalloc.start()
    arrays = len(jax.live_arrays())
    clip_jax.info("random:sd15")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 123_060_480 / 5
    assert len(jax.live_arrays()) <= arrays


@pytest.mark.parametrize("call", [clip_jax.load, clip_jax.info, clip_jax.load_tokenizers])
@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("random:sd99", None, "Unknown family 'sd99'; expected one of sd15, sd21"),
        ("random:", None, "Unknown family ''; expected one of sd15, sd21"),
        ("random:sd15", "sd21", "random:sd15 is of family 'sd15'; family='sd21' was asked for"),
        ("random:sd15", "sd99", "Unknown family 'sd99'"),
    ],
)
def test_wrong_random_names_are_refused(call, name, family, message):
    with pytest.raises(CheckpointError, match=message):
        call(name, family=family)


@pytest.mark.parametrize("call", [clip_jax.load, clip_jax.info, clip_jax.load_tokenizers])
@pytest.mark.parametrize("options", [{"config": {"clip_l": TINY}}, {"text_projection": "as_is"}])
def test_random_weights_take_no_description(call, options):
    with pytest.raises(CheckpointError, match="random:sd15 is of the full size; expected no config or text_projection"):
        call("random:sd15", **options)


@pytest.mark.parametrize("name", [["random:sd15"], Path("random:sd15")])
def test_random_weights_are_no_path_and_not_one_of_several(name):
    with pytest.raises(CheckpointError, match="'random:sd15' is no path; `clip_jax.load` takes it as a str"):
        clip_jax.load(name)


# --- what is not found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": object()}, "Expected mesh to be a jax.sharding.Mesh, found object"),
        ({"rules": []}, "pass mesh= as well"),
        ({"text_projection": "upside down"}, "text_projection"),
        ({"config": {"clip_l": {"model_type": "bert"}}}, "found model_type 'bert'"),
    ],
)
def test_arguments_are_looked_at_before_the_source_is(options, message):
    with pytest.raises(ClipJaxError, match=message):
        clip_jax.load("not/there", **options)


@pytest.mark.parametrize("call", [clip_jax.load, clip_jax.info, clip_jax.load_tokenizers])
@pytest.mark.parametrize(
    "name", ["./models/sd51", "sd15", "a/b/c", "/models/sd15", "~nobody-of-that-name/x", "owner/", "random"]
)
def test_a_mistyped_path_is_no_hub_repo(call, name):
    message = rf"^'{name}' does not exist\. Expected a folder, a file of weights, a Hub repo id .*, or random:FAMILY\.$"
    with pytest.raises(CheckpointError, match=message):
        call(name)


def test_a_link_to_nowhere_is_no_hub_repo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sd15").symlink_to("/mnt/nowhere")
    with pytest.raises(CheckpointError, match=r"models/sd15 is a link to /mnt/nowhere, which is not there\."):
        clip_jax.load("models/sd15")


def test_a_path_object_is_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="^'owner/name' does not exist"):
        clip_jax.load(tmp_path.relative_to(tmp_path) / "owner" / "name")


def test_a_home_folder_is_found(tiny_sd15, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_sd15.parent))
    assert clip_jax.info("~/sd15", family="sd15").towers["clip_l"].config == TINY


def test_a_folder_comes_before_a_hub_repo(tiny_sd15, monkeypatch):
    monkeypatch.chdir(tiny_sd15.parent.parent)
    name = f"{tiny_sd15.parent.name}/sd15"
    assert clip_jax.info(name, family="sd15").towers["clip_l"].config == TINY


# --- families and info


@pytest.mark.parametrize("call", [clip_jax.load, clip_jax.info, clip_jax.load_tokenizers])
def test_the_family_of_a_converted_model_is_made_sure_of(call, encoder, tmp_path):
    encoder.save(tmp_path / "saved")
    assert call(tmp_path / "saved", family="sd15")
    for family, message in {
        "sd21": "saved is of family 'sd15'; family='sd21' was asked for",
        "sd99": "Unknown family 'sd99'",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            call(tmp_path / "saved", family=family)


def test_info_tells_the_same_of_a_source_and_of_what_is_made_of_it(tiny_sd15, tmp_path):
    source = clip_jax.info(tiny_sd15, family="sd15")
    assert source.towers["clip_l"].parameters == 1_609_216
    assert source.towers["clip_l"].nbytes == 4 * 1_609_216
    converted = clip_jax.info(convert(tiny_sd15, tmp_path / "out", family="sd15", dtype="float16"))
    assert converted.family == source.family
    assert converted.towers["clip_l"].nbytes == 2 * 1_609_216
    assert converted.towers["clip_l"].dtypes == ("float16",)


def test_a_converted_model_takes_another_tokenizer(encoder, tiny_sd21, tmp_path):
    encoder.save(tmp_path / "saved")
    other = clip_jax.load(tmp_path / "saved", tokenizer=tiny_sd21 / "tokenizer")
    assert other.tokenizers["clip_l"].pad_token == "!"


# --- progress


def load_converted(source, out, *, progress, family):
    out = out.parent / "converted"
    if not out.exists():
        convert(source, out, family=family, progress=False)
    return clip_jax.load(out, progress=progress)


@pytest.mark.parametrize(
    ("call", "bars"),
    [
        (lambda source, out, **kw: clip_jax.load(source, **kw), ["Loading"]),
        (load_converted, ["Loading"]),
        (lambda source, out, **kw: load_random(**kw), ["Drawing random weights"]),
        (convert, ["Hashing", "Converting"]),
    ],
    ids=["load", "load converted", "load random", "convert"],
)
def test_progress_is_written_to_stderr_if_asked_for(tiny_sd15, tmp_path, capsys, small, call, bars):
    for progress in (False, None):
        call(tiny_sd15, tmp_path / str(progress), family="small", progress=progress)
        assert capsys.readouterr() == ("", "")
    call(tiny_sd15, tmp_path / "shown", family="small", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    for bar in bars:
        assert f"{bar}:" in err


def test_progress_is_shown_on_a_terminal(tiny_sd15, tmp_path, monkeypatch):
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    os.set_blocking(master, False)
    with open(slave, "w") as terminal, open(master, "rb", buffering=0) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            clip_jax.load(convert(tiny_sd15, tmp_path / "out", family="sd15"))
        written = reader.read(65536).decode()
    for bar in ("Hashing:", "Converting:", "Loading:"):
        assert bar in written


def test_a_name_too_long_for_a_path_is_not_there():
    with pytest.raises(CheckpointError, match="does not exist"):
        clip_jax.load("a" * 5000)


@pytest.mark.parametrize(
    "options", [{"dtype": "float64", "param_dtype": "float32"}, {"param_dtype": "int8"}, {"cache_bytes": -1}]
)
def test_options_are_looked_at_before_anything_is_read(options, tmp_path):
    with pytest.raises(ClipJaxError, match="dtype|cache_bytes") as raised:
        clip_jax.load(tmp_path / "absent", **options)
    assert "does not exist" not in str(raised.value)


# --- a folder that is replaced while it is read


@pytest.fixture(scope="module")
def exported(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for version in ("out", "new"):
        encoder.export(folder / version)
    return folder


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("read", [clip_jax.load, clip_jax.load_exported])
def test_versions_of_a_folder_are_not_mixed(exported, tmp_path, monkeypatch, read, fails):
    for version in ("out", "new"):
        shutil.copytree(exported / version, tmp_path / version)
    read_params = ckpt.read_params

    def replaced_first(*arguments, **options):
        (tmp_path / "out").rename(tmp_path / "old")
        (tmp_path / "new").rename(tmp_path / "out")
        if fails:
            raise CheckpointError("files in it are missing")
        return read_params(*arguments, **options)

    monkeypatch.setattr(ckpt, "read_params", replaced_first)
    with pytest.raises(CheckpointError, match=r"out was replaced while it was read\. Try again\.$"):
        read(tmp_path / "out")
    monkeypatch.undo()
    assert read(tmp_path / "out")("a cat").prompt_embeds.shape == (2, 77, 32)


def test_what_cannot_be_read_is_told_as_it_is(encoder, tmp_path, monkeypatch):
    encoder.save(tmp_path / "out")

    def fails(*_, **__):
        raise CheckpointError("files in it are missing")

    monkeypatch.setattr(ckpt, "read_params", fails)
    with pytest.raises(CheckpointError, match="^files in it are missing$"):
        clip_jax.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ("config.json", "str"),
        (clip_jax.ClipTextConfig.sd15(), "ClipTextConfig"),
        (clip_jax.ClipTextConfig.sd15().to_hf(), "the dict of a config.json"),
    ],
)
def test_a_config_without_its_tower_is_refused(tiny_sd15, config, found):
    with pytest.raises(clip_jax.ConfigError, match=rf"Expected config to name towers, such as .* found {found}\."):
        clip_jax.load(tiny_sd15, family="sd15", config=config)
