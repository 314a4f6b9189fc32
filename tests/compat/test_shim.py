"""`install` puts the classes on `transformers`; the real one is for tests/parity."""

import importlib.util
import pickle
import sys
import types

import pytest

import clip_jax.compat
from clip_jax import ClipJaxError
from clip_jax.compat import FlaxCLIPTextModel, FlaxPreTrainedModel, install, uninstall

NAMES = (
    "FlaxPreTrainedModel",
    "FlaxCLIPTextPreTrainedModel",
    "FlaxCLIPTextModel",
    "FlaxCLIPTextModelWithProjection",
    "FlaxT5EncoderModel",
)


@pytest.fixture
def transformers(monkeypatch):
    """A stand-in, in which one of the names is taken, as all are in version 4."""
    module = types.ModuleType("transformers")
    module.CLIPTextModel, module.FlaxCLIPTextModel = object(), "of version 4"
    monkeypatch.setitem(sys.modules, "transformers", module)
    yield module
    uninstall()


def test_names_come_and_go(transformers):
    before = dict(vars(transformers))
    install()
    install()
    for name in NAMES:
        assert getattr(transformers, name) is getattr(clip_jax.compat, name)
    assert issubclass(transformers.FlaxT5EncoderModel, transformers.FlaxPreTrainedModel)
    uninstall()
    assert vars(transformers) == before
    uninstall()
    assert vars(transformers) == before


def test_classes_are_of_transformers_meanwhile(transformers):
    """`register_modules` of Flax pipelines writes the first part of it into `model_index.json`."""
    ours = FlaxCLIPTextModel.__module__
    install()
    library, *_, folder, _ = FlaxCLIPTextModel.__module__.split(".")
    assert (library, folder) == ("transformers", "clip")
    uninstall()
    assert FlaxCLIPTextModel.__module__ == ours == "clip_jax.compat.clip"
    assert FlaxPreTrainedModel.__module__ == "clip_jax.compat.base"


def test_classes_are_where_transformers_4_had_them(transformers):
    """And are pickled by that name: without the module no model could be."""
    install()
    from transformers.models.clip.modeling_flax_clip import FlaxCLIPTextModel as found

    assert found is FlaxCLIPTextModel
    assert pickle.loads(pickle.dumps(FlaxCLIPTextModel)) is FlaxCLIPTextModel
    uninstall()
    assert not [name for name in sys.modules if name.startswith("transformers.") and "flax" in name]
    assert pickle.loads(pickle.dumps(FlaxCLIPTextModel)) is FlaxCLIPTextModel


def test_nothing_is_put_anywhere_on_import(transformers):
    assert "FlaxT5EncoderModel" not in vars(transformers)


def test_without_transformers_there_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ClipJaxError, match="transformers is not installed"):
        install()


def test_a_module_that_fails_leaves_everything_as_it_was(transformers, monkeypatch):
    """As transformers 4's own do with a JAX that is newer than they are."""
    before, loaded = dict(vars(transformers)), set(sys.modules)
    find = importlib.import_module

    def broken(name):
        if name.endswith("modeling_flax_t5"):
            raise AttributeError("module 'jax.numpy' has no attribute 'DeviceArray'")
        return find(name)

    with monkeypatch.context() as patched:
        patched.setattr(importlib, "import_module", broken)
        for _ in range(2):
            with pytest.raises(AttributeError, match="DeviceArray"):
                install()
    assert vars(transformers) == before
    assert not {name for name in set(sys.modules) - loaded if name.startswith("transformers")}
    install()
    assert transformers.FlaxT5EncoderModel is clip_jax.compat.FlaxT5EncoderModel


def test_another_module_in_its_place_is_patched_too(transformers, monkeypatch):
    """As transformers 5 puts one there itself when a class of some kind is asked for."""
    install()
    other = types.ModuleType("transformers")
    monkeypatch.setitem(sys.modules, "transformers", other)
    install()
    assert other.FlaxT5EncoderModel is clip_jax.compat.FlaxT5EncoderModel
    assert "FlaxT5EncoderModel" not in vars(transformers)
    uninstall()
    assert "FlaxT5EncoderModel" not in vars(other)


def test_modules_that_are_made_are_found_as_others_are(transformers):
    install()
    assert importlib.util.find_spec("transformers.modeling_flax_utils").name == "transformers.modeling_flax_utils"
    assert sys.modules["transformers"].modeling_flax_utils.FlaxPreTrainedModel is FlaxPreTrainedModel
