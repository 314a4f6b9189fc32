"""Checkpoints of this package: one Orbax folder with one entry per tower, and the tokenizers beside it.

    OUT/_CHECKPOINT_METADATA      custom metadata: family, configs, provenance (JSON)
    OUT/state/                    the params, {tower: tree}, in Orbax's own layout: `ocp.load(OUT)` reads it
    OUT/tokenizers/<tower>/       tokenizer.json and tokenizer_config.json
    OUT/files.json                size of every file below: an incomplete copy is told from a whole one

Written by Orbax through its v1 API, read as `arrays` says. Orbax is imported inside the functions: loading needs none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.metadata
import json
import logging
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.config import TowerConfig, config_from_hf
from clip_jax.errors import CheckpointError
from clip_jax.params.arrays import StoredArray, open_arrays
from clip_jax.params.cast import check_range
from clip_jax.params.quantize import PLAIN, Scheme, join, scheme_called
from clip_jax.params.shapes import TensorSpec, check_shapes, list_faults, param_shapes, unflatten
from clip_jax.params.shard import Placement, sharded_array
from clip_jax.params.staging import CHECKPOINT_MARK, FORMAT, custom_metadata, staged_folder
from clip_jax.progress import byte_bar

# Version 2 is quantised; what is not keeps version 1, which older ones of this package read.
_FORMAT_VERSION, _FILES = 2, "files.json"
# What comes of metadata that is not there, no JSON, or of another shape. (Not ValueError: ours are such, too.)
_UNREADABLE = (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError)
# About so much is read ahead of the parameter that is wanted: enough to keep the disk busy, little beside the params.
_READ_BYTES = 256 * 2**20
# A process that wants a part of a parameter reads all chunks that it touches; small ones take memory to write.
_CHUNK_BYTES = 2**24
# Orbax counts what it does by one number for the process, and of several threads each waits for the others.
_WRITING = threading.Lock()


class SavesFiles(Protocol):
    """A tokenizer: something that writes itself into a folder."""

    def save(self, folder: Path) -> None:
        """Writes its files into `folder`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """What a checkpoint says about itself.

    Attributes:
        family: Name of the family.
        configs: Tower name -> architecture.
        provenance: Where the weights come from: source files with sha256, format, dtypes, ignored keys,
            versions of the libraries that wrote it. JSON.
        zero_negative: Whether no negative prompt means zeros (`Family.zero_negative`).
        scheme: How the parameters are quantised.
    """

    family: str
    configs: dict[str, TowerConfig]
    provenance: dict[str, Any]
    zero_negative: bool = False
    scheme: Scheme = PLAIN


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is, or was to become, an Orbax folder."""
    marks = (CHECKPOINT_MARK, "orbax.checkpoint", "manifest.ocdbt", "_METADATA")
    return path.is_dir() and (path.name.endswith(".partial_save") or any(os.path.exists(path / m) for m in marks))


@jax.transfer_guard("allow")
def write_checkpoint(
    out: Path,
    parts: Iterable[Mapping[str, Mapping[str, np.ndarray | jax.Array]]],
    *,
    metadata: CheckpointMetadata,
    tokenizers: Mapping[str, SavesFiles],
    overwrite: bool = False,
    extra: Callable[[Path], None] | None = None,
    check: Callable[[Path], dict[str, Any]] | None = None,
) -> None:
    """Writes a checkpoint part by part, each twice in memory at most; `out` appears whole or not at all.

    Args:
        out: The folder to make.
        parts: Each maps tower name -> path -> array, e.g. the parameters of one layer; quantised ones are split.
        metadata: Stored as Orbax's custom metadata.
        tokenizers: Tower name -> tokenizer.
        overwrite: Whether an existing checkpoint may be replaced; it is kept until the new one is whole.
        extra: Writes more files into the folder; not at its top.
        check: Called with the new checkpoint before it appears; what it returns becomes part of the provenance, and
            what it raises leaves everything as it was.

    Raises:
        CheckpointError: `out` exists, holds something else than a checkpoint, or cannot be written; or several
            processes share the devices.
    """
    from orbax.checkpoint import v1 as ocp

    if jax.process_count() > 1:  # each would stage and rename a folder of its own
        raise CheckpointError(
            f"{out}: expected to be written by one process, found {jax.process_count()} that share their devices. "
            f"Load the model in a process without jax.distributed, and save it there."
        )

    stored = {
        "format": FORMAT,
        "format_version": 1 if metadata.scheme is PLAIN else _FORMAT_VERSION,
        "family": metadata.family,
        "zero_negative": metadata.zero_negative,
        "quantize": metadata.scheme.name,
        "towers": {name: {"config": config.to_hf()} for name, config in metadata.configs.items()},
        "provenance": {**metadata.provenance, "written_by": versions()},
    }
    context = ocp.Context()
    # Compression would save a tenth (float32) to a fifth (bfloat16) of the disk, but take half as long again to
    # read, and twice the memory to write. But Orbax gives int4 a byte, which compression takes back.
    context.array.saving.use_compression = metadata.scheme.name == "int4"
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    with _WRITING, staged_folder(out, overwrite=overwrite) as folder, _plain(folder) as plain, context, _quiet_orbax():
        custom_metadata: dict[str, Any] | None = stored
        for part in parts:
            _check_alive(part)
            tree = {tower: unflatten(leaves) for tower, leaves in part.items()}
            with _write_errors(out):
                ocp.partial.save(plain, tree, custom_metadata=custom_metadata)
            custom_metadata = None
        with _write_errors(out):
            ocp.partial.finalize(plain)
            if not (folder / CHECKPOINT_MARK).is_file():
                raise OSError("Orbax has not joined what it wrote")
            # Only its presence counts; Orbax writes the folder's place on this machine into it.
            (folder / "commit_success.txt").write_text("Checkpoint commit was successful\n")
            for name, tokenizer in tokenizers.items():
                tokenizer_folder(folder, name).mkdir(parents=True)
                tokenizer.save(tokenizer_folder(folder, name))
            if extra is not None:
                extra(folder)
            # Without the files at the top: they are small, and Orbax's own.
            sizes = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*/*") if p.is_file()}
            (folder / _FILES).write_text(json.dumps(sizes, indent=1))
        if check is not None:
            _add_provenance(folder, check(folder))


def _add_provenance(folder: Path, found: dict[str, Any]) -> None:
    """Adds to the custom metadata, which Orbax keeps as JSON."""
    path = folder / CHECKPOINT_MARK
    whole = json.loads(path.read_text())
    whole["custom_metadata"]["provenance"] |= found
    path.write_text(json.dumps(whole))


def _check_alive(part: Mapping[str, Mapping[str, np.ndarray | jax.Array]]) -> None:
    for tower, leaves in part.items():
        for path, leaf in leaves.items():
            if isinstance(leaf, jax.Array) and leaf.is_deleted():
                raise CheckpointError(
                    f"{tower}/{path} has been deleted, as a jit with donate_argnums does. Save params that are there."
                )


@contextlib.contextmanager
def _plain(path: Path) -> Iterator[Path]:
    """The same path without characters that mean something in a pattern, by way of a link if it has such.

    Orbax looks for what it has to join by a pattern with the whole path in it. In `models [v1]/` it finds nothing, and
    says nothing of it.
    """
    if glob.escape(str(path)) == str(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="clip-jax-") as folder:
        link = Path(folder, "beside")
        link.symlink_to(path.parent)
        yield link / path.name


@contextlib.contextmanager
def _write_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and tokenizers have no common base class for what a full disk raises
        reason = str(error).rpartition('": ')[2].partition("\n")[0]  # without TensorStore's chain of paths
        raise CheckpointError(
            f"{out} cannot be written: {reason}. If the disk is full, make room or choose another place."
        ) from error


def read_metadata(path: Path) -> CheckpointMetadata:
    """Reads what a checkpoint says about itself, without its weights.

    Raises:
        CheckpointError: An interrupted, foreign or newer checkpoint.
    """
    if path.name.endswith(".partial_save"):
        raise CheckpointError(
            f"{path} is an Orbax folder that was never finished: what wrote it was interrupted. Convert again."
        )
    try:
        stored = custom_metadata(path) if (path / CHECKPOINT_MARK).exists() else {}
        if stored.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is an Orbax folder that clip_jax did not write, or not whole. Expected one made by "
                f"`clip-jax convert` or `TextEncoder.save`."
            )
        if not (path / "commit_success.txt").is_file():
            raise CheckpointError(f"{path} is not whole: it lacks commit_success.txt. Copy it again, or convert again.")
        if stored["format_version"] > _FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {stored['format_version']}, this clip_jax reads up to "
                f"{_FORMAT_VERSION}. Upgrade clip-jax-text."
            )
        _check_files(path)
        configs = {name: config_from_hf(tower["config"]) for name, tower in stored["towers"].items()}
        return CheckpointMetadata(
            family=stored["family"],
            configs=configs,
            provenance=stored["provenance"],
            zero_negative=stored["zero_negative"],
            scheme=scheme_called(stored.get("quantize")),
        )
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path}: its metadata cannot be read ({type(error).__name__}: {error}). Convert again."
        ) from error


def _check_files(path: Path) -> None:
    """Compares the files with their sizes when written; Orbax's own errors are late, long and incomplete."""
    faults = []
    for name, size in json.loads((path / _FILES).read_text()).items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            faults.append(f"{name} {'is missing' if found is None else f'has {found} of {size} bytes'}")
    if faults:
        raise CheckpointError(
            f"{path} is not whole. " + " ".join(list_faults("damaged", faults)) + " Copy it again, or convert again."
        )


def tokenizer_folder(path: Path, tower: str) -> Path:
    """Where a checkpoint keeps the tokenizer of a tower."""
    return path / "tokenizers" / tower


def read_specs(
    path: Path, configs: Mapping[str, TowerConfig], scheme: Scheme = PLAIN
) -> dict[str, dict[str, TensorSpec]]:
    """Tower name -> path -> shape and dtype of the stored arrays, compared with the architecture.

    Raises:
        CheckpointError: The stored tree is not that of `configs`, quantised by `scheme`.
    """
    specs = stored_specs(path)
    if sorted(specs) != sorted(configs):
        raise CheckpointError(f"{path} holds the towers {sorted(specs)}, its metadata says {sorted(configs)}.")
    for tower, config in configs.items():
        found = {p: spec.shape for p, spec in specs[tower].items()}
        check_shapes(scheme.stored_shapes(param_shapes(config)), found, f"Tower {tower} of {path}")
    return specs


def stored_specs(path: Path) -> dict[str, dict[str, TensorSpec]]:
    """Tower name -> path -> shape and dtype of the stored parameters, whatever they are.

    Raises:
        CheckpointError: TensorStore cannot list them.
    """
    specs: dict[str, dict[str, TensorSpec]] = {}
    for (tower, p), array in _open_arrays(path).items():
        specs.setdefault(tower, {})[p] = TensorSpec(array.shape, array.dtype)
    return specs


def read_params(
    path: Path,
    specs: Mapping[str, Mapping[str, TensorSpec]],
    dtype: np.dtype | None,
    *,
    scheme: Scheme = PLAIN,
    towers: Collection[str] | None = None,
    placement: Placement | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Loads the params, cast to `dtype` (None keeps what is stored); what is quantised stays as it is.

    Args:
        path: The checkpoint.
        specs: All that it holds.
        dtype: To cast to.
        scheme: To quantise by.
        towers: Those to load; None means all.
        placement: Where each parameter goes; None means the default device. Every process reads the parts of its own
            devices.
        progress: Whether to show a progress bar; None means on a terminal.

    Raises:
        CheckpointError: float16 cannot hold a value, or TensorStore cannot read the data.
    """
    towers = specs.keys() if towers is None else towers
    leaves: dict[str, dict[str, jax.Array]] = {}
    total = sum(spec.nbytes for tower in towers for spec in specs[tower].values())
    with byte_bar(total, "Loading", progress) as bar:
        for tower, p, leaf in iter_params(path, specs, dtype, towers, placement, scheme):
            leaves.setdefault(tower, {})[p] = scheme.quantize(p, leaf)
            bar.update(specs[tower][p].nbytes)
    return {tower: unflatten(join(tree)) for tower, tree in leaves.items()}


def iter_params(
    path: Path,
    specs: Mapping[str, Mapping[str, TensorSpec]],
    dtype: np.dtype | None,
    towers: Collection[str],
    placement: Placement | None = None,
    scheme: Scheme = PLAIN,
) -> Iterator[tuple[str, str, jax.Array]]:
    """Tower, path and stored array of some towers, one after the other; as in `read_params`, to be quantised."""
    arrays = _open_arrays(path)

    def begin(tower: str, p: str) -> Callable[[], jax.Array]:
        array = arrays[tower, p]
        kept = scheme.read_dtype(p, array.dtype, dtype)
        if placement is None:
            reading = array.read(kept)
            return lambda: jax.device_put(reading.result())
        sharding = placement(tower, p, specs[tower][p])
        return lambda: sharded_array(array.shape, sharding, lambda index: array.read(kept, index).result())

    # Of what is freed between quantised params, malloc gives little back: then there should be less of it.
    limit = _READ_BYTES if scheme is PLAIN else _READ_BYTES // 8
    ahead: deque[tuple[str, str, Callable[[], jax.Array]]] = deque()
    to_read = deque((tower, p) for tower, tree in specs.items() if tower in towers for p in tree)
    pending = 0  # bytes that are read ahead
    while to_read or ahead:
        while to_read and pending < limit:
            tower, p = to_read.popleft()
            ahead.append((tower, p, begin(tower, p)))
            pending += specs[tower][p].nbytes
        tower, p, finish = ahead.popleft()
        pending -= specs[tower][p].nbytes
        try:
            leaf = finish()
        except Exception as error:  # TensorStore raises one for each of its codes, ValueError for most
            raise _damaged(path, error) from error
        if leaf.dtype == jnp.float16 and specs[tower][p].dtype != np.float16:
            check_range(float(jnp.abs(leaf).max()), f"{tower}/{p}")
        yield tower, p, leaf


def _open_arrays(path: Path) -> dict[tuple[str, str], StoredArray]:
    """Tower and path -> array."""
    try:
        arrays = open_arrays(path / "state")
    except Exception as error:
        raise _damaged(path, error) from error
    if not arrays:
        raise _damaged(path, "it lists no params")
    return {(name.partition("/")[0], name.partition("/")[2]): array for name, array in arrays.items()}


def _damaged(path: Path, reason: object) -> CheckpointError:
    # The first sentence: TensorStore appends its whole specification.
    reason = str(reason).partition(" [source locations")[0].partition(". See full")[0].partition("\n")[0]
    return CheckpointError(f"{path} cannot be read, files in it are missing or damaged: {reason}. Convert again.")


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what is written."""
    names = ("clip-jax-text", "jax", "flax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps absl's log of Orbax' steps off the terminal; errors still arrive as exceptions."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
