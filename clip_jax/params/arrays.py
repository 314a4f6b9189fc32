"""The arrays of an Orbax folder, read by TensorStore, which is what Orbax keeps them with.

Orbax itself reads into a buffer, from there into an array of NumPy, and from there to the device; in a young process it
is memory touched for the first time that takes the time. Here files are mapped, and what is wanted of them is copied
(and cast) once, into memory that a CPU device takes as it is. Orbax does not even have to be imported.

An array is called like the path of its parameter, with dots: `clip_l.text_model.final_layer_norm.scale`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.params.memory import aligned

_FILE = "zarr.json"  # every array has one


class StoredArray:
    """One parameter on disk.

    Attributes:
        shape: Of the whole.
        dtype: As stored.
    """

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype = np.dtype(array.dtype.numpy_dtype)

    def read(self, dtype: np.dtype, index: tuple[slice, ...] = ()) -> Reading:
        """Begins to read the part at `index`, cast to `dtype`."""
        import tensorstore as ts

        source = ts.cast(self._array, ts.dtype(dtype)) if dtype != self.dtype else self._array
        source = source[index].translate_to[0] if index else source
        target = aligned(tuple(source.shape), dtype)
        return Reading(target, ts.array(target).write(source))


class Reading:
    """An array that is being read."""

    def __init__(self, target: np.ndarray, done: Any) -> None:
        self._target, self._done = target, done

    def result(self) -> np.ndarray:
        """Waits for the array, whose memory nobody else knows.

        Raises:
            Exception: TensorStore cannot read it; a ValueError most often.
        """
        self._done.result()
        return self._target


def open_arrays(folder: Path) -> dict[str, StoredArray]:
    """Path -> array, of all in the folder of an Orbax checkpoint ("text_model/..." as in the tree of the params).

    Raises:
        Exception: TensorStore cannot read their descriptions; a ValueError most often.
    """
    import tensorstore as ts

    context = ts.Context({"file_io_mode": {"mode": "memmap"}})
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}}
    keys = (key.decode() for key in ts.KvStore.open(database, context=context).result().list().result())
    names = sorted(key.removesuffix(f"/{_FILE}") for key in keys if key.endswith(f"/{_FILE}"))
    opened = {
        name: ts.open(
            # Chunks that are missing would be read as zeros.
            {"driver": "zarr3", "kvstore": {**database, "path": f"{name}/"}, "fill_missing_data_reads": False},
            context=context,
            read=True,
        )
        for name in names
    }
    return {name.replace(".", "/"): StoredArray(future.result()) for name, future in opened.items()}
