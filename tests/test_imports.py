"""What importing the package does, and does not."""

import subprocess
import sys

import pytest

import clip_jax

HEAVY = ("torch", "transformers", "diffusers", "tensorflow", "jax", "flax", "orbax", "tokenizers", "numpy")


def imported(statement: str, names: tuple[str, ...]) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*(name for name in {names!r} if name in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_import_loads_nothing_heavy():
    assert imported("import clip_jax", HEAVY) == set()


def test_the_whole_way_needs_neither_torch_nor_transformers(tiny_sd15):
    work = f"import clip_jax; clip_jax.load({str(tiny_sd15)!r}, family='sd15')('a cat'); import clip_jax.cli"
    assert imported(work, ("torch", "transformers", "diffusers")) == set()


def test_the_check_can_fail():
    assert imported("import clip_jax, numpy", HEAVY) == {"numpy"}


def test_import_changes_no_jax_setting():
    code = (
        "import jax; before = dict(jax.config.values)\n"
        "import clip_jax.loading, clip_jax.cli\n"
        "assert before == dict(jax.config.values)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", [name for name in clip_jax.__all__ if not name.startswith("_")])
def test_public_names_are_there_and_documented(name):
    value = getattr(clip_jax, name)
    assert name in dir(clip_jax)
    assert name == "FAMILIES" or value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'text_embedding'"):
        clip_jax.text_embedding  # noqa: B018


def test_functions_stay_functions_after_their_modules_are_imported():
    code = "import clip_jax, clip_jax.loading, clip_jax.embed; clip_jax.load.__call__; clip_jax.info.__call__"
    subprocess.run([sys.executable, "-c", code], check=True)
