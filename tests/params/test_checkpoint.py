"""Orbax folders: round trips, partial reads, and every way in which one can be wrong."""

import json
import logging
import re
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clip_jax
from clip_jax import CheckpointError
from clip_jax.params import checkpoint as ckpt
from clip_jax.params.shapes import flatten
from tests.checkpoints import digests


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    encoder.save(path)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_round_trip_is_exact(encoder, saved):
    jax.tree.map(np.testing.assert_array_equal, clip_jax.load(saved).params, encoder.params)


def test_params_are_plain_nested_dicts_on_the_device(saved):
    params = clip_jax.load(saved).params
    assert type(params) is type(params["clip_l"]) is dict
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_orbax_reads_the_folder_without_this_package(encoder, saved):
    from orbax.checkpoint import v1 as ocp

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        ocp.metadata(saved).metadata,
    )
    jax.tree.map(np.testing.assert_array_equal, ocp.load(saved, abstract), encoder.params)


@pytest.mark.parametrize("ahead", [1, 10_000])
def test_however_much_is_read_ahead_the_params_are_the_same(encoder, saved, monkeypatch, ahead):
    monkeypatch.setattr(ckpt, "_READ_BYTES", ahead)
    jax.tree.map(np.testing.assert_array_equal, clip_jax.load(saved).params, encoder.params)


def clip_jax_specs(path):
    return ckpt.read_specs(path, ckpt.read_metadata(path).configs)["clip_l"]


@pytest.mark.slow
def test_threads_write_one_after_the_other(encoder, tmp_path):
    """Orbax' own threads may wait for ever for each other's, where two write at once."""
    writing, most = [], []

    def extra(folder):
        writing.append(folder)
        most.append(len(writing))
        time.sleep(0.2)
        writing.remove(folder)

    threads = [threading.Thread(target=encoder._save, args=(tmp_path / str(n), False, extra)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]
    for n in range(3):
        jax.tree.map(np.testing.assert_array_equal, clip_jax.load(tmp_path / str(n)).params, encoder.params)


def test_bfloat16_is_stored_and_read_as_such(encoder, tiny_sd15, tmp_path):
    low = clip_jax.load(tiny_sd15, family="sd15", dtype="bfloat16")
    low.save(tmp_path / "low")
    assert clip_jax.info(tmp_path / "low").towers["clip_l"].dtypes == ("bfloat16",)
    again = clip_jax.load(tmp_path / "low", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, again.params, low.params)


def test_wrong_family_is_an_error(saved):
    with pytest.raises(CheckpointError, match="is of family 'sd15'; family='sd21' was asked for"):
        clip_jax.load(saved, family="sd21")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("copy.partial_save", "never finished.*interrupted. Convert again"),
        ("copy", "lacks commit_success.txt. Copy it"),
    ],
)
def test_an_interrupted_run_is_refused(copy, name, message):
    (copy / "commit_success.txt").unlink()
    path = copy.rename(copy.parent / name)
    with pytest.raises(CheckpointError, match=message):
        clip_jax.load(path)


def test_what_orbax_leaves_of_an_interrupted_save_is_refused(encoder, tmp_path):
    from orbax.checkpoint import v1 as ocp

    layers = encoder.params["clip_l"]["text_model"]["encoder"]["layers"]
    ocp.partial.save(tmp_path / "model", {"clip_l": layers["0"]})
    (left,) = tmp_path.iterdir()
    with pytest.raises(CheckpointError, match="never finished"):
        clip_jax.load(left)


def test_an_orbax_folder_of_somebody_else_is_refused(tmp_path):
    from orbax.checkpoint import v1 as ocp

    other = tmp_path / "other"
    ocp.save(other, {"w": jnp.zeros(3)})
    for absent in ("", "commit_success.txt", "_CHECKPOINT_METADATA"):  # nobody is told to delete what is not ours
        (other / absent).is_file() and (other / absent).unlink()
        with pytest.raises(CheckpointError, match="clip_jax did not write, or not whole. Expected one made by"):
            clip_jax.load(other)


def test_an_orbax_folder_of_somebody_else_is_never_overwritten(encoder, tmp_path):
    from orbax.checkpoint import v1 as ocp

    ocp.save(tmp_path / "training", {"step": jnp.zeros(3)}, custom_metadata={"epoch": 1})
    before = digests(tmp_path)
    with pytest.raises(CheckpointError, match="not a checkpoint written by clip_jax, so it is not overwritten"):
        encoder.save(tmp_path / "training", overwrite=True)
    assert digests(tmp_path) == before


def test_a_folder_called_state_makes_no_checkpoint(tiny_sd15, tmp_path):
    shutil.copytree(tiny_sd15, tmp_path / "pipeline")
    (tmp_path / "pipeline" / "state").mkdir()
    assert clip_jax.load(tmp_path / "pipeline", family="sd15").config["clip_l"].hidden_size


def edit_metadata(path, change):
    file = path / "_CHECKPOINT_METADATA"
    stored = json.loads(file.read_text())
    change(stored["custom_metadata"])
    file.write_text(json.dumps(stored))


def test_a_newer_format_is_refused(copy):
    edit_metadata(copy, lambda m: m.update(format_version=3))
    with pytest.raises(CheckpointError, match="format version 3.*reads up to 2. Upgrade"):
        clip_jax.load(copy)


@pytest.mark.parametrize("family", ["sd99", ["sd15"]])
def test_an_unknown_family_is_refused(copy, family):
    edit_metadata(copy, lambda m: m.update(family=family))
    with pytest.raises(CheckpointError, match=rf"family {re.escape(repr(family))}, unknown to this clip_jax"):
        clip_jax.load(copy)


def test_metadata_that_is_damaged_is_refused(copy):
    for damaged in (b"{", b"\xff", b"[]", b"null", b"[" * 100_000):
        (copy / "_CHECKPOINT_METADATA").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="metadata cannot be read"):
            clip_jax.load(copy)
    (copy / "_CHECKPOINT_METADATA").write_text('{"custom_metadata": {"format": "clip_jax", "format_version": 1}}')
    with pytest.raises(CheckpointError, match="metadata cannot be read"):
        clip_jax.load(copy)


def test_an_architecture_that_the_params_do_not_have_is_refused(copy):
    edit_metadata(copy, lambda m: m["towers"]["clip_l"]["config"].update(num_hidden_layers=4))
    with pytest.raises(CheckpointError, match=r"missing \(16\): text_model/encoder/layers/3/"):
        clip_jax.load(copy)


def largest_file(path):
    return max((path / "state").rglob("d/*"), key=lambda file: file.stat().st_size)


def test_a_file_that_is_missing_or_cut_short_is_an_error(copy):
    data = largest_file(copy)
    whole = data.read_bytes()
    data.write_bytes(whole[:100])
    with pytest.raises(
        CheckpointError, match=rf"is not whole. damaged \(1\): .*{data.name} has 100 of {len(whole)} bytes"
    ):
        clip_jax.load(copy)
    data.unlink()
    with pytest.raises(CheckpointError, match=rf"{data.name} is missing\. Copy it again"):
        clip_jax.load(copy)
    shutil.rmtree(copy / "tokenizers")
    with pytest.raises(CheckpointError, match=r"damaged \(3\): .*tokenizers/clip_l/tokenizer.json is missing"):
        clip_jax.load(copy)


@pytest.mark.slow
def test_data_of_the_right_size_that_cannot_be_read_is_one_line_on_the_command_line(copy):
    for file in (copy / "state").rglob("d/*"):
        file.write_bytes(b"\0" * file.stat().st_size)
    command = [
        sys.executable,
        "-c",
        f"from clip_jax.cli import main; exit(main(['embed', 'x', '--model', {str(copy)!r}]))",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.search(
        r"^clip-jax: error: .*copy cannot be read, files in it are .*damaged: .* Convert again\.$",
        done.stderr,
        re.M,
    )


@pytest.mark.parametrize("value", [1e6, -1e6])
def test_float16_overflow_on_load_names_the_parameter(encoder, tmp_path, value):
    params = jax.tree.map(lambda x: x, encoder.params)
    params["clip_l"]["text_model"]["final_layer_norm"]["bias"] = jnp.full(32, value)
    clip_jax.TextEncoder(encoder.family, params, encoder.tokenizers).save(tmp_path / "large")
    with pytest.raises(CheckpointError, match="clip_l/text_model/final_layer_norm/bias holds values up to .*float16"):
        clip_jax.load(tmp_path / "large", dtype="float16")


def test_saving_over_a_checkpoint_keeps_it_unless_told(encoder, copy):
    before = sorted(flatten(clip_jax.load(copy).params))
    with pytest.raises(CheckpointError, match="exists already"):
        encoder.save(copy)
    assert sorted(flatten(clip_jax.load(copy).params)) == before
    encoder.save(copy, overwrite=True)
    jax.tree.map(np.testing.assert_array_equal, clip_jax.load(copy).params, encoder.params)


@pytest.mark.parametrize("name", ["model [v1]", "[a]/**"])
def test_a_path_that_looks_like_a_pattern(encoder, tmp_path, name):
    out = tmp_path / name
    encoder.save(out)
    encoder.save(out, overwrite=True)
    same_params(clip_jax.load(out).params, encoder.params)
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_what_orbax_has_not_joined_is_an_error(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("orbax.checkpoint.v1.partial.finalize", lambda path: path.with_name("new").mkdir())
    with pytest.raises(CheckpointError, match="out cannot be written: Orbax has not joined what it wrote"):
        encoder.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["missing", "extra", "rows", "empty"])
def test_params_that_nobody_could_load_are_not_written(encoder, copy, wrong):
    before = ckpt.read_params(copy, ckpt.stored_specs(copy), None)
    params = jax.tree.map(lambda leaf: leaf, encoder.params)
    text_model = params["clip_l"]["text_model"]
    match wrong:
        case "missing":
            del text_model["final_layer_norm"]["bias"]
        case "extra":
            params["clip_l"]["lora"] = {"a": jnp.ones(3)}
        case "rows":
            table = text_model["embeddings"]["token_embedding"]
            table["embedding"] = jnp.concatenate([table["embedding"], table["embedding"][:2]])
        case "empty":
            params = {}
    broken = clip_jax.TextEncoder(encoder.family, params, encoder.tokenizers)
    expected = "Expected params of clip_l, found none" if wrong == "empty" else "params does not match its architecture"
    with pytest.raises(CheckpointError, match=expected):
        broken.save(copy, overwrite=True)
    same_params(ckpt.read_params(copy, ckpt.stored_specs(copy), None), before)


def same_params(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_params_that_are_gone_are_not_a_full_disk(encoder, tmp_path):
    params = jax.tree.map(jnp.copy, encoder.params)
    donated = clip_jax.TextEncoder(encoder.family, params, encoder.tokenizers)
    params["clip_l"]["text_model"]["final_layer_norm"]["bias"].delete()
    with pytest.raises(CheckpointError, match="clip_l/text_model/final_layer_norm/bias has been deleted"):
        donated.save(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_the_log_of_absl_is_quiet_meanwhile_alone(encoder, tmp_path):
    logger = logging.getLogger("absl")
    before = logger.level
    encoder.save(tmp_path / "out")
    assert logger.level == before != logging.CRITICAL
