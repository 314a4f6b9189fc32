"""Flax's msgpack files, as `flax.serialization` writes them, and what is wrong with those that are not whole."""

import struct
from pathlib import Path

import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from clip_jax.convert.readers import open_file
from clip_jax.convert.readers.msgpack import _Walker
from clip_jax.errors import CheckpointError

DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int8", "uint8", "bool")


def tree():
    rng = np.random.default_rng(0)
    return {
        "text_model": {"kernel": rng.standard_normal((3, 4)).astype(np.float32), "bias": np.zeros(0, np.float32)},
        "wide": {"x": rng.standard_normal((50, 40)).astype(np.float16)},
        "scalar": np.float32(3),
        "dtypes": {name: np.array([0, 1, 1], jnp.dtype(name)) for name in DTYPES},
    }


def write(path, value):
    path.write_bytes(flax.serialization.msgpack_serialize(value))
    return path


@pytest.mark.parametrize("chunk", [2**30, 1000])
def test_every_array_is_that_of_flax(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk)
    file = open_file(write(tmp_path / "x", tree()))
    expected = flatten_dict(flax.serialization.msgpack_restore((tmp_path / "x").read_bytes()), sep="/")
    assert file.format == "Flax msgpack"
    assert file.tensors.keys() == expected.keys()
    for name, array in expected.items():
        found = file.read(name)
        assert file.tensors[name].shape == found.shape == np.shape(array)
        assert file.tensors[name].dtype == found.dtype == array.dtype
        assert found.tobytes() == np.asarray(array).tobytes()


def test_the_chunks_of_the_test_are_chunks(tmp_path, monkeypatch):
    """Negative control of the test above."""
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
    assert b"__msgpack_chunked_array__" in write(tmp_path / "x", tree()).read_bytes()


def test_a_tensor_is_a_view_that_cannot_be_written_to(tmp_path):
    array = open_file(write(tmp_path / "x", tree())).read("text_model/kernel")
    assert not array.flags.owndata
    assert not array.flags.writeable


@pytest.mark.parametrize("beside", [{}, {"opt_state": {"0": {"count": np.array(3)}}, "step": 7, "none": None}])
def test_params_of_a_train_state_are_unwrapped(tmp_path, beside):
    assert set(open_file(write(tmp_path / "x", {"params": {"a": {"b": np.ones(2)}}, **beside})).tensors) == {"a/b"}


def test_a_tensor_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="expected a tensor 'x', found 14 others"):
        open_file(write(tmp_path / "x", tree())).read("x")


def packed(shape, dtype, data, code=1):
    """An array as flax packs one, with any shape, dtype and bytes."""
    payload = b"\x93" + bytes([0x90 | len(shape)]) + b"".join(b"\xcf" + struct.pack(">Q", size) for size in shape)
    payload += bytes([0xA0 | len(dtype)]) + dtype.encode() + b"\xc4" + bytes([len(data)]) + data
    return b"\x81\xa1a\xc7" + bytes([len(payload), code]) + payload


def test_the_packing_of_the_tests_is_that_of_flax():
    """Negative control of those below."""
    restored = flax.serialization.msgpack_restore(packed((2,), "float32", bytes(8)))
    np.testing.assert_array_equal(restored["a"], np.zeros(2, np.float32), strict=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (packed((2,), "float32", bytes(8))[:-1], "cut short"),
        (packed((2,), "float32", bytes(8)) + b"\0", "expected the end at byte .*, found 1 more"),
        (packed((3,), "float32", bytes(8)), "to have another shape"),
        (packed((2**63, 2**63, 0), "float32", b""), "another shape"),
        (packed((2,), "object", bytes(16)), "found dtype 'object'"),
        (packed((2,), "complex64", bytes(16)), "found dtype 'complex64'"),
        (b"\x81\xa1a\x93\1\2\3", "found a list"),
        (b"\x82\xa1a" + packed((1,), "int8", b"x")[3:] + b"\xa1a" + packed((1,), "int8", b"x")[3:], "found it twice"),
        (b"\x81" * 100 + b"\xa1a", "is damaged|cut short"),
        (b"\x81\xa1a" * 100 + b"\xc0", "expected maps at most 64 deep"),
        (b"\xdf\xff\xff\xff\xff\xa1a\xc0", "cut short"),
        (b"\x81\xdb\xff\xff\xff\xffa", "cut short"),
        (b"\x81\xa2\xff\xfe\xc0", "expected UTF-8"),
        (b"\x81\xc0\xc0", "expected a name for a key"),
        (b"\x81\xa1a\xc1", "begins nothing: 0xc1"),
        (b"\x81\xa1a\xc7\x05\x01\x93\x90\xa1x\xc0", "is damaged"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_file(tmp_path / "x")


def test_an_empty_array_may_be_of_any_width(tmp_path):
    (tmp_path / "x").write_bytes(packed((2**40, 0), "float32", b""))
    assert open_file(tmp_path / "x").read("a").shape == (2**40, 0)


@pytest.mark.parametrize(("shape", "dtype"), [((0, 2**61), "float64"), ((2**62, 0), "float32")])
def test_an_empty_array_that_numpy_could_not_have_is_refused(tmp_path, shape, dtype):
    (tmp_path / "x").write_bytes(packed(shape, dtype, b""))
    with pytest.raises(CheckpointError, match="damaged"):
        open_file(tmp_path / "x")


def test_chunks_that_do_not_make_up_the_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
    content = write(tmp_path / "x", {"a": np.zeros((50, 40), ml_dtypes.bfloat16)}).read_bytes()
    assert content.count(b"\xa11(") == 1  # the second dimension, 40
    (tmp_path / "x").write_bytes(content.replace(b"\xa11(", b"\xa11)"))
    with pytest.raises(CheckpointError, match="expected chunks of 'a' that make up shape"):
        open_file(tmp_path / "x")


@pytest.mark.parametrize(("content", "number"), [(b"\xd0\xfe", -2), (b"\xd1\x80\x00", -(2**15))])
def test_numbers_below_zero(content, number):
    assert _Walker(Path("x"), np.frombuffer(content, np.uint8))._head() == ("int", number)
