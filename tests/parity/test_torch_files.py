"""torch writes its files in every form; the readers without torch give the same bits."""

import collections

import numpy as np
import pytest
import torch

from clip_jax.convert.readers import open_file
from clip_jax.errors import CheckpointError

DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
DTYPES += ("int64", "int32", "int16", "int8", "uint8", "bool", "uint16", "uint32", "complex64", "complex128")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def states() -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    base = torch.randn(5, 6)
    shared = torch.randn(4, 4)
    marked = [torch.randn(2, 3).half(), torch.nn.Parameter(torch.randn(3)), torch.ones(3, dtype=torch.uint16)]
    for tensor in marked:
        tensor.note = {"merged from": ["a", "b"]}
    return {
        **{name: {"x": (torch.randn(3, 4) * 3).to(getattr(torch, name))} for name in DTYPES},
        "views": {"whole": base, "transposed": base.T, "rows": base[1:3], "strided": base[1:4, ::2], "one": base[2, 3]},
        "tied": {"a": shared, "b": shared},
        "odd shapes": {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 3), "one": torch.ones(1, 1, 1)},
        "attributes": dict(zip(("tensor", "parameter", "uint16"), marked, strict=True)),
        "parameters": dict(torch.nn.MultiheadAttention(8, 2).named_parameters()),
        "module": collections.OrderedDict(torch.nn.MultiheadAttention(8, 2).state_dict()),
    }


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("name", states())
def test_torch_save(tmp_path, name, wrapped, as_zip):
    state = states()[name]
    saved = {"state_dict": state, "epoch": 3, "optimizer": [torch.ones(2)], "lr": 0.1, "x": (1, {2})}
    torch.save(saved if wrapped else state, tmp_path / "x", _use_new_zipfile_serialization=as_zip)

    file = open_file(tmp_path / "x")

    assert file.format == ("PyTorch zip" if as_zip else "PyTorch legacy pickle")
    assert set(file.tensors) == set(state)
    for key, tensor in state.items():
        assert file.tensors[key].shape == file.read(key).shape == tuple(tensor.shape)
        assert file.tensors[key].dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert file.read(key).tobytes() == bits(tensor)


BESIDE = {
    "milestones of a scheduler": {"lr_schedulers": [{"milestones": collections.Counter([3])}]},
    "an array": {"losses": np.arange(3.0)},
    "tuples for keys": {"sizes": {("a", 1): 2, ((), "b"): 3}},
}


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_what_training_leaves_beside_a_state_dict(tmp_path, name, as_zip):
    state = states()["module"]
    saved = {**BESIDE[name], "state_dict": state}
    torch.save(saved, tmp_path / "x", _use_new_zipfile_serialization=as_zip)
    file = open_file(tmp_path / "x")
    assert all(file.read(key).tobytes() == bits(tensor) for key, tensor in state.items())
    assert set(file.tensors) == set(state)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle(tmp_path, protocol):
    state = states()["module"]
    torch.save(state, tmp_path / "x", pickle_protocol=protocol)
    file = open_file(tmp_path / "x")
    assert all(file.read(key).tobytes() == bits(tensor) for key, tensor in state.items())
    assert set(file.tensors) == set(state)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(8, 2).half()
        self.ln_1 = torch.nn.LayerNorm(8)
        self.sizes = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ln_1(x)


class Model(torch.nn.Module):
    """Like OpenAI's CLIP: halves and floats, nested modules, bare parameters, buffers and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList([Block(), Block()])
        self.text_projection = torch.nn.Parameter(torch.randn(3, 4))
        self.register_buffer("context_length", torch.tensor(77))
        self.flags, self.table, self.scales = [True], {"a": 1}, [0.5]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.text_projection + self.context_length


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript(tmp_path, how):
    model = Model()
    compiled = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.randn(2, 3))
    torch.jit.save(compiled, str(tmp_path / "x"))

    file = open_file(tmp_path / "x")

    assert file.format == "TorchScript archive"
    assert set(file.tensors) == set(model.state_dict())
    for key, tensor in model.state_dict().items():
        assert file.read(key).tobytes() == bits(tensor)
        assert file.tensors[key].shape == tuple(tensor.shape)


OTHERS = {
    "_rebuild_qtensor": lambda: torch.quantize_per_tensor(torch.randn(2, 2), 0.1, 0, torch.qint8),
    "_rebuild_sparse_tensor": lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_other_tensors_are_refused_by_name(tmp_path, name):
    torch.save({"x": OTHERS[name]()}, tmp_path / "x")
    with pytest.raises(CheckpointError, match=name):
        open_file(tmp_path / "x")


def test_a_whole_module_is_refused_by_the_name_of_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        open_file(tmp_path / "x")
