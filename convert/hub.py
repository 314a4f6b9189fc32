"""Fetches text encoders and their tokenizers from the Hugging Face Hub, and nothing else of a pipeline."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from clip_jax.convert.readers.tensor_file import parse_json_object
from clip_jax.convert.source import ENCODER_FOLDER, no_weights, pick_weights, read_index
from clip_jax.errors import CheckpointError

_MODEL_INDEX = "model_index.json"  # at the root of a diffusers pipeline
_TOKENIZER = re.compile(r"tokenizer(_\d+)?")
_SMALL_FILES = (
    "config.json",
    "open_clip_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
)
_TIMEOUT_SECONDS = 10  # for the first answer; by default the client waits without end

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
    """How to get at a repository, and what of it is wanted.

    Attributes:
        revision: A branch, tag or commit; the default branch if None.
        local_files_only: Whether to use the cache without asking the Hub.
        token: True or None is the one that is logged in.
        cache_dir: Where downloads are kept; None is the client's place.
        skip: Folders that are not wanted.
        folder: The one folder that is wanted, as that of one text encoder ("" is the root); None is all of a
            pipeline.
    """

    revision: str | None = None
    local_files_only: bool = False
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    skip: Collection[str] = ()
    folder: str | None = None

    def client_options(self) -> dict[str, Any]:
        """Arguments of the client's `snapshot_download`."""
        return {"revision": self.revision, "token": self.token, "cache_dir": self.cache_dir}


def fetch(repo_id: str, access: Access | None = None, *, progress: bool | None = None) -> Path:
    """Downloads what text encoding needs of a repository into the cache of `huggingface_hub`.

    That is, of a diffusers pipeline, `model_index.json` and the configs, weights and tokenizer files in
    `text_encoder/`, `text_encoder_2/`, ..., `tokenizer/`, ...; of any other repository, the same kinds of
    files at its root. Of several copies of the weights only the one that `open_source` reads is downloaded.
    If the Hub cannot be reached, or refuses, a copy that is already in the cache is used.

    Args:
        repo_id: Such as "stable-diffusion-v1-5/stable-diffusion-v1-5".
        access: How to get at it; None is the default branch of all of it.
        progress: Whether to show progress bars; if None, only on a terminal.

    Returns:
        The snapshot folder, named after the commit. Not to be written to: its files are shared.

    Raises:
        CheckpointError: If there is no such repository or revision, it is gated, the Hub cannot be reached
            and the files are not in the cache, or the repository has no text encoder in a format that is read.
    """
    access = Access() if access is None else access
    show = sys.stderr.isatty() if progress is None else progress
    try:
        return _cached(repo_id, access) if access.local_files_only else _download(repo_id, access, show)
    except CheckpointError:
        raise
    except Exception as error:  # the client lets those of its HTTP, disk and JSON libraries through
        raise CheckpointError(_explain(error, repo_id, access.revision)) from error


def needed_files(repo_id: str, names: Collection[str], wanted: str | None = None) -> list[str]:
    """What text encoding needs of a repository; of sharded weights the index, but not yet the shards.

    Args:
        repo_id: For the messages.
        names: The paths of all its files.
        wanted: The one folder that is wanted, as that of one text encoder; None is all of a pipeline.

    Raises:
        CheckpointError: If there is no text encoder, or one without weights of the usual names.
    """
    contents: dict[str, set[str]] = defaultdict(set)  # folder -> plain file names
    for name in names:
        folder, _, file = name.rpartition("/")
        contents[folder].add(file)
    pipeline = wanted is None and _MODEL_INDEX in names
    folders = sorted(filter(_is_component, contents)) if pipeline else [wanted or ""]
    encoders = list(filter(ENCODER_FOLDER.fullmatch, folders)) if pipeline else folders
    if wanted and wanted not in contents:
        raise CheckpointError(
            f"{repo_id}: expected a folder {wanted}, found {', '.join(sorted(contents)[:20]) or 'nothing'}. Check"
            " its name."
        )
    if not encoders:
        raise CheckpointError(
            f"{repo_id}: expected a folder text_encoder, found a pipeline without one. Check that it is the"
            " repository that you mean."
        )
    needed = [_MODEL_INDEX] if pipeline else []
    for folder in folders:
        keep = [file for file in _SMALL_FILES if file in contents[folder]]
        if folder in encoders:
            weights = pick_weights(contents[folder])
            if weights is None:
                raise no_weights(f"{repo_id}/{folder}".rstrip("/"), contents[folder])
            keep.append(weights)
        needed += [str(PurePosixPath(folder, file)) for file in keep]
    return needed


def _download(repo_id: str, access: Access, show: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        info = HfApi(token=access.token).model_info(repo_id, revision=access.revision, timeout=_TIMEOUT_SECONDS)
    except (HTTPError, OfflineModeIsEnabled) as error:
        try:
            folder = _cached(repo_id, access)
        except (LocalEntryNotFoundError, CheckpointError):
            raise error from None  # why the Hub gives nothing matters more than what the cache lacks
        if not isinstance(error, OfflineModeIsEnabled):
            _log.warning("%s Using the copy in the cache.", _explain(error, repo_id, access.revision))
        return folder

    names = _wanted((sibling.rfilename for sibling in info.siblings or ()), access.skip)
    needed = needed_files(repo_id, names, access.folder)
    options = access.client_options() | {"tqdm_class": _bar_class(show)}
    folder = Path(snapshot_download(repo_id, allow_patterns=needed, **options))
    shards = _shards(repo_id, folder, needed, names)
    if shards:
        snapshot_download(repo_id, allow_patterns=shards, **options | {"revision": folder.name})
    return folder


def _cached(repo_id: str, access: Access) -> Path:
    """The snapshot in the cache, if it is whole."""
    from huggingface_hub import snapshot_download

    def find(patterns: list[str]) -> Path:
        """Fails if the client knows that the repository has a file like these which the cache lacks."""
        options = access.client_options()
        return Path(snapshot_download(repo_id, local_files_only=True, allow_patterns=patterns, **options))

    folder = find([_MODEL_INDEX if access.folder is None else str(PurePosixPath(access.folder, "config.json"))])
    names = _wanted((path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()), access.skip)
    needed = needed_files(repo_id, names, access.folder)
    parents = {PurePosixPath(name).parent for name in needed if name != _MODEL_INDEX}
    find([str(parent / file) for parent in parents for file in _SMALL_FILES])
    if access.folder is None and _MODEL_INDEX in names:
        index = parse_json_object(folder / _MODEL_INDEX, (folder / _MODEL_INDEX).read_bytes())
        named = [key for key, value in index.items() if _is_component(key) and value != [None, None]]
        absent = [key for key in named if key not in access.skip and PurePosixPath(key) not in parents]
        if absent:
            raise CheckpointError(
                f"{repo_id}: expected {', '.join(absent)} in the cache, found an incomplete download. Fetch"
                " it again while the Hub can be reached."
            )
    _shards(repo_id, folder, needed, names)
    return folder


def _is_component(folder: str) -> bool:
    return bool(ENCODER_FOLDER.fullmatch(folder) or _TOKENIZER.fullmatch(folder))


def _wanted(names: Iterable[str], skip: Collection[str]) -> set[str]:
    return {name for name in names if name.partition("/")[0] not in skip}


def _shards(repo_id: str, folder: Path, needed: Collection[str], names: Collection[str]) -> list[str]:
    """The paths of the shards that the indices among the needed files name, all of which must be there."""
    shards = [
        str(PurePosixPath(index).parent / shard)
        for index in needed
        if ".index." in index
        for shard in sorted(set(read_index(folder / index).values()))
    ]
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise CheckpointError(
            f"{repo_id}: expected {len(shards)} shards, found that {len(missing)} are missing:"
            f" {', '.join(missing)}. Fetch it again while the Hub can be reached; if that does not help, the"
            " repository is broken."
        )
    return shards


def _bar_class(show: bool) -> type:
    """The client's progress bar, switched on or off for one call instead of for the process."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **(kwargs | {"disable": not show}))

    return Bar


def _explain(error: BaseException, repo_id: str, revision: str | None) -> str:
    """What failed and what to do about it, for the exceptions that the client is known to raise."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HTTPError):
        error = error.__cause__  # the client's word for: cannot be reached, and is not in the cache
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    # The first that fits: GatedRepoError is a RepositoryNotFoundError, which is an HfHubHTTPError, ...
    if isinstance(error, errors.HFValidationError):
        return f"{repo_id!r} is no repository id: expected owner/name. Check the spelling. ({error})"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id}: is gated. Accept its terms on its page on the Hub, and log in with `hf auth login`."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id}: has no revision {revision!r}. Check the branch, tag or commit."
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return f"{repo_id}: not found on the Hub. Check the spelling; if it is private, run `hf auth login`."
    if status is not None:
        return f"{repo_id}: the Hub answered with HTTP status {status}. Try again later. ({error})"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"{repo_id}: is not whole in the cache, and offline mode is on. Unset HF_HUB_OFFLINE, or fetch it"
            " once while online."
        )
    if isinstance(error, errors.HTTPError):
        return (
            f"{repo_id}: the Hub cannot be reached. Check the network and proxy settings, and try again."
            f" ({type(error).__name__}: {error})"
        )
    if isinstance(error, errors.IncompleteSnapshotError):
        return f"{repo_id}: is not whole in the cache. Fetch it again without local_files_only. ({error})"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{repo_id}: is not in the cache. Fetch it once without local_files_only. ({error})"
    return f"{repo_id}: the download failed. Try again. ({type(error).__name__}: {error})"
