"""PyTorch's files without torch: what is read, and what is wrong with a file that is not. tests/parity has torch."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from clip_jax.convert.readers import open_file
from clip_jax.convert.readers.torch_pickle import _Machine, load_pickle
from clip_jax.convert.readers.torch_tensors import Storage, strided
from clip_jax.errors import CheckpointError
from tests.convert import malicious
from tests.formats import torch_zip
from tests.formats.torch_zip import Global, write_torch_zip

STATE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.array([1, -1], np.float16), "n": np.array(7)}


def rezip(path, change, **options):
    """Writes the entries of a zip file again, after `change(name, data)`; None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in entries.items():
            changed = change(name, data)
            if changed is not None:
                archive.writestr(*changed)
    return path


def test_a_zip_file(tmp_path):
    file = open_file(write_torch_zip(tmp_path / "x", STATE))
    assert file.format == "PyTorch zip"
    assert {name: info.shape for name, info in file.tensors.items()} == {"a": (2, 3), "b.c": (2,), "n": ()}
    for name, array in STATE.items():
        np.testing.assert_array_equal(file.read(name), array, strict=True)
    with pytest.raises(CheckpointError, match="expected a tensor 'c', found 3 others"):
        file.read("c")


def test_a_tensor_is_a_view_that_cannot_be_written_to(tmp_path):
    array = open_file(write_torch_zip(tmp_path / "x", STATE)).read("a")
    assert not array.flags.owndata
    assert not array.flags.writeable


@pytest.mark.parametrize(("dtype", "storage"), [("complex64", "ComplexFloat"), ("complex128", "ComplexDouble")])
def test_complex_numbers_are_read(tmp_path, monkeypatch, dtype, storage):
    """A buffer of rotary positions, in a model beside the text encoder."""
    monkeypatch.setitem(torch_zip._STORAGES, dtype, f"{storage}Storage")
    array = np.array([1 + 2j, -3j], dtype)
    file = open_file(write_torch_zip(tmp_path / "x", {"freqs": array, **STATE}))
    np.testing.assert_array_equal(file.read("freqs"), array, strict=True)
    np.testing.assert_array_equal(file.read("a"), STATE["a"], strict=True)


@pytest.mark.parametrize("beside", [{}, {"epoch": 3, "name": "x", "opt": [np.ones(2, np.float32)], "none": None}])
def test_a_state_dict_is_unwrapped_and_what_lies_beside_it_left_out(tmp_path, beside):
    file = open_file(write_torch_zip(tmp_path / "x", {"state_dict": STATE, **beside}))
    assert set(file.tensors) == set(STATE)


def test_nested_dicts_become_dotted_names(tmp_path):
    file = open_file(write_torch_zip(tmp_path / "x", {"model": {"a": STATE["a"], "b": {"c": STATE["n"]}}}))
    assert set(file.tensors) == {"model.a", "model.b.c"}


def test_a_name_that_comes_about_twice_is_refused(tmp_path):
    path = write_torch_zip(tmp_path / "x", {"a": {"b": STATE["a"]}, "a.b": STATE["n"]})
    with pytest.raises(CheckpointError, match=r"expected every name once, found 'a\.b' twice"):
        open_file(path)


def test_classes_of_lightning_are_inert(tmp_path):
    kinds = [Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"), Global("lightning", "X")]
    data = {"callbacks": dict.fromkeys(kinds, 3), "state_dict": STATE, "hparams": Global("argparse", "Namespace")}
    assert set(open_file(write_torch_zip(tmp_path / "x", data)).tensors) == set(STATE)


def test_what_has_a_tuple_for_a_key_is_left_out():
    """Settings, beside a state dict. A tuple of tuples that is short to write may take for ever to hash: none is."""
    nested = ()
    for _ in range(60):
        nested = (nested, nested)
    key = pickle.dumps(nested, 2)[2:-1]  # without its frame
    dumped = b"\x80\2}" + key + b"K\1sX\1\0\0\0aK\2s."
    assert load_pickle(io.BytesIO(dumped), Path("x")).value == {"a": 2}


def test_zip64(tmp_path):
    """As files of more than four gigabytes have it."""
    path = write_torch_zip(tmp_path / "x", STATE)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            with archive.open(name, "w", force_zip64=True) as entry:
                entry.write(data)
    np.testing.assert_array_equal(open_file(path).read("a"), STATE["a"], strict=True)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda n, d: (n, d), {"compression": zipfile.ZIP_DEFLATED}, r"'archive/\w+\S*' is compressed, .*zip -0"),
        (lambda n, d: None if n.endswith("data.pkl") else (n, d), {}, "found one without data.pkl: archive/byteorder"),
        (lambda n, d: None if n.endswith("data/0") else (n, d), {}, "expected the entry 'archive/data/0', found none"),
        (lambda n, d: (n, d[:-1] if n.endswith("data.pkl") else d), {}, "its pickle cannot be read"),
        (lambda n, d: (n, d[:8] if n.endswith("data/0") else d), {}, "expected 24 bytes in 'archive/data/0', found 8"),
        (lambda n, d: (n, b"big" if n.endswith("order") else d), {}, "big-endian machine"),
        (lambda n, d: ("a.txt", d) if n.endswith("data.pkl") else None, {}, r"without data\.pkl: a\.txt"),
    ],
    ids=["compressed", "no pickle", "no storage", "pickle cut", "storage cut", "big-endian", "another zip"],
)
def test_zip_files_that_are_refused(tmp_path, change, options, message):
    path = rezip(write_torch_zip(tmp_path / "x", STATE), change, **options)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_file(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_an_entry_twice_is_refused(tmp_path):
    path = write_torch_zip(tmp_path / "x", STATE)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", bytes(24))
    with pytest.raises(CheckpointError, match="expected every entry once, found some twice"):
        open_file(path)


def test_an_entry_of_two_names_is_refused(tmp_path):
    """Another reader of zip files would take other bytes for it."""
    path = write_torch_zip(tmp_path / "x", STATE)
    path.write_bytes(path.read_bytes().replace(b"archive/data/0", b"archive/data/9", 1))
    with pytest.raises(CheckpointError, match="one name of the entry that the directory calls 'archive/data/0'"):
        open_file(path)


def test_a_directory_without_bound_is_refused(tmp_path):
    """As it is read whole, and a thousand times as much memory made of it."""
    path = write_torch_zip(tmp_path / "x", STATE)
    content, directory = path.read_bytes(), 2**23 + 1
    end = content.rindex(b"PK\5\6")
    size = struct.pack("<I", directory)
    path.write_bytes(content[:end] + bytes(directory) + content[end : end + 12] + size + content[end + 16 :])
    with pytest.raises(CheckpointError, match="expected a directory of at most 8388608 bytes, found 8388609"):
        open_file(path)


@pytest.mark.parametrize("lengths", [b"K\2K\2\x86", b"]K\2aK\2a"], ids=["tuple", "list"])
def test_a_shape_may_be_a_torch_size(tmp_path, lengths):
    plain = malicious._tensor(0, (2, 2), (2, 1))
    tensor = plain.replace(b"K\2K\2\x86", b"ctorch\nSize\n" + lengths + b"\x85R", 1)
    assert tensor != plain
    assert open_file(legacy(tmp_path, tensor=tensor)).read("w").shape == (2, 2)


def test_a_zip_file_cut_short_is_refused(tmp_path):
    path = write_torch_zip(tmp_path / "x", STATE)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="its zip directory cannot be read"):
        open_file(path)


def test_numpys_archives_are_no_checkpoints(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    with pytest.raises(CheckpointError, match=r"without data\.pkl: a\.npy"):
        open_file(tmp_path / "x.npz")


def legacy(tmp_path, *, machine=None, keys=("0",), count=4, storage=bytes(range(16)), tensor=None):
    """A legacy file of one tensor [2, 2] with the bytes 0 to 15, or with something else about it."""
    tensor = (tensor or malicious._tensor(0, (2, 2), (2, 1))).replace(b"tQ", b"NtQ")
    content = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + malicious.dumps(1001)
    content += malicious.dumps({"little_endian": True} if machine is None else machine) + tensor
    content += malicious.dumps(list(keys)) + struct.pack("<q", count) + storage
    (tmp_path / "x").write_bytes(content)
    return tmp_path / "x"


def test_a_legacy_file(tmp_path):
    file = open_file(legacy(tmp_path))
    assert file.format == "PyTorch legacy pickle"
    assert file.read("w").tobytes() == bytes(range(16))
    assert file.read("w").shape == (2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"machine": {"little_endian": False}}, "big-endian machine"),
        ({"machine": 3}, "the facts of a machine"),
        ({"keys": []}, "expected a list of the keys of its 1 storages"),
        ({"keys": ["0", "0"]}, "expected a list of the keys"),
        ({"keys": [["0"]]}, "expected a list of the keys"),
        ({"count": 5}, "expected 4 elements in storage '0', found 5"),
        ({"storage": bytes(15)}, "expected 16 bytes of storage '0', found that 1 bytes are missing"),
        ({"tensor": b"\x80\x02K\1."}, "expected a list of the keys of its 0 storages"),
    ],
)
def test_legacy_files_that_are_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        open_file(legacy(tmp_path, **changes))


def test_another_pickle_is_not_run(tmp_path):
    file = io.BytesIO()
    pickle.Pickler(file, 2).dump({"a": 1})
    (tmp_path / "x").write_bytes(file.getvalue())
    with pytest.raises(CheckpointError, match="found another pickle. It is not run; get the model as safetensors"):
        open_file(tmp_path / "x")


def test_the_last_element_is_within_the_storage():
    storage = Storage("0", np.dtype(np.float32), 4)
    strided(storage, 0, (2,), (3,))
    for start, stride in ((0, 4), (1, 3)):
        with pytest.raises(ValueError, match="within the 4 elements"):
            strided(storage, start, (2,), (stride,))


def test_an_endless_number_is_no_key():
    machine = _Machine(Path("x"), 5)
    machine.push({})
    with pytest.raises(TypeError, match="a name or a number for a key"):
        machine.set_items([2**63, 1])


def test_names_of_an_old_zip_are_not_utf8(tmp_path):
    path = write_torch_zip(tmp_path / "x", {"a": np.ones(2, np.float32)})
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name.replace(name.split("/")[0], "ROOTQ"), content)
    path.write_bytes(path.read_bytes().replace(b"ROOTQ", b"ROOT\x82"))  # an e acute of cp437, without the flag
    np.testing.assert_array_equal(open_file(path).read("a"), [1, 1])
