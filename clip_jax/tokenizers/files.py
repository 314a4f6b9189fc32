"""Reads the small text files of a checkpoint, among them those of a tokenizer folder."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clip_jax.errors import CheckpointError, ClipJaxError

_NO_LIMIT = 10**20  # transformers writes int(1e30) for "no maximum"
_MAX_NAMES = 8  # of files in one message


def token_content(token: str | dict[str, Any] | None) -> str | None:
    """The text of a token, which settings hold as text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def model_max_length(settings: dict[str, Any], path: Path, default: int) -> int:
    """How many ids a prompt may have; `default` where tokenizer_config.json (`path`) names no maximum.

    Raises:
        CheckpointError: It is no such number.
    """
    length = settings.get("model_max_length", settings.get("max_len"))
    if length is None or (isinstance(length, (int, float)) and length >= _NO_LIMIT):
        return default
    if not isinstance(length, int) or length < 2:
        raise CheckpointError(f"{path}: model_max_length must be a whole number of 2 or more, found {length!r}.")
    return length


def check_sides(settings: dict[str, Any], path: Path) -> None:
    """Refuses rows that tokenizer_config.json (`path`) has padded or cut on the left.

    Raises:
        CheckpointError: It has them so.
    """
    for name in ("padding_side", "truncation_side"):
        if settings.get(name) not in (None, "right"):
            raise CheckpointError(
                f"{path}: {name} is {settings[name]!r}, expected 'right': rows are padded and cut at their end. Take "
                f"the tokenizer of the pipeline, or change it to 'right' if the model was trained so."
            )


@contextlib.contextmanager
def telling_damage(folder: Path) -> Iterator[None]:
    """Around what makes a tokenizer of files: those that hold something else than it takes for granted are an error.

    Raises:
        CheckpointError: They do.
    """
    try:
        yield
    except ClipJaxError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{folder}: the files of its tokenizer cannot be read ({type(error).__name__}: {error}); fetch them again."
        ) from error


def read_optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`; empty where there is no such file."""
    return read_json(path) if exists(path) else {}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: It cannot be read, or is not UTF-8, not JSON, not an object, or a Git LFS pointer.
    """
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(value).__name__}.")
    return value


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
        CheckpointError: It cannot be read, or is not UTF-8, or a Git LFS pointer.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: expected UTF-8 text, found {error}; fetch the file again.") from error
    if text.startswith("version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`, or download the file."
        )
    return text


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path that a user gave, with `~` for the user's folder."""
    with contextlib.suppress(RuntimeError):  # no such user: then it is a plain name
        return Path(path).expanduser()
    return Path(path)


def exists(path: Path) -> bool:
    """Whether there is a file, or a folder, at a path.

    Raises:
        CheckpointError: The folder that it would be in may not be looked into.
    """
    try:
        return path.exists()
    except OSError as error:
        raise _unreadable(path, error) from error


def names_in(folder: Path) -> set[str]:
    """The plain names of what is in a folder.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise _unreadable(folder, error) from error


def listing(folder: Path) -> str:
    """What is in a folder, for messages."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(names_in(folder))
    return ", ".join(names[:_MAX_NAMES] + ["..."] * (len(names) > _MAX_NAMES)) or "an empty folder"


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read: {error.strerror}. Check the path and its permissions.")
