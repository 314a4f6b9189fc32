"""Benchmarks of clip_jax. Not installed with the package; see bench/README.md."""
