"""Which files of a folder are read, and which shards of an index."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from clip_jax.convert.source import WEIGHTS, open_source, pick_weights, sha256
from clip_jax.errors import CheckpointError


def save(path: Path, **tensors: float) -> None:
    save_file({name: np.full((2,), value, np.float32) for name, value in tensors.items()}, path)


def save_index(folder: Path, weight_map: object, variant: str = "") -> None:
    (folder / f"model.safetensors.index{variant}.json").write_text(json.dumps({"weight_map": weight_map}))


def test_one_file(tmp_path):
    save(tmp_path / "clip_l.safetensors", a=1, b=2)

    source = open_source(tmp_path / "clip_l.safetensors")

    assert source.files == (tmp_path / "clip_l.safetensors",)
    assert source.format == "safetensors"
    assert set(source.state) == {"a", "b"}
    np.testing.assert_array_equal(source.state["b"].read(), np.array([2, 2], np.float32), strict=True)


def test_the_order_in_which_names_are_tried(tmp_path):
    for value, name in enumerate(WEIGHTS):
        if name.endswith(".json"):
            shard = f"shard-{value:02}.safetensors"
            save(tmp_path / shard, a=value)
            (tmp_path / name).write_text(json.dumps({"weight_map": {"a": shard}}))
        else:
            save(tmp_path / name, a=value)
    for name in ("model.fp32.safetensors", "diffusion_pytorch_model.bin", "tf_model.h5"):
        (tmp_path / name).write_text("not looked at")

    for value, name in enumerate(WEIGHTS):
        assert pick_weights([path.name for path in tmp_path.iterdir()]) == name
        np.testing.assert_array_equal(open_source(tmp_path).state["a"].read(), value)
        (tmp_path / name).unlink()
    assert pick_weights([path.name for path in tmp_path.iterdir()]) is None
    assert WEIGHTS[:3] == ("model.safetensors", "model.safetensors.index.json", "model.fp16.safetensors")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "expected model.safetensors .* found no weights at all. Check the path"),
        (["config.json", "tf_model.h5", "model.onnx"], "found model.onnx, tf_model.h5. Name the file itself"),
        (["clip_l.safetensors", "x.ckpt"], "found clip_l.safetensors, x.ckpt. Name the file itself"),
    ],
)
def test_no_weights_of_a_usual_name(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(b"")

    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")


def test_no_folder_at_the_path(tmp_path):
    with pytest.raises(CheckpointError, match=r"text_encoder: expected a file of weights, found no file\. Check"):
        open_source(tmp_path / "text_encoder")


def test_shards_are_one_source(tmp_path):
    save(tmp_path / "model-1.safetensors", a=1, b=2)
    save(tmp_path / "model-2.safetensors", c=3)
    save(tmp_path / "model-3.safetensors", d=4)  # of another checkpoint: in no index
    save_index(tmp_path, {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"})

    source = open_source(tmp_path)

    assert source.files == (tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors")
    assert {name: float(tensor.read()[0]) for name, tensor in source.state.items()} == {"a": 1, "b": 2, "c": 3}


def test_an_index_by_its_own_path(tmp_path):
    save(tmp_path / "part-1.safetensors", a=1)
    (tmp_path / "other.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))

    assert set(open_source(tmp_path / "other.safetensors.index.json").state) == {"a"}


def test_an_index_that_came_without_its_shards_is_passed_over(tmp_path):
    """As downloads of "*.json" and "*fp16*" leave it."""
    save_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    save(tmp_path / "model.fp16-1.safetensors", a=1)
    save(tmp_path / "model.fp16-2.safetensors", b=2)
    save_index(tmp_path, {"a": "model.fp16-1.safetensors", "b": "model.fp16-2.safetensors"}, ".fp16")
    assert {path.name for path in open_source(tmp_path).files} == {
        "model.fp16-1.safetensors",
        "model.fp16-2.safetensors",
    }

    save(tmp_path / "model-2.safetensors", b=1)  # a part of it is there
    with pytest.raises(CheckpointError, match=r"2 shards .* 1 are missing: model-1.safetensors"):
        open_source(tmp_path)


def test_what_comes_after_what_is_read_is_not_looked_at(tmp_path):
    save(tmp_path / "model.safetensors", a=1)
    (tmp_path / "model.safetensors.index.fp16.json").write_text("damaged")
    assert [path.name for path in open_source(tmp_path).files] == ["model.safetensors"]


def test_an_index_without_shards_beside_nothing_else(tmp_path):
    save_index(tmp_path, {"a": "model-1.safetensors"})
    with pytest.raises(CheckpointError, match=r"1 shards .* 1 are missing: model-1.safetensors"):
        open_source(tmp_path)


def test_all_missing_shards_are_named(tmp_path):
    save(tmp_path / "model-2.safetensors", b=1)
    save_index(tmp_path, {name: f"model-{i}.safetensors" for i, name in enumerate("abc", 1)})

    with pytest.raises(CheckpointError, match=r"3 shards .* 2 are missing: model-1.safetensors, model-3.safetensors"):
        open_source(tmp_path)


def test_what_the_shards_hold_counts_and_not_what_the_index_lists(tmp_path):
    save(tmp_path / "model-1.safetensors", a=1, extra=2)
    save(tmp_path / "model-2.safetensors", b=3)
    places = {"a": 1, "gone": 1, "b": 1, "none": 2}
    save_index(tmp_path, {name: f"model-{shard}.safetensors" for name, shard in places.items()})

    state = open_source(tmp_path).state

    assert {name: float(tensor.read()[0]) for name, tensor in state.items()} == {"a": 1, "extra": 2, "b": 3}


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    save(tmp_path / "model-1.safetensors", a=1, both=1)
    save(tmp_path / "model-2.safetensors", both=2)
    save_index(tmp_path, {"a": "model-1.safetensors", "both": "model-2.safetensors"})

    message = r"expected every tensor in one shard, found 'both' in model-1\.safetensors and model-2\.safetensors\. Get"
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


def test_very_many_faults_are_cut(tmp_path):
    for shard in (1, 2):
        save(tmp_path / f"model-{shard}.safetensors", **dict.fromkeys(map(str, range(1000)), 1))
    save_index(tmp_path, {str(shard): f"model-{shard}.safetensors" for shard in (1, 2)})

    with pytest.raises(CheckpointError, match=r"model-2\.safetensors and 980 more\. Get") as caught:
        open_source(tmp_path)
    assert len(str(caught.value)) < 2000


OUTSIDE = ["../model.safetensors", "/model.safetensors", "a/b.safetensors", "a\\b.safetensors", "", ".."]
NO_SHARD = ["model.h5", "a\0.safetensors", "a.safetensors\n", 3, None, ["model.safetensors"]]


@pytest.mark.parametrize("shard", OUTSIDE + NO_SHARD)
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, shard):
    save_index(tmp_path, {"a": "model-1.safetensors", "b": shard})

    with pytest.raises(CheckpointError, match="expected plain names of weight files, found ") as caught:
        open_source(tmp_path)
    assert f"found {shard!r}." in str(caught.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json: is damaged: expected JSON, found Expecting"),
        ("[]", "index.json: is damaged: expected a JSON object, found a list"),
        ("{}", "index.json: expected a weight_map from tensor names to shards, found NoneType"),
        ('{"weight_map": []}', "expected a weight_map from tensor names to shards, found list"),
        ('{"weight_map": {}}', "expected a weight_map from tensor names to shards, found an empty one"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "found the key 'a' twice"),
    ],
)
def test_damaged_indices(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)

    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


def test_an_index_that_cannot_be_read(tmp_path):
    (tmp_path / "model.safetensors.index.json").mkdir()

    with pytest.raises(CheckpointError, match=r"index\.json: cannot be read: Is a directory"):
        open_source(tmp_path)


def test_sha256_of_every_file(tmp_path):
    content = {f"model-{i}.safetensors": i for i in (1, 2)}
    for name, value in content.items():
        save_file({name: np.full((1 << 19,), value, np.float32)}, tmp_path / name)
    save_index(tmp_path, {name: name for name in content})
    steps: list[int] = []

    digests = {path.name: sha256(path, steps.append) for path in open_source(tmp_path).files}

    assert digests == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in content}
    assert sum(steps) == sum((tmp_path / name).stat().st_size for name in content)
    assert len(steps) > 2  # several for each file: a bar moves
    assert sha256(tmp_path / "model-1.safetensors") == digests["model-1.safetensors"]
