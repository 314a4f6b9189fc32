"""`verify_tower`: a faithful conversion passes in every dtype, and every fault fails in every dtype.

The source runs in NumPy here; `tests/parity/test_verify.py` runs it in torch.
"""

import functools
import importlib
import json
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import clip_jax
from clip_jax import CheckpointError
from clip_jax.convert import convert
from clip_jax.convert.foreign import open_foreign
from clip_jax.convert.layouts import open_clip as open_clip_layout
from clip_jax.convert.verify import PROMPTS, TOLERANCE, _relative_error, verify_tower
from clip_jax.params.cast import float_dtype
from clip_jax.params.shapes import flatten, unflatten
from clip_jax.tokenizers import ClipTokenizer
from clip_jax.tokenizers.stand_in import stand_in_t5_tokenizer
from tests.checkpoints import write_text_encoder
from tests.formats.model import CONFIGS, model, write_pipeline_folder
from tests.formats.names import open_clip

G = CONFIGS["clip_g"]  # its projection is square, as the real one is


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    """As where torch is not installed."""
    monkeypatch.setitem(sys.modules, "torch", None)


def write_open_clip(path, state):
    save_file({name: np.ascontiguousarray(array) for name, array in open_clip(state).items()}, path)
    return path


def open_refiner(path):
    return open_foreign([path], family="sdxl_refiner", configs={} if path.is_dir() else {"clip_g": G})


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """CLIP under the names of transformers and of OpenCLIP, and T5; of one CLIP, so that jax compiles it once."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        "clip_g": open_refiner(write_text_encoder(folder / "hf", G.to_hf(), model("clip_g"))),
        "clip_g of OpenCLIP": open_refiner(write_open_clip(folder / "open_clip", model("clip_g"))),
        "t5": open_foreign(
            [write_pipeline_folder(folder / "flux", "flux", {name: model(name) for name in ("clip_l", "t5")})]
        ),
    }


def params_of(checkpoint, dtype):
    return checkpoint.read_params(None if dtype is None else float_dtype(dtype), progress=False)


@functools.cache
def tokenizer(tower):
    return stand_in_t5_tokenizer() if tower == "t5" else ClipTokenizer.packaged("!")


def verify(checkpoint, tower, params):
    return verify_tower(tower, checkpoint.towers[tower], params, tokenizer(tower))


# --- a faithful conversion


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("source", ["clip_g", "clip_g of OpenCLIP", "t5"])
def test_a_faithful_conversion_passes(sources, source, dtype):
    tower = source.partition(" ")[0]
    found = verify(sources[source], tower, params_of(sources[source], dtype)[tower])
    assert found.oracle == "NumPy, float64"
    assert 0 < found.max_abs_error < 1e-5 < 1 < found.largest
    assert 0 < found.relative_error < TOLERANCE / 30  # the margin that is left for deeper models
    low, high = {"bfloat16": (2e-3, 3e-2), "float16": (2e-4, 4e-3)}.get(dtype, (0, 0))
    assert low <= found.rounding_error <= high


def test_a_source_in_half_precision_is_not_rounded(tmp_path):
    state = {name: array.astype(ml_dtypes.bfloat16) for name, array in model("clip_g").items()}
    checkpoint = open_refiner(write_open_clip(tmp_path / "g", state))
    for dtype, rounded in ((None, False), ("float32", False), ("float16", True)):
        found = verify(checkpoint, "clip_g", params_of(checkpoint, dtype)["clip_g"])
        assert (found.rounding_error > 0) == rounded
        assert found.relative_error < TOLERANCE / 30


def test_scaled_fp8_under_openclip_names_passes(tmp_path):
    state = open_clip(model("clip_g"))
    name = "transformer.resblocks.1.mlp.c_fc"
    state[f"{name}.weight"] = (state[f"{name}.weight"] / 0.01).astype(ml_dtypes.float8_e4m3fn)
    state[f"{name}.scale_weight"] = np.array(0.01, np.float32)
    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, tmp_path / "g")
    checkpoint = open_refiner(tmp_path / "g")
    found = verify(checkpoint, "clip_g", params_of(checkpoint, None)["clip_g"])
    assert found.relative_error < TOLERANCE / 30
    assert found.rounding_error > 1e-4  # of the one weight that is float32 when it is scaled, and bfloat16 when stored


def test_a_transposed_projection_is_verified_as_the_user_reads_it(tmp_path):
    path = write_open_clip(tmp_path / "g", model("clip_g"))
    checkpoint = open_foreign([path], family="sdxl_refiner", configs={"clip_g": G}, text_projection="transpose")
    assert verify(checkpoint, "clip_g", params_of(checkpoint, None)["clip_g"]).relative_error < TOLERANCE / 30


def test_one_prompt_is_empty_one_short_and_one_full():
    lengths = [len(tokenizer("clip_g").inspect(prompt).ids) for prompt in PROMPTS]
    assert lengths[0] == 2 < lengths[1] < 20 < 248 < lengths[2]  # LongCLIP has 248 positions


# --- faults


def swapped(tree, *pairs):
    out = dict(tree)
    for a, b in pairs:
        out[a], out[b] = tree[b], tree[a]
    return out


def changed(path, change):
    return lambda tree: {**tree, path: change(tree[path])}


def swap_attention(layer):
    names = [(f"{layer}q_proj/{leaf}", f"{layer}k_proj/{leaf}") for leaf in ("kernel", "bias")]
    return lambda tree: swapped(tree, *names)


LAYER = "text_model/encoder/layers/1/"
CLIP_FAULTS = {
    "q and k": swap_attention(f"{LAYER}self_attn/"),
    "norms": lambda tree: swapped(tree, (f"{LAYER}layer_norm1/scale", f"{LAYER}layer_norm2/scale")),
    "out_proj transposed": changed(f"{LAYER}self_attn/out_proj/kernel", lambda x: x.T),
    "text_projection transposed": changed("text_projection/kernel", lambda x: x.T),
    "a bias lost": changed(f"{LAYER}mlp/fc2/bias", jnp.zeros_like),
    "one value": changed(f"{LAYER}mlp/fc2/bias", lambda x: x.at[3].multiply(1.1)),
    "positions shifted": changed("text_model/embeddings/position_embedding/embedding", lambda x: jnp.roll(x, 1, 0)),
    "not a number": changed(f"{LAYER}self_attn/out_proj/bias", lambda x: x.at[0].set(jnp.nan)),
}
BLOCK = "encoder/block/1/layer/"
BIAS = "encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding"
T5_FAULTS = {
    "q and k": lambda tree: swapped(tree, (f"{BLOCK}0/SelfAttention/q/kernel", f"{BLOCK}0/SelfAttention/k/kernel")),
    "gate and value": lambda tree: swapped(
        tree, (f"{BLOCK}1/DenseReluDense/wi_0/kernel", f"{BLOCK}1/DenseReluDense/wi_1/kernel")
    ),
    "the last bucket": changed(BIAS, lambda x: x.at[31].multiply(2)),
    "directions": changed(BIAS, lambda x: jnp.roll(x, 16, 0)),
}


EVERY_DTYPE = ("q and k", "text_projection transposed", "directions")


def with_dtypes(faults):
    return [(fault, "bfloat16") for fault in faults] + [
        (fault, dtype) for fault in EVERY_DTYPE if fault in faults for dtype in ("float32", "float16")
    ]


@pytest.mark.parametrize(("fault", "dtype"), with_dtypes(CLIP_FAULTS))
def test_a_fault_in_clip_fails(sources, fault, dtype):
    tree = CLIP_FAULTS[fault](flatten(params_of(sources["clip_g"], dtype)["clip_g"]))
    with pytest.raises(CheckpointError, match=r"clip_g does not compute what its source does: .* Nothing was kept"):
        verify(sources["clip_g"], "clip_g", unflatten(tree))


@pytest.mark.parametrize(("fault", "dtype"), with_dtypes(T5_FAULTS))
def test_a_fault_in_t5_fails(sources, fault, dtype):
    tree = T5_FAULTS[fault](flatten(params_of(sources["t5"], dtype)["t5"]))
    with pytest.raises(CheckpointError, match="t5 does not compute"):
        verify(sources["t5"], "t5", unflatten(tree))


def test_a_fault_far_below_the_rounding_fails(tmp_path):
    """Attention before training: queries and keys so small that their order hardly counts."""
    factors = {"q_proj": 0.05, "k_proj": 0.05}
    state = {name: array * factors.get(name.split(".")[-2], 1) for name, array in model("clip_g").items()}
    checkpoint = open_refiner(write_open_clip(tmp_path / "g", state))
    params = params_of(checkpoint, "bfloat16")["clip_g"]
    rounding = verify(checkpoint, "clip_g", params).rounding_error
    with pytest.raises(CheckpointError) as error:
        verify(checkpoint, "clip_g", unflatten(swap_attention(f"{LAYER}self_attn/")(flatten(params))))
    found = float(str(error.value).partition("the relative error is ")[2].partition(",")[0])
    assert TOLERANCE < found < rounding / 2


def test_a_wrong_table_of_openclip_names_fails(tmp_path, monkeypatch):
    """The source is run under its own names, not under those that the table makes of them."""
    path, rename = write_open_clip(tmp_path / "g", model("clip_g")), open_clip_layout.renamed
    exchange = str.maketrans("12", "21")

    def exchanged(name, table):
        head, norm, tail = rename(name, table).partition("layer_norm")
        return head + norm + tail.translate(exchange)

    monkeypatch.setattr(open_clip_layout, "renamed", exchanged)
    checkpoint = open_refiner(path)
    with pytest.raises(CheckpointError, match="does not compute"):
        verify(checkpoint, "clip_g", params_of(checkpoint, None)["clip_g"])


# --- as a part of `convert`


def test_convert_keeps_what_was_found(tmp_path):
    source = write_text_encoder(tmp_path / "source", G.to_hf(), model("clip_g"))
    out = convert(source, tmp_path / "out", family="sdxl_refiner", dtype="bfloat16", verify=True)
    (found,) = clip_jax.info(out).provenance["verified"].values()
    assert found.keys() == {"max_abs_error", "largest", "relative_error", "rounding_error", "oracle"}
    assert json.loads(json.dumps(found)) == found
    assert found["relative_error"] < TOLERANCE < found["rounding_error"]


def test_convert_leaves_nothing_where_it_fails(tmp_path, monkeypatch):
    source = write_text_encoder(tmp_path / "source", G.to_hf(), model("clip_g"))
    monkeypatch.setattr("clip_jax.convert.foreign.ForeignTower.read", misread)
    with pytest.raises(CheckpointError, match="clip_g does not compute"):
        convert(source, tmp_path / "out", family="sdxl_refiner", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def misread(tower, path, *_):
    """Takes every second norm for the first."""
    key, transposed = tower.map.keys[path.replace("layer_norm2", "layer_norm1")]
    array = tower.state[key].read()
    return np.ascontiguousarray(array.T if transposed else array)


def test_an_error_is_held_against_its_own_row():
    """CLIP's first token is many times as large as the others."""
    wanted = {"last_hidden_state": np.array([[[1e4, 0.0], [1.0, 0.0]]])}
    found = {"last_hidden_state": np.array([[[1e4, 0.0], [1.0, 0.01]]])}
    assert _relative_error(found, wanted) == pytest.approx(0.01)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_libraries_that_do_not_work_are_told_and_done_without(sources, monkeypatch, package):
    """As torch whose CUDA is gone, or transformers 5 under `python -OO`."""
    find = importlib.import_module

    def broken(name):
        if name == package:
            raise OSError("libtorch_cuda.so: cannot open shared object file")
        return find("math") if name == "torch" else find(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    checkpoint = sources["clip_g"]
    with pytest.warns(UserWarning, match=r"cannot be used \(OSError: libtorch_cuda.*NumPy runs the source instead"):
        found = verify(checkpoint, "clip_g", params_of(checkpoint, None)["clip_g"])
    assert found.oracle == "NumPy, float64"
