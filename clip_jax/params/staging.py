"""Writing a folder so that it is there whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import glob
import json
import os
import re
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
"""What the custom metadata in it says where this package wrote it."""

_RANDOM = 8
"""Characters that `tempfile.mkdtemp` puts after a prefix."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a folder of this package is known by, so that it may be replaced, and nothing else.

    Attributes:
        name: For messages.
        mark: A file that it has.
        names: What stands at its top; anything else is somebody's.
    """

    name: str
    mark: str
    names: re.Pattern[str]


CHECKPOINT = Kind(
    "a checkpoint",
    CHECKPOINT_MARK,
    re.compile(
        rf"{CHECKPOINT_MARK}|commit_success\.txt|files\.json|orbax\.checkpoint|state|tokenizers|programs|\.DS_Store"
    ),
)


@contextlib.contextmanager
def staged_folder(out: Path, *, overwrite: bool = False, kind: Kind = CHECKPOINT) -> Iterator[Path]:
    """Yields a path at which to make a folder, which is renamed to `out` if the block ends without an error.

    It lies hidden beside `out`, so that the last step is a rename, before which it is on the disk. A process that is
    killed leaves it there under a name nothing loads; the next one that writes to `out` removes it. Two processes that
    write to the same `out` have two folders, and the second to end meets the first one's result.

    Args:
        out: The folder to make.
        overwrite: Whether one that is there may be replaced.
        kind: Of the folder; one that is there has to be of it, too.

    Raises:
        CheckpointError: `out` exists and `overwrite` is off, it holds something that this package did not write, or
            nothing can be written beside it.
    """
    given = path_of(out)
    out = given.resolve() if given.is_symlink() else given  # what a link leads to is replaced, not the link
    try:
        if not given.is_symlink():
            out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}. Choose another place.") from error
    with contextlib.ExitStack() as held:
        with _write_errors(out), _locked(out.parent):
            # Nobody looks for stages whose process is gone while one is made that is not locked yet.
            _recover(out)
            _check_free(given, overwrite, kind)
            stage = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
            held.callback(_clear, stage)
            lock = held.enter_context(open(stage / "lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield stage / "new"
            with _write_errors(out):
                _sync_all(stage / "new")
                with _locked(out.parent):
                    _check_free(given, overwrite, kind)
                    if out.exists():
                        shutil.copymode(out, stage / "new")
                        out.rename(stage / "old")
                    (stage / "new").rename(out)
                    _sync(out.parent)
        except BaseException as error:
            _put_back(stage, out, error)
            for _ in range(10):  # threads of Orbax may still write, and make anew what is removed under them
                _clear(stage)
                time.sleep(0.02)
            raise


@contextlib.contextmanager
def _write_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # without the hidden path in it
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}. Choose another place.") from error


def _prefix(out: Path) -> str:
    return f".{out.name}.clip-jax-"


def _has_the_only_copy(stage: Path) -> bool:
    """Whether what was at `out` has been moved there, and nothing was put in its place."""
    return (stage / "old").exists() and (stage / "new").exists()


def _clear(stage: Path) -> None:
    if not _has_the_only_copy(stage):
        shutil.rmtree(stage, ignore_errors=True)


def _put_back(stage: Path, out: Path, error: BaseException) -> None:
    """Moves what was at `out` back there, where the last step has failed.

    Raises:
        CheckpointError: It cannot be moved; tells where it is.
    """
    old = stage / "old"
    with contextlib.suppress(OSError):
        if old.exists() and not out.exists():
            old.rename(out)
    if _has_the_only_copy(stage):
        raise CheckpointError(f"{out} could not be replaced ({error}), and what was there is in {old}.") from error


def _sync_all(path: Path) -> None:
    """Has a folder on the disk with all that is in it: a rename may get there before what is renamed."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a file system that does not do it with folders
            raise
    finally:
        os.close(descriptor)


def path_of(out: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder to make, with `~` for the user's.

    Raises:
        CheckpointError: No folder can have that name, or TensorStore could not read it.
    """
    name = os.path.expanduser(os.fspath(out))
    if not name:
        raise CheckpointError("The folder to make has no name; expected a path.")
    try:
        # Where `..` follows a link, only the system knows what it means.
        path = Path(os.path.realpath(name) if ".." in Path(name).parts else os.path.abspath(name))
        path.exists()
    except OSError as error:
        raise CheckpointError(f"{name} cannot be written: {error.strerror}. Choose another place.") from error
    if "\\" in str(path):
        raise CheckpointError(f"{path} has a backslash, which TensorStore does not read. Choose another place.")
    return path


def check_free(out: Path, overwrite: bool, kind: Kind = CHECKPOINT) -> None:
    """Refuses to replace what is at `out`, unless it is of that kind and `overwrite` is on.

    What a process that was killed had moved away is put back before.

    Raises:
        CheckpointError: Something is there that is to be kept.
    """
    target = out.resolve() if out.is_symlink() else out
    if target.parent.is_dir():
        with contextlib.suppress(OSError), _locked(target.parent):
            _recover(target)
    _check_free(out, overwrite, kind)


def _check_free(out: Path, overwrite: bool, kind: Kind) -> None:
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
    if os.path.ismount(out):
        raise CheckpointError(f"{out} is a mount point, which cannot be replaced. Choose a folder in it.")
    names = [path.name for path in out.iterdir()] if out.is_dir() else [""]
    if names and not _is_ours(out, kind):
        raise CheckpointError(
            f"{out} is not {kind.name} written by clip_jax, so it is not overwritten. Choose another name."
        )
    if others := sorted(name for name in names if not kind.names.fullmatch(name)):
        raise CheckpointError(
            f"{out} is {kind.name} beside which clip_jax did not write {', '.join(others)}, so it is not overwritten. "
            f"Move what is not of it, or choose another name."
        )


def _is_ours(out: Path, kind: Kind) -> bool:
    """Whether this package wrote what is there: others write checkpoints by Orbax too, with the same file."""
    if kind.mark != CHECKPOINT_MARK:
        return (out / kind.mark).is_file()
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


def _recover(out: Path) -> None:
    """Clears the staging folders of killed processes; puts `out` back if one had moved it out of the way."""
    for stage in out.parent.glob(f"{glob.escape(_prefix(out))}*"):
        if len(stage.name) != len(_prefix(out)) + _RANDOM:  # of another folder, whose name goes on like that
            continue
        # "a": a stage whose lock is gone was being removed when its process ended.
        with contextlib.suppress(OSError), open(stage / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held for as long as its process lives
            if not out.exists() and (stage / "old").exists():
                (stage / "old").rename(out)
            _clear(stage)
