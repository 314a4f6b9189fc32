"""Quantised params are exported as they are, and compute the same."""

import jax
import numpy as np
import pytest

import clip_jax
from tests.checkpoints import write_family


@pytest.mark.parametrize(
    ("family", "quantize", "options"), [("sdxl", "int8", {}), ("flux", "int4", {"max_sequence_length": 32})]
)
def test_quantised_params_are_exported_too(tmp_path, family, quantize, options):
    source = write_family(tmp_path / "source", clip_jax.FAMILIES[family])
    encoder = clip_jax.load(source, family=family, quantize=quantize, cache_bytes=0)
    encoder.export(tmp_path / "out", **options)
    found = clip_jax.load_exported(tmp_path / "out", cache_bytes=0)
    assert jax.tree.structure(found.params) == jax.tree.structure(encoder.params)
    np.testing.assert_allclose(
        found("a cat", **options).prompt_embeds, encoder("a cat", **options).prompt_embeds, atol=1e-5
    )
