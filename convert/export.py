"""`export`: a checkpoint of this package in, a diffusers folder with safetensors out, tensor by tensor."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.convert.detect import family_called
from clip_jax.convert.hf_keys import hf_key
from clip_jax.convert.readers.safetensors import DTYPES
from clip_jax.errors import CheckpointError, ClipJaxError
from clip_jax.families import Family, Tower
from clip_jax.params.checkpoint import (
    is_checkpoint,
    iter_params,
    read_metadata,
    read_specs,
    tokenizer_folder,
    versions,
)
from clip_jax.params.shapes import TensorSpec
from clip_jax.params.staging import check_free, staged_folder
from clip_jax.progress import byte_bar
from clip_jax.tokenizers import read_tokenizer

_MARK = "clip_jax_export.json"
_DTYPE_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
_TOKENIZERS = {"clip_text_model": "CLIPTokenizer", "t5": "T5TokenizerFast"}


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: Literal["hf"] = "hf",
    overwrite: bool = False,
    progress: bool | None = None,
) -> Path:
    """Writes the text side of a diffusers folder: what transformers, diffusers and `clip_jax.load` read.

    Every tensor has the very bits that are stored; `clip-jax convert` of the folder gives the same checkpoint again.
    Only where SD 3's CLIP-L has no projection, the identity is written, as diffusers does.
    The weights go through memory a few hundred MB at a time.

    Args:
        source: A folder written by `clip-jax convert` or `TextEncoder.save`.
        out: The folder to make: `model_index.json`, `text_encoder/`, `tokenizer/`, ... It appears whole or not at all.
        format: "hf": safetensors under the names of transformers, with `config.json`.
        overwrite: Whether an earlier export at `out` may be replaced.
        progress: Whether to show a progress bar; None means on a terminal.

    Returns:
        `out`, absolute.

    Raises:
        ClipJaxError: Another format.
        CheckpointError: The source is no checkpoint of this package, or `out` exists. What is on disk stays as it is.
    """
    if format != "hf":
        raise ClipJaxError(f"format must be 'hf', found {format!r}.")
    path, out = Path(source), Path(os.path.abspath(out))
    if not is_checkpoint(path):
        raise CheckpointError(f"{path} is not a folder written by `clip-jax convert`, which is what can be exported.")
    check_free(out, overwrite, _MARK)
    metadata = read_metadata(path)
    family = family_called(metadata.family)
    specs = read_specs(path, metadata.configs)
    total = sum(spec.nbytes for tree in specs.values() for spec in tree.values())
    with staged_folder(out, overwrite=overwrite, mark=_MARK) as folder, byte_bar(total, "Exporting", progress) as bar:
        try:
            for tower in (tower for tower in family.towers if tower.name in metadata.configs):
                config, tree = metadata.configs[tower.name], specs[tower.name]
                leaves = ((p, leaf) for _, p, leaf in iter_params(path, specs, None, {tower.name}))
                if tower.identity_projection and isinstance(config, ClipTextConfig) and config.projection_dim is None:
                    config, tree, leaves = _with_identity(config, tree, leaves)
                (folder / tower.folder).mkdir(parents=True)
                _write_json(folder / tower.folder / "config.json", config.to_hf())
                with open(folder / tower.folder / "model.safetensors", "xb") as file:
                    for nbytes in _write_safetensors(file, tree, leaves):
                        bar.update(nbytes)
                read_tokenizer(config, tokenizer_folder(path, tower.name)).save(folder / tower.tokenizer_folder)
            _write_json(folder / "model_index.json", _model_index(family, metadata.configs, metadata.zero_negative))
            _write_json(folder / _MARK, {"provenance": metadata.provenance, "exported_by": versions()})
        except OSError as error:
            raise CheckpointError(f"{out} cannot be written: {error}. Make room, or choose another place.") from error
    return out


def _with_identity(
    config: ClipTextConfig, tree: Mapping[str, TensorSpec], leaves: Iterator[tuple[str, jax.Array]]
) -> tuple[ClipTextConfig, dict[str, TensorSpec], Iterator[tuple[str, jax.Array]]]:
    """The same with the projection written out that its absence stands for: diffusers wants one (SD 3's CLIP-L)."""
    width, path = config.hidden_size, "text_projection/kernel"
    spec = TensorSpec((width, width), next(iter(tree.values())).dtype)
    identity = jnp.eye(width, dtype=spec.dtype)
    whole = dataclasses.replace(config, projection_dim=width)
    return whole, {**tree, path: spec}, itertools.chain(leaves, [(path, identity)])


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")


def _write_safetensors(
    file: BinaryIO, specs: Mapping[str, TensorSpec], leaves: Iterator[tuple[str, jax.Array]]
) -> Iterator[int]:
    """Writes a header from what is known of the tensors, then these as they come; yields the bytes of each."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for path, spec in specs.items():
        name, transposed = hf_key(path)
        begin, end = end, end + spec.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype.name],
            "shape": spec.shape[::-1] if transposed else spec.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for expected, (path, leaf) in zip(specs, leaves, strict=True):
        if path != expected:
            raise AssertionError(f"expected {expected}, found {path}")
        array = np.asarray(leaf)
        file.write(np.ascontiguousarray(array.T if hf_key(path)[1] else array).view(np.uint8).data)
        yield leaf.nbytes


def _model_index(family: Family, configs: Mapping[str, TowerConfig], zero_negative: bool) -> dict[str, Any]:
    index: dict[str, Any] = {"_class_name": min(sorted(family.pipelines), key=len)}
    if family.zero_negative_key is not None:
        index[family.zero_negative_key] = zero_negative
    for tower in family.towers:
        index |= _entries(tower, configs.get(tower.name))
    return index


def _entries(tower: Tower, config: TowerConfig | None) -> dict[str, list[str | None]]:
    if config is None:  # as diffusers writes a component that is left out
        return {tower.folder: [None, None], tower.tokenizer_folder: [None, None]}
    fields = config.to_hf()
    return {
        tower.folder: ["transformers", fields["architectures"][0]],
        tower.tokenizer_folder: ["transformers", _TOKENIZERS[fields["model_type"]]],
    }
