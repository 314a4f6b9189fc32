"""Processes killed at random steps of what they do on disk: what was there stays, what is new is whole or absent."""

import random
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax.convert import convert, export
from tests.checkpoints import TINY, digests, hf_state
from tests.formats.torch_zip import write_torch_zip

POINTS = 3  # of each command: every one of them takes seconds
OPTIONS = {"family": "sd15", "config": {"clip_l": TINY}}

# Kills itself at its n-th step on disk, or tells how many there were. The steps of Orbax' C++ are between these.
CHILD = """
    import os, signal, sys
    from clip_jax import ClipTextConfig
    from clip_jax.convert import convert, export
    from orbax.checkpoint import v1

    command, source, out, config, last = sys.argv[1], sys.argv[2], sys.argv[3], eval(sys.argv[4]), int(sys.argv[5])
    steps = 0

    def step(event, arguments):
        global steps
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "fcntl.flock") or (
            event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wxa"
        ):
            steps += 1
            if steps == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(step)
    if command == "convert":
        convert(source, out, family="sd15", config={"clip_l": ClipTextConfig(**config)}, overwrite=True, progress=False)
    else:
        export(source, out, overwrite=True, progress=False)
    print(steps)
"""


def run(command, source, out, last):
    config = repr(vars(TINY))
    arguments = [command, str(source), str(out), config, str(last)]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Command -> what it reads, what is at its output before, and what is there once it has succeeded."""
    folder = tmp_path_factory.mktemp("sources")
    old, new = (write_torch_zip(folder / f"{seed}.ckpt", hf_state(TINY, seed=seed)) for seed in (1, 2))
    converted = [convert(source, folder / source.stem, **OPTIONS) for source in (old, new)]
    exported = [export(source, folder / f"exported-{source.name}") for source in converted]
    return {"convert": (new, *converted), "export": (converted[1], *exported)}


@pytest.fixture(scope="module")
def steps(sources, tmp_path_factory):
    """Command -> how many steps it takes on disk over an earlier output."""
    found = {}
    for command, (source, old, _) in sources.items():
        out = tmp_path_factory.mktemp("steps") / "out"
        subprocess.run(["cp", "-r", old, out], check=True)
        done = run(command, source, out, 0)
        assert done.returncode == 0, done.stderr
        found[command] = int(done.stdout.split()[-1])
    return found


def params(folder):
    return clip_jax.load(folder, family="sd15").params


@pytest.mark.parametrize("point", range(POINTS))
@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_killed_process_leaves_the_old_or_the_new(sources, steps, tmp_path, command, point):
    source, old, new = sources[command]
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", old, out], check=True)
    # The last steps, where one output takes the place of the other, are the most interesting.
    last = random.Random(f"{command} {point}").randrange(1, steps[command] + 1) if point else steps[command] - 2

    done = run(command, source, out, last)

    assert done.returncode == -signal.SIGKILL, done.stderr
    if out.exists():
        expected = old if digests(out) == digests(old) else new
        jax.tree.map(np.testing.assert_array_equal, params(out), params(expected))
    else:  # between two renames: the next one puts it back
        assert list(tmp_path.glob(".out.clip-jax-*/old"))
    again = (
        export(source, out, overwrite=True) if command == "export" else convert(source, out, overwrite=True, **OPTIONS)
    )
    jax.tree.map(np.testing.assert_array_equal, params(again), params(new))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
