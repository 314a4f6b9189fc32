"""GGUF files, written by the gguf package and by hand, and what is wrong with those that are not whole."""

import builtins
import struct

import ml_dtypes
import numpy as np
import pytest

from clip_jax.convert.readers import open_file
from clip_jax.errors import CheckpointError

F32, F16, Q8_0, BF16 = 0, 1, 8, 30


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_bytes(tensors=(), pairs=(), *, version=3, alignment=32, counts=None):
    """A file of (name, ggml shape, type, offset, bytes) and (key, type, packed value)."""
    tensors, pairs = list(tensors), list(pairs)
    header = b"GGUF" + struct.pack("<I", version)
    header += struct.pack("<QQ", *(counts or (len(tensors), len(pairs))))
    header += b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in pairs)
    for name, shape, kind, offset, _ in tensors:
        header += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        header += struct.pack("<IQ", kind, offset)
    data = bytearray()
    for _, _, _, offset, content in (tensor for tensor in tensors if tensor[4]):
        data += bytes(max(0, offset + len(content) - len(data)))
        data[offset : offset + len(content)] = content
    return header + bytes(-len(header) % alignment) + bytes(data)


VALUES = np.arange(64, dtype=np.float32).reshape(2, 32)
ONE = ("w", (32, 2), F32, 0, VALUES.tobytes())


def write(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    return tmp_path / "x"


@pytest.mark.parametrize("version", [2, 3])
def test_shapes_are_those_of_torch(tmp_path, version):
    file = open_file(write(tmp_path, gguf_bytes([ONE], version=version)))
    assert file.format == "GGUF"
    np.testing.assert_array_equal(file.read("w"), VALUES, strict=True)
    assert not file.read("w").flags.owndata
    with pytest.raises(CheckpointError, match="expected a tensor 'x', found 1 others"):
        file.read("x")


@pytest.mark.parametrize(("kind", "dtype"), [(F16, np.float16), (BF16, ml_dtypes.bfloat16), (28, np.float64)])
def test_dtypes_that_are_read_as_they_are(tmp_path, kind, dtype):
    array = VALUES.astype(dtype)
    file = open_file(write(tmp_path, gguf_bytes([("w", (32, 2), kind, 0, array.tobytes())])))
    np.testing.assert_array_equal(file.read("w"), array, strict=True)
    assert file.tensors["w"].stored is None


def test_metadata(tmp_path):
    strings = struct.pack("<IQ", 8, 2) + text("a") + text("é")
    pairs = [
        ("name", 8, text("t5encoder")),
        ("count", 4, struct.pack("<I", 7)),
        ("flag", 7, b"\1"),
        ("scores", 9, struct.pack("<IQ2f", 6, 2, 0.5, 1.5)),
        ("tokens", 9, strings),
        ("nested", 9, struct.pack("<IQ", 9, 1) + strings),
    ]
    metadata = open_file(write(tmp_path, gguf_bytes([ONE], pairs))).metadata
    assert metadata["scores"].tolist() == [0.5, 1.5]
    assert {key: value for key, value in metadata.items() if key != "scores"} == {
        "name": "t5encoder",
        "count": 7,
        "flag": True,
        "tokens": ["a", "é"],
        "nested": [["a", "é"]],
    }


def test_a_shape_that_a_tool_kept_aside(tmp_path):
    pairs = [("comfy.gguf.orig_shape.w", 9, struct.pack("<IQ2i", 5, 2, 4, 16))]
    assert open_file(write(tmp_path, gguf_bytes([ONE], pairs))).read("w").shape == (4, 16)


def test_every_quantisation_that_the_package_reads(tmp_path):
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    values = rng.standard_normal((6, 512)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "x", "t5encoder")
    expected = {}
    for kind, (size, nbytes) in gguf.GGML_QUANT_SIZES.items():
        if size == 1:
            continue
        try:
            data = gguf.quants.quantize(values, kind)
        except NotImplementedError:  # blocks of any bytes, then
            data = rng.integers(0, 256, (6, 512 // size * nbytes), dtype=np.uint8)
        try:
            with np.errstate(all="ignore"):
                expected[kind.name] = gguf.quants.dequantize(data, kind)
        except NotImplementedError:
            continue
        writer.add_tensor(kind.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = open_file(tmp_path / "x")

    assert {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"} <= expected.keys()
    assert file.tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert (file.tensors[name].stored, file.tensors[name].dtype) == (name, np.float32)
        assert file.read(name).tobytes() == array.tobytes()


def test_dequantisation_in_pieces_is_that_of_the_whole(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    values = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    path = write(tmp_path, gguf_bytes([("w", (96, 7), Q8_0, 0, data.tobytes())]))
    monkeypatch.setattr("clip_jax.convert.readers.gguf._BLOCK_VALUES", 5 * 32)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(open_file(path).read("w"), expected, strict=True)


def test_without_the_package_its_name_is_said_and_plain_files_are_read(tmp_path, monkeypatch):
    original = builtins.__import__

    def without_gguf(name, *arguments, **options):
        if name.partition(".")[0] == "gguf":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    assert open_file(write(tmp_path, gguf_bytes([ONE]))).read("w").shape == (2, 32)
    with pytest.raises(CheckpointError, match=r'quantised tensors, .*pip install "clip-jax-text\[gguf\]"'):
        open_file(write(tmp_path, gguf_bytes([("w", (32,), Q8_0, 0, bytes(34))])))


WHOLE = gguf_bytes([ONE], [("name", 8, text("x"))])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (WHOLE[:-1], "cut short: expected 256 bytes of 'w', found that 1 bytes are missing"),
        (WHOLE[:40], "1 tensors do not fit into the 16 bytes left"),
        (WHOLE[:60], "cut short"),
        (gguf_bytes([ONE], version=1), "expected GGUF of version 2 or 3, found version 1"),
        (gguf_bytes([ONE], version=0x03000000), "big-endian machine"),
        (gguf_bytes([ONE], counts=(2**60, 0)), "tensors do not fit into"),
        (gguf_bytes([ONE], counts=(0, 2**60)), "key-value pairs do not fit into"),
        (gguf_bytes([ONE], [("a", 8, struct.pack("<Q", 2**62))]), "cut short"),
        (gguf_bytes([ONE], [("a", 9, struct.pack("<IQ", 6, 2**62))]), "cut short"),
        (gguf_bytes([ONE], [("a", 9, struct.pack("<IQ", 8, 2**62))]), "entries of an array do not fit"),
        (gguf_bytes([ONE], [("a", 9, struct.pack("<IQ", 9, 1) * 10 + bytes(999))]), "found type 9 at depth 0"),
        (gguf_bytes([ONE], [("a", 99, b"")]), "found type 99"),
        (gguf_bytes([ONE], [("a", 7, b"\1"), ("a", 7, b"\1")]), "expected the key 'a' once"),
        (gguf_bytes([ONE], [("a", 8, struct.pack("<Q", 1) + b"\xff")]), "expected UTF-8"),
        (gguf_bytes([ONE], [("general.alignment", 4, struct.pack("<I", 3))]), "a power of two, found 3"),
        (gguf_bytes([ONE], [("general.alignment", 8, text("32"))]), "a power of two, found '32'"),
        (gguf_bytes([("w", (1,) * 5, F32, 0, bytes(4))]), "at most 4 dimensions of 'w', found 5"),
        (gguf_bytes([("w", (2**32, 2**32), F32, 0, bytes(4))]), "cut short"),
        (gguf_bytes([("w", (1,), F32, 4, bytes(4))]), "at a multiple of 32, found it at 4"),
        (gguf_bytes([("w", (1,), F32, 2**40, b"")]), "cut short"),
        (gguf_bytes([("a", (16,), F32, 0, bytes(64)), ("b", (8,), F32, 32, bytes(32))]), "'b' overlaps 'a'"),
        (gguf_bytes([("a", (8,), F32, 0, bytes(32)), ("a", (8,), F32, 32, bytes(32))]), "every tensor once"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        open_file(write(tmp_path, content))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (("w", (33,), Q8_0, 0, bytes(68)), r"expected rows of 32 values in 'w', found shape \(33,\)"),
        (("w", (256,), 15, 0, bytes(292)), "type Q8_K, which the package gguf does not dequantise"),
        (("w", (256,), 1234, 0, bytes(999)), "type 1234, which the package gguf does not dequantise"),
    ],
)
def test_quantised_tensors_that_are_refused(tmp_path, tensor, message):
    pytest.importorskip("gguf")
    with pytest.raises(CheckpointError, match=message):
        open_file(write(tmp_path, gguf_bytes([tensor])))


def test_rows_are_whole_blocks_of_values(tmp_path):
    """32 values in 34 bytes, in two rows of 16."""
    (tmp_path / "x").write_bytes(gguf_bytes([("w", (16, 2), 8, 0, bytes(34))]))
    with pytest.raises(CheckpointError, match="rows of 32 values"):
        open_file(tmp_path / "x")


def test_an_empty_tensor_of_an_impossible_shape_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(gguf_bytes([("w", (2**63, 0), 0, 0, b"")]))
    with pytest.raises(CheckpointError, match="too large for any array"):
        open_file(tmp_path / "x")
