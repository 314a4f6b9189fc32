"""Bytes of a converted folder that flipped, in each of its files: an error, or other values; never anything else."""

import random

import pytest

import clip_jax
from clip_jax import CheckpointError


@pytest.fixture
def copy(encoder, tmp_path):
    encoder.save(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("flips", [1, 64])
def test_bytes_that_flipped_are_refused_or_are_values(copy, flips):
    rng, refused = random.Random(flips), set()
    for file in sorted(file for file in copy.rglob("*") if file.is_file() and "tokenizers" not in file.parts):
        whole = file.read_bytes()
        damaged = bytearray(whole)
        for _ in range(flips if whole else 0):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            clip_jax.load(copy)
        except CheckpointError:
            refused.add(file.name)
        file.write_bytes(whole)
    assert flips == 1 or refused > {"_CHECKPOINT_METADATA", "manifest.ocdbt"}
    clip_jax.load(copy)
