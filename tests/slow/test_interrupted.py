"""Conversions that are interrupted, killed or run out of disk: what was there stays. And what they take of memory."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax import CheckpointError, ClipTextConfig
from clip_jax.convert import convert
from clip_jax.params.shapes import param_shapes
from tests.checkpoints import digests, write_text_encoder

# Listens to Ctrl-C even as the child of a shell's background job, which does not.
SCRIPT = """
import signal
from clip_jax.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
raise SystemExit(main())
"""
COMMAND = [sys.executable, "-c", SCRIPT]


@pytest.fixture(scope="module")
def converted(tiny_sd15, tmp_path_factory) -> Path:
    """The small pipeline, converted. Read only."""
    return convert(tiny_sd15, tmp_path_factory.mktemp("converted") / "sd15", family="sd15")


def write_large(folder: Path, config: ClipTextConfig) -> Path:
    """A text encoder of random float32 written tensor by tensor; quicker than `hf_state` for large ones."""
    write_text_encoder(folder, config.to_hf(), {})
    header, end = {}, 0
    for path, shape in param_shapes(config).items():
        *module, leaf = path.split("/")
        name = ".".join([*module, "bias" if leaf == "bias" else "weight"])
        stored = shape[::-1] if leaf == "kernel" else shape
        header[name] = {"dtype": "F32", "shape": stored, "data_offsets": (end, end + 4 * math.prod(shape))}
        end += 4 * math.prod(shape)
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in param_shapes(config).values():
            file.write(rng.random(shape, np.float32).tobytes())
    return folder


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    """A text encoder that takes a while to convert. Read only."""
    config = ClipTextConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=4,
        hidden_act="quick_gelu",
    )
    return write_large(tmp_path_factory.mktemp("slow") / "source", config)


@pytest.fixture
def old(converted, tmp_path) -> Path:
    """A folder with a checkpoint called "out" in it."""
    shutil.copytree(converted, tmp_path / "place" / "out")
    return tmp_path / "place"


def interrupted(source: Path, out: Path, how: signal.Signals, written: int, *options: str) -> int:
    """Starts a conversion, and sends it a signal once it has made so many files; returns its exit code."""
    command = [*COMMAND, "convert", str(source), str(out), "--family", "sd15", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and in_stages(out.parent) < written:
            time.sleep(0.001)
        process.send_signal(how)
    return process.returncode


def in_stages(folder: Path) -> int:
    """How many files and folders conversions have made so far; what vanishes meanwhile is no error."""
    stages = folder.glob(".out.clip-jax-*")
    return sum(len(names) + len(files) for stage in stages for _, names, files in os.walk(stage))


def loadable(folder: Path) -> list[Path]:
    """The folders below `folder` that `load` accepts."""
    found = []
    for path in filter(Path.is_dir, folder.rglob("*")):
        try:
            clip_jax.load(path, family="sd15")
        except CheckpointError:
            continue
        found.append(path)
    return found


@pytest.mark.parametrize("written", [1, 10, 50])
def test_a_killed_conversion_leaves_nothing_that_loads_and_the_next_one_succeeds(slow, old, written):
    new, out = written == 10, old / "out"
    if new:
        shutil.rmtree(out)
    before = digests(out)

    assert interrupted(slow, out, signal.SIGKILL, written, "--overwrite") == -signal.SIGKILL

    assert digests(out) == before
    assert out.exists() != new
    assert list(old.glob(".out.clip-jax-*"))
    assert loadable(old) == ([] if new else [out])
    convert(slow, out, family="sd15", overwrite=True)
    assert [path.name for path in old.iterdir()] == ["out"]
    direct = clip_jax.load(slow, family="sd15")
    jax.tree.map(np.testing.assert_array_equal, clip_jax.load(out).params, direct.params)


@pytest.mark.parametrize("written", [1, 30])
def test_an_interrupted_conversion_leaves_everything_as_it_was(slow, old, written):
    before = digests(old)
    assert interrupted(slow, old / "out", signal.SIGINT, written, "--overwrite") == 130
    assert digests(old) == before


@pytest.mark.parametrize("limit", [20 * 2**10, 2 * 2**20])
def test_a_full_disk_is_an_error_that_leaves_everything_as_it_was(slow, old, limit):
    before = digests(old)
    code = f"""
        import resource
        from clip_jax.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))  # larger files fail to be written
        raise SystemExit(main())
    """
    arguments = ["convert", str(slow), str(old / "out"), "--family", "sd15", "--overwrite"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    # Orbax' threads may complain as well.
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("clip-jax:"))
    assert line.startswith(f"clip-jax: error: {old / 'out'} cannot be written: Failed to write ")
    assert "File too large" in line
    assert digests(old) == before


MEMORY = """
    import re, sys, threading, time
    from pathlib import Path
    from clip_jax.convert import convert

    def anonymous():
        return 1024 * int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

    def watch():
        while not done.wait(0.002):
            seen.append(anonymous())

    small, large, out = sys.argv[1:]
    convert(small, out, family="sd15")  # imports, and the buffers that stay
    seen, done = [anonymous()], threading.Event()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    convert(large, out, family="sd15", overwrite=True)
    done.set()
    thread.join()
    print(max(seen) - seen[0])
"""


@pytest.fixture
def disk(tmp_path):
    """A folder for large files, which pytest would keep for three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux'")
def test_memory_is_bounded_by_a_fraction_of_the_model(tiny_sd15, disk):
    """At the size of SD 1.5, whose embedding alone is a third of the model."""
    source = write_large(disk / "source", ClipTextConfig.sd15())
    size = (source / "model.safetensors").stat().st_size
    assert size > 490e6

    command = [sys.executable, "-c", textwrap.dedent(MEMORY), tiny_sd15, source, disk / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    assert int(done.stdout) < size / 2
