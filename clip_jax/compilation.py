"""Compiled programs kept on disk, so that the next process need not compile them again."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from clip_jax.errors import ClipJaxError

_ELSEWHERE = "Name another folder for the cache, with path=, JAX_COMPILATION_CACHE_DIR or XDG_CACHE_HOME."


def enable_compilation_cache(path: str | os.PathLike[str] | None = None) -> Path | str:
    """Switches on JAX's persistent compilation cache, for this process and all that it compiles.

    Programs of any size are kept, also those that compile in less than a second. A folder that is set already
    (`JAX_COMPILATION_CACHE_DIR`, `jax_compilation_cache_dir`) stays, unless `path` names another.
    `JAX_ENABLE_COMPILATION_CACHE=false` switches it off all the same.

    Call it before anything is compiled. The command line does; a library does not change the settings of a process by
    itself, so that the API waits to be asked.

    Args:
        path: The folder, or the URL of one (`gs://bucket/folder`), which is left to JAX; None means `clip_jax/xla` in
            the user's folder for caches (`XDG_CACHE_HOME`, `~/.cache`).

    Returns:
        The folder that is used, absolute; or that URL, a str.

    Raises:
        ClipJaxError: The folder cannot be made or written, or there is none for this user.
    """
    chosen = path or jax.config.jax_compilation_cache_dir or _user_cache() / "clip_jax" / "xla"
    remote = "://" in os.fspath(chosen)
    folder = os.fspath(chosen) if remote else _writable(Path(os.path.expanduser(chosen)).absolute())
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClipJaxError(f"{folder} cannot be made: {error.strerror}. {_ELSEWHERE}") from error
    if not os.access(folder, os.W_OK):
        raise ClipJaxError(f"{folder} cannot be written. {_ELSEWHERE}")
    return folder


def _user_cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # neither HOME nor an entry among the system's users
        raise ClipJaxError(f"This user has no home folder. {_ELSEWHERE}") from error
