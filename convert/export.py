"""`export`: a checkpoint of this package in, a diffusers folder with safetensors out, tensor by tensor."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

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
    CheckpointMetadata,
    is_checkpoint,
    iter_params,
    read_metadata,
    read_specs,
    tokenizer_folder,
    versions,
)
from clip_jax.params.quantize import PLAIN
from clip_jax.params.shapes import TensorSpec, param_shapes
from clip_jax.params.staging import Kind, check_apart, check_free, identity, path_of, staged_folder, unreplaced
from clip_jax.progress import byte_bar
from clip_jax.tokenizers import read_tokenizer
from clip_jax.tokenizers.files import expanded

MARK = "clip_jax_export.json"
"""The file by which an export is known; it says where the weights come from."""

EXPORT = Kind(
    "an export", MARK, re.compile(rf"{re.escape(MARK)}|model_index\.json|(text_encoder|tokenizer)(_\d)?|\.DS_Store")
)

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# As in `model_index.json` of the published pipelines; [null, null] stands for a component that is left out.
_LEFT_OUT = [None, None]
_INDEX: Mapping[str, Mapping[str, Any]] = {
    "sd15": {"_class_name": "StableDiffusionPipeline"},
    "sd21": {"_class_name": "StableDiffusionPipeline"},
    "sdxl": {"_class_name": "StableDiffusionXLPipeline"},
    "sdxl_refiner": {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "requires_aesthetics_score": True,
        "text_encoder": _LEFT_OUT,
        "tokenizer": _LEFT_OUT,
    },
    "sd3": {"_class_name": "StableDiffusion3Pipeline"},
    "flux": {"_class_name": "FluxPipeline"},
}
# Those that read tokenizer.json; transformers 5 has no others, and takes these names too.
_TOKENIZERS = {"clip_text_model": "CLIPTokenizerFast", "t5": "T5TokenizerFast"}


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: Literal["hf"] = "hf",
    overwrite: bool = False,
    progress: bool | None = None,
) -> Path:
    """Writes the text side of a diffusers folder: what transformers, diffusers and `clip_jax.load` read.

    Every tensor has the very bits that are stored, and `clip-jax convert` of the folder gives them back. Only where
    SD 3's CLIP-L has no projection, the identity is written, as diffusers does. The weights go through memory a few
    hundred MB at a time.

    Example:
        >>> clip_jax.convert.export("sdxl-orbax", "sdxl-hf")
        >>> CLIPTextModel.from_pretrained("sdxl-hf", subfolder="text_encoder")
        >>> DiffusionPipeline.from_pretrained("sdxl-hf", unet=None, vae=None, scheduler=None).encode_prompt("a cat")

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
        CheckpointError: The source is no checkpoint of this package, or is quantised; or `out` exists. What is on
            disk stays as it is.
    """
    if format != "hf":
        raise ClipJaxError(f"format must be 'hf', found {format!r}.")
    path, out = expanded(source), path_of(out)
    if not is_checkpoint(path):
        raise CheckpointError(f"{path} is not a folder written by `clip-jax convert`, which is what can be exported.")
    check_free(out, overwrite, EXPORT)
    check_apart(out, [path])
    before = identity(path)
    metadata = read_metadata(path)
    if metadata.scheme is not PLAIN:
        raise CheckpointError(
            f"{path} is quantised to {metadata.scheme.name}, for which transformers has no names; expected whole "
            f"weights. Export the checkpoint that it was made of, or convert its source without quantize."
        )
    family = family_called(metadata.family)
    if family.name not in _INDEX:
        raise ClipJaxError(f"{path} is of family {family.name!r}, of which no diffusers pipeline is known here.")
    towers = [tower for tower in family.towers if tower.name in metadata.configs]
    specs = {name: _widest_first(tree) for name, tree in read_specs(path, metadata.configs).items()}
    total = sum(spec.nbytes for tree in specs.values() for spec in tree.values())
    with (
        staged_folder(out, overwrite=overwrite, kind=EXPORT) as folder,
        unreplaced(path, before),
        byte_bar(total, "Exporting", progress) as bar,
    ):
        try:
            for tower in towers:
                config = metadata.configs[tower.name]
                tokenizer = read_tokenizer(config, tokenizer_folder(path, tower.name))
                tokenizer.save(folder / tower.tokenizer_folder)
                leaves = ((p, leaf) for _, p, leaf in iter_params(path, specs, None, {tower.name}))
                _write_tower(folder / tower.folder, tower, config, specs[tower.name], leaves, bar.update)
            _write_json(folder / "model_index.json", _model_index(family, metadata))
            _write_json(folder / MARK, {"provenance": metadata.provenance, "exported_by": versions()})
        except OSError as error:
            raise CheckpointError(f"{out} cannot be written: {error}. Make room, or choose another place.") from error
    return out


def write_component(folder: Path, config: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Writes the folder of one text encoder: `config.json` and `model.safetensors`, each whole or not at all.

    Args:
        folder: Is made if need be; other files in it are left alone.
        config: Of transformers.
        leaves: Path -> parameter, of numpy or jax.

    Raises:
        CheckpointError: A dtype that safetensors lacks, or the folder cannot be written. What was in it stays.
    """
    specs = _widest_first({path: TensorSpec(tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in leaves.items()})
    if unknown := {spec.dtype.name for spec in specs.values() if spec.dtype not in _DTYPE_NAMES}:
        raise CheckpointError(f"{folder}: safetensors has no dtype {', '.join(sorted(unknown))}. Cast the params.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".clip-jax-", dir=folder) as stage:
            _write_json(Path(stage, "config.json"), config)
            _write_safetensors(
                Path(stage, "model.safetensors"), specs, ((path, leaves[path]) for path in specs), lambda _: None
            )
            _replace_component(folder, Path(stage))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}. Make room, or choose another place.") from error


def _replace_component(folder: Path, new: Path) -> None:
    """Moves both files of `new` to `folder`; what was there goes weights first, so that in between nothing loads."""
    names, kept = ("model.safetensors", "config.json"), new / "kept"
    kept.mkdir()
    try:
        for name in names:
            if (folder / name).exists():
                os.replace(folder / name, kept / name)
        for name in reversed(names):
            os.replace(new / name, folder / name)
    except BaseException:
        for path in sorted(kept.iterdir()):  # the config first
            os.replace(path, folder / path.name)
        raise


def _widest_first(tree: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The same in the order in which each tensor is aligned to its dtype, as torch needs it."""
    return dict(sorted(tree.items(), key=lambda item: -item[1].dtype.itemsize))


def _write_tower(
    folder: Path,
    tower: Tower,
    config: TowerConfig,
    specs: Mapping[str, TensorSpec],
    leaves: Iterable[tuple[str, jax.Array]],
    update: Callable[[int], object],
) -> None:
    """Writes `config.json` and `model.safetensors`."""
    exported = _exported(tower, config)
    if exported != config:
        path = "text_projection/kernel"
        spec = TensorSpec(param_shapes(exported)[path], next(iter(specs.values())).dtype)
        identity = jnp.eye(spec.shape[0], dtype=spec.dtype)
        specs, leaves = {path: spec, **specs}, itertools.chain([(path, identity)], leaves)
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", exported.to_hf())
    _write_safetensors(folder / "model.safetensors", specs, leaves, update)


def _exported(tower: Tower, config: TowerConfig) -> TowerConfig:
    """The architecture with the projection whose absence stands for the identity: diffusers wants to see one."""
    if tower.identity_projection and isinstance(config, ClipTextConfig) and config.projection_dim is None:
        return dataclasses.replace(config, projection_dim=config.hidden_size)
    return config


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")


def _write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    leaves: Iterable[tuple[str, Any]],
    update: Callable[[int], object],
) -> None:
    """Writes a header from what is known of the tensors, then each of them as it comes, in the same order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for parameter, spec in specs.items():
        key, transposed = hf_key(parameter)
        begin, end = end, end + spec.nbytes
        header[key] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": spec.shape[::-1] if transposed else spec.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that what follows is aligned
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, (parameter, leaf) in zip(specs, leaves, strict=True):
            assert parameter == expected
            array = np.asarray(leaf).T if hf_key(parameter)[1] else np.asarray(leaf)
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
            update(leaf.nbytes)


def _model_index(family: Family, metadata: CheckpointMetadata) -> dict[str, Any]:
    index = dict(_INDEX[family.name])
    if family.zero_negative_key is not None:
        index[family.zero_negative_key] = metadata.zero_negative
    for tower in family.towers:
        if tower.name in metadata.configs:
            fields = _exported(tower, metadata.configs[tower.name]).to_hf()
            index[tower.folder] = ["transformers", fields["architectures"][0]]
            index[tower.tokenizer_folder] = ["transformers", _TOKENIZERS[fields["model_type"]]]
        else:
            index[tower.folder] = index[tower.tokenizer_folder] = _LEFT_OUT
    return index
