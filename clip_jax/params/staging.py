"""Writing a folder so that it is there whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clip_jax.errors import CheckpointError

CHECKPOINT_MARK = "_CHECKPOINT_METADATA"
"""The file by which an Orbax checkpoint is known."""

FORMAT = "clip_jax"
"""What the custom metadata in it says where this package wrote it, so that it may be replaced."""


@contextlib.contextmanager
def staged_folder(out: Path, *, overwrite: bool = False, mark: str = CHECKPOINT_MARK) -> Iterator[Path]:
    """Yields a path at which to make a folder, which is renamed to `out` if the block ends without an error.

    It lies hidden beside `out`, so that the last step is a rename. A process that is killed leaves it
    there under a name nothing loads; the next one that writes to `out` removes it. Two processes that write
    to the same `out` have two folders, and the second to end meets the first one's result.

    Args:
        out: The folder to make.
        overwrite: Whether one that is there may be replaced.
        mark: The file that one has to have to be replaced; that of a checkpoint has to say that it is ours.

    Raises:
        CheckpointError: `out` exists and `overwrite` is off, it is not a folder this package wrote, or nothing can be
            written beside it.
    """
    out = path_of(out)
    if out.exists():
        out = out.resolve()  # what a link leads to is replaced, not the link
    prefix = f".{out.name}.clip-jax-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}. Choose another place.") from error
    with contextlib.ExitStack() as held:
        try:
            # Nobody looks for stages whose process is gone while one is made that is not locked yet.
            with _locked(out.parent):
                _recover(out, prefix)
                check_free(out, overwrite, mark)
                stage = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
                held.callback(shutil.rmtree, stage, ignore_errors=True)
                lock = held.enter_context(open(stage / "lock", "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # without the hidden path in it
            raise CheckpointError(f"{out} cannot be written: {error.strerror}. Choose another place.") from error
        try:
            yield stage / "new"
            check_free(out, overwrite, mark)
            if out.exists():
                out.rename(stage / "old")
            (stage / "new").rename(out)
        except BaseException:
            if not out.exists() and (stage / "old").exists():
                (stage / "old").rename(out)
            for _ in range(10):  # threads of Orbax may still write, and make anew what is removed under them
                shutil.rmtree(stage, ignore_errors=True)
                time.sleep(0.02)
            raise


def path_of(out: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder to make, with `~` for the user's.

    Raises:
        CheckpointError: No folder can have that name, or TensorStore could not read it.
    """
    name = os.path.expanduser(os.fspath(out))
    if not name:
        raise CheckpointError("The folder to make has no name; expected a path.")
    try:
        path = Path(os.path.abspath(name))
        path.exists()
    except OSError as error:
        raise CheckpointError(f"{name} cannot be written: {error.strerror}. Choose another place.") from error
    if "\\" in str(path):
        raise CheckpointError(f"{path} has a backslash, which TensorStore does not read. Choose another place.")
    return path


def check_free(out: Path, overwrite: bool, mark: str = CHECKPOINT_MARK) -> None:
    """Refuses to replace what is at `out`, unless it has the file `mark` and `overwrite` is on.

    Raises:
        CheckpointError: Something is there that is to be kept.
    """
    if out.is_symlink() and not out.exists():
        raise CheckpointError(f"{out} is a link to {out.readlink()}, which is not there. Choose another name.")
    if not out.exists():
        return
    if not overwrite:
        raise CheckpointError(
            f"{out} exists already. Choose another name, or replace it with overwrite=True (--overwrite)."
        )
    if _runs_in(out):
        raise CheckpointError(f"{out} is where this process runs, so it is not overwritten. Choose another name.")
    if not _is_ours(out, mark) and not (out.is_dir() and not any(out.iterdir())):
        kind = "a checkpoint" if mark == CHECKPOINT_MARK else "an export"
        raise CheckpointError(
            f"{out} is not {kind} written by clip_jax, so it is not overwritten. Choose another name."
        )


def _is_ours(out: Path, mark: str) -> bool:
    """Whether this package wrote what is there: others write checkpoints by Orbax too, with the same file."""
    if mark != CHECKPOINT_MARK:
        return (out / mark).is_file()
    try:
        return custom_metadata(out).get("format") == FORMAT
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False


def custom_metadata(path: Path) -> dict[str, Any]:
    """What was given to Orbax to keep beside a checkpoint; raises what comes of a file that is damaged."""
    stored: dict[str, Any] | None = json.loads((path / CHECKPOINT_MARK).read_text())["custom_metadata"]
    return stored or {}


def _runs_in(folder: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(folder.resolve())
    except FileNotFoundError:  # where this process runs is gone
        return False


def check_apart(out: Path, sources: Iterable[Path]) -> None:
    """Refuses to make `out` where that would replace what is to be read.

    Raises:
        CheckpointError: A source is `out`, or lies in it.
    """
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise CheckpointError(f"{source} lies in {out}, which is to be replaced. Choose another place to write to.")


def identity(path: Path) -> bytes | None:
    """What tells a checkpoint from another that is put in its place; None where there is none.

    Orbax writes into its metadata when it was made, in nanoseconds. Unlike inodes and times of the file system, that
    stays the same on all kinds of them.
    """
    try:
        return (path / CHECKPOINT_MARK).read_bytes()
    except OSError:
        return None


@contextlib.contextmanager
def unreplaced(path: Path, before: bytes | None) -> Iterator[None]:
    """For reading a checkpoint in several steps: they are all of the one whose `identity` was `before`.

    Raises:
        CheckpointError: Another is in its place at the end of the block, or was when something in it failed.
    """
    cause = None
    try:
        yield
    except CheckpointError as error:
        cause = error
    if identity(path) != before:
        raise CheckpointError(f"{path} was replaced while it was read. Try again.") from cause
    if cause is not None:
        raise cause


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder: of those processes that ask for it, one goes on at a time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _recover(out: Path, prefix: str) -> None:
    """Clears the staging folders of killed processes; puts `out` back if one had moved it out of the way."""
    for stage in out.parent.glob(f"{glob.escape(prefix)}*"):
        # "a": a stage whose lock is gone was being removed when its process ended.
        with contextlib.suppress(OSError), open(stage / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held for as long as its process lives
            if not out.exists() and (stage / "old").exists():
                (stage / "old").rename(out)
            shutil.rmtree(stage, ignore_errors=True)
