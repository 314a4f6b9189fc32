"""Compiled programs on disk, and ahead of the first call."""

import os
import subprocess
import sys

import jax
import pytest

import clip_jax
from clip_jax import ClipJaxError, text_embeddings
from clip_jax.encoder import TextEncoder
from tests.checkpoints import write_family


def run(code, *arguments, **environment):
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


EMBED = """
import sys, jax, clip_jax
print(clip_jax.enable_compilation_cache(*sys.argv[2:]))
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if "cache_hits" in name else None)
clip_jax.load(sys.argv[1], family="sd15", cache_bytes=0)("a cat").prompt_embeds.block_until_ready()
print(len(hits))
"""


def test_a_second_process_compiles_nothing(tiny_sd15, tmp_path):
    folder, hits = run(EMBED, tiny_sd15, XDG_CACHE_HOME=str(tmp_path))
    assert folder == str(tmp_path / "clip_jax" / "xla")
    assert hits == "0"
    written = sorted(path.name for path in (tmp_path / "clip_jax" / "xla").iterdir())
    assert any("text_embeddings" in name for name in written)
    _, hits = run(EMBED, tiny_sd15, XDG_CACHE_HOME=str(tmp_path))
    assert int(hits) > 0
    assert {path.name for path in (tmp_path / "clip_jax" / "xla").glob("*-cache")} == {
        name for name in written if name.endswith("-cache")
    }


@pytest.mark.slow
def test_the_folder_may_be_chosen(tiny_sd15, tmp_path):
    code = "import sys, clip_jax; print(clip_jax.enable_compilation_cache(*sys.argv[1:]))"
    smallest = "import jax; print(jax.config.jax_persistent_cache_min_entry_size_bytes)"
    assert run(f"{code}; {smallest}", tmp_path / "mine") == [str(tmp_path / "mine"), "-1"]  # programs of any size
    assert run(code, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "set")) == [str(tmp_path / "set")]
    assert run(code, tmp_path / "mine", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "set")) == [str(tmp_path / "mine")]


def test_a_user_without_a_home_is_told(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where nothing tells of a home
    jax.config.update("jax_compilation_cache_dir", None)
    with pytest.raises(ClipJaxError, match="no home folder. Name another folder for the cache, with path=, JAX_C"):
        clip_jax.enable_compilation_cache()


def test_a_remote_folder_is_left_to_jax(tmp_path):
    code = "import jax, clip_jax; print(clip_jax.enable_compilation_cache(), jax.config.jax_compilation_cache_dir)"
    code = f"import os; os.chdir({str(tmp_path)!r}); {code}"
    assert run(code, JAX_COMPILATION_CACHE_DIR="gs://bucket/folder") == ["gs://bucket/folder"] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(clip_jax.ClipJaxError, match="cannot be made: .* Name another folder"):
        clip_jax.enable_compilation_cache(tmp_path / "file" / "below")


def test_after_a_warmup_nothing_is_compiled(encoder, caplog):
    jax.clear_caches()
    encoder = TextEncoder(encoder.family, encoder.params, encoder.tokenizers)
    encoder.warmup((1, 3))
    assert text_embeddings._cache_size() == 4  # one and four prompts, with negatives and alone
    with jax.log_compiles(), caplog.at_level("WARNING"):
        encoder("a cat", negative_prompt="blurry")
        encoder("two dogs", negative_prompt="blurry")  # taken out of the first, and joined with the second
        encoder(["a", "b", "c"], negative_prompt=["d", "e", "f"])
        compiled = [record.getMessage() for record in caplog.records]
        assert not [message for message in compiled if message.startswith("Compiling")]
        assert encoder.cache.stats().misses == 9  # a warmup leaves nothing in it
        encoder(["a", "b", "c", "d", "e"])
    assert any(record.getMessage().startswith("Compiling") for record in caplog.records)


def compiled_by(caplog, call):
    caplog.clear()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        call()
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling")]


@pytest.mark.slow
def test_after_a_warmup_of_many_a_negative_for_all_compiles_nothing(encoder, caplog):
    jax.clear_caches()
    encoder = TextEncoder(encoder.family, encoder.params, encoder.tokenizers)
    encoder.warmup(size for size in (2,))  # an iterator will do
    assert not compiled_by(caplog, lambda: encoder(["a cat", "a dog"], negative_prompt="blurry"))
    assert not compiled_by(caplog, lambda: encoder(["a boat", "a car"], negative_prompt="blurry"))


@pytest.mark.slow
def test_after_a_warmup_texts_of_any_length_compile_nothing(tmp_path, caplog):
    """FLUX's CLIP-L, whose ids are cut after the end of the text."""
    folder = write_family(tmp_path / "flux", clip_jax.FAMILIES["flux"])
    encoder = clip_jax.load(folder, family="flux")
    encoder.warmup(max_sequence_length=128)
    for words in (1, 10, 20, 40, 60):
        assert not compiled_by(caplog, lambda text="a " * words: encoder(text, max_sequence_length=128))


@pytest.mark.parametrize("wrong", [(0,), ("1",), (True,), 4])
def test_other_sizes_are_refused(encoder, wrong):
    with pytest.raises(clip_jax.ClipJaxError, match="batch_sizes must be positive ints in a list"):
        encoder.warmup(wrong)
