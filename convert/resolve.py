"""What the user calls a source -> a path on this machine."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from clip_jax.convert.hub import Access, fetch
from clip_jax.errors import CheckpointError
from clip_jax.tokenizers.files import expanded

#: A folder, a file of weights or a Hub repo id; or several files, and folders of a text encoder, that make up a family.
SourceLike = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_EXPECTED = "a folder, a file of weights, a Hub repo id (owner/name), or random:FAMILY"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A source on this machine.

    Attributes:
        path: Where it is.
        name: What to call it in a checkpoint's provenance: the repo id with its commit, or the plain name.
    """

    path: Path
    name: str


def resolve_all(sources: SourceLike, access: Access, *, progress: bool | None = None) -> list[Resolved]:
    """`resolve` for one source or several, as they come."""
    listed = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not listed:
        raise CheckpointError(f"No source; expected {_EXPECTED}.")
    return [resolve(source, access, progress=progress) for source in listed]


def resolve(source: str | os.PathLike[str], access: Access, *, progress: bool | None = None) -> Resolved:
    """Takes a local path as it is; downloads what `access` wants of a Hub repo id.

    Raises:
        CheckpointError: No such path, and not a repo that can be had.
    """
    if not os.fspath(source):
        raise CheckpointError(f"The source is empty; expected {_EXPECTED}.")
    path = expanded(source)
    if _exists(path):
        return Resolved(path, path.resolve().name)
    if os.path.islink(path):
        raise CheckpointError(f"{path} is a link to {os.readlink(path)}, which is not there.")
    if os.fspath(source).startswith("random:"):
        raise CheckpointError(f"{os.fspath(source)!r} is no path; `clip_jax.load` takes it as a str, by itself.")
    if not isinstance(source, str) or not _REPO_ID.fullmatch(source):
        raise CheckpointError(f"{os.fspath(source)!r} does not exist. Expected {_EXPECTED}.")
    try:
        snapshot = fetch(source, access, progress=progress)
    except CheckpointError as error:
        raise CheckpointError(f"{source!r} is not a local path; as a Hub repo: {error}") from error
    return Resolved(snapshot, f"{source}@{snapshot.name}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False
