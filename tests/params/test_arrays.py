"""What Orbax has written, read by TensorStore alone: the same bits, no copy too many, nothing made up."""

import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from clip_jax.params.arrays import open_arrays
from clip_jax.params.shapes import flatten


def floats(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


TREE = {
    "tower": {
        "embedding": floats((50, 32)),
        "layers": {"0": {"kernel": floats((32, 64), 1)}, "1": {"kernel": floats((32, 64), 2)}},
        "half": floats(7, 3).astype(ml_dtypes.bfloat16),
        "short": floats((3, 5), 4).astype(np.float16),
        "bytes": np.arange(-128, 128, dtype=np.int8).reshape(2, 128),
        "nibbles": np.arange(-8, 8).astype(ml_dtypes.int4).reshape(4, 4),
        "zeros": np.zeros((5, 5), np.float32),
    }
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("arrays") / "saved"
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = 2048  # the kernels have four chunks each
    with context:
        ocp.save(path, jax.tree.map(jnp.asarray, TREE))
    return path / "state"


def test_shapes_dtypes_and_bits_are_those_that_were_written(folder):
    arrays, written = open_arrays(folder), flatten(TREE)
    assert sorted(arrays) == sorted(written)
    for path, array in arrays.items():
        assert (array.shape, array.dtype) == (written[path].shape, written[path].dtype)
        read = array.read(array.dtype).result()
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read.view(np.uint8), written[path].view(np.uint8))


def test_a_part_is_that_of_numpy(folder):
    array = open_arrays(folder)["tower/layers/0/kernel"]
    whole = TREE["tower"]["layers"]["0"]["kernel"]
    for index in ((slice(8, 16), slice(None)), (slice(None), slice(3, 61)), (slice(0, 32), slice(0, 64))):
        np.testing.assert_array_equal(array.read(array.dtype, index).result(), whole[index])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_a_cast_rounds_as_numpy_does(folder, dtype):
    for path in ("tower/embedding", "tower/layers/1/kernel"):
        read = open_arrays(folder)[path].read(np.dtype(dtype)).result()
        np.testing.assert_array_equal(read.view(np.uint16), flatten(TREE)[path].astype(dtype).view(np.uint16))


def test_a_cpu_takes_the_memory_as_it_is(folder):
    for array in open_arrays(folder).values():
        if array.dtype == np.float32:
            read = array.read(array.dtype).result()
            placed = jax.device_put(read, jax.devices("cpu")[0])
            assert placed.unsafe_buffer_pointer() == read.ctypes.data


def test_the_files_may_go_once_it_has_been_read(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    arrays = open_arrays(copy)
    read = {path: array.read(array.dtype).result() for path, array in arrays.items()}
    for file in copy.rglob("*"):
        if file.is_file():
            file.write_bytes(b"\1" * file.stat().st_size)
    np.testing.assert_array_equal(read["tower/embedding"], TREE["tower"]["embedding"])


def test_a_chunk_that_is_missing_is_not_taken_for_zeros(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{copy}/"}).result()
    chunks = [key for key in store.list().result() if key.startswith(b"tower.embedding/c/")]
    assert len(chunks) > 1
    store.delete_range(ts.KvStore.KeyRange(chunks[0], chunks[0] + b"\0")).result()
    reading = open_arrays(copy)["tower/embedding"].read(np.dtype(np.float32))
    with pytest.raises(ValueError, match="missing"):
        reading.result()


def test_an_empty_folder_has_none(tmp_path):
    assert open_arrays(tmp_path) == {}
