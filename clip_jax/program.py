"""A family's computation as StableHLO: exported once, and called without the modules.

OUT/programs/programs.json    what they were made for
OUT/programs/both.jax         negative prompts and prompts, [2B, L, D]
OUT/programs/alone.jax        prompts alone, [B, L, D]; B is symbolic in both
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from clip_jax.embed import Params, Skips, layers_taken, text_embeddings
from clip_jax.errors import CheckpointError, ClipJaxError
from clip_jax.families import Family
from clip_jax.models import intercepted
from clip_jax.structs import TextEmbeddings, Tokens

PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN = (*PLATFORMS, "rocm")

_FOLDER, _FACTS, _VERSION = "programs", "programs.json", 1


@dataclasses.dataclass(frozen=True)
class Programs:
    """Exported programs, and what they were made for.

    Attributes:
        both: Encodes negative prompts and prompts.
        alone: Encodes prompts.
        lengths: Tower name -> L.
        dtype: Of the computation and the embeddings.
        skips: Layers that are left out.
        max_sequence_length: How many rows of zeros stand for T5's where the family is without it; None for the
            default, and where there are none.
    """

    both: export.Exported
    alone: export.Exported
    lengths: dict[str, int]
    dtype: str
    skips: Skips
    max_sequence_length: int | None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def __call__(self, params: Params, tokens: Tokens) -> TextEmbeddings:
        """Encodes ids; zeros for negatives are put before the rows of the prompts.

        Raises:
            ClipJaxError: Ids of another length than exported for, or other params.
        """
        found = {tower: ids.shape[1] for tower, ids in tokens.cond.items()}
        if found != self.lengths:
            raise ClipJaxError(
                f"The programs were exported for rows of {self.lengths} ids, found {found}. Leave "
                f"max_sequence_length= out, or export again with it."
            )
        both, alone = self._compiled
        leaves = jax.tree.leaves(params)
        try:
            arrays = alone(leaves, tokens.cond) if tokens.uncond is None else both(leaves, tokens.cond, tokens.uncond)
        except ValueError as error:
            wanted = self.alone.in_avals[: -len(self.lengths)]
            if [(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves] == [(w.shape, w.dtype) for w in wanted]:
                raise
            raise ClipJaxError(
                "The programs were exported for params of other shapes or dtypes. Set such, export again, or load the "
                "folder with `clip_jax.load`."
            ) from error
        if tokens.zero_uncond:
            arrays |= {name: _after_zeros(arrays[name]) for name in arrays.keys() - {"text_ids"}}
        return TextEmbeddings(**arrays, guidance=tokens.uncond is not None or tokens.zero_uncond)

    @functools.cached_property
    def _compiled(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return jax.jit(self.both.call), jax.jit(self.alone.call)

    def write(self, folder: Path) -> None:
        """Writes them below `folder`."""
        (folder / _FOLDER).mkdir()
        for name in ("both", "alone"):
            (folder / _FOLDER / f"{name}.jax").write_bytes(getattr(self, name).serialize())
        facts = {
            "version": _VERSION,
            "lengths": self.lengths,
            "dtype": self.dtype,
            "skips": self.skips,
            "max_sequence_length": self.max_sequence_length,
        }
        (folder / _FOLDER / _FACTS).write_text(json.dumps(facts, indent=1))


def export_programs(
    params: Params, example: Tokens, family: Family, dtype: np.dtype, skips: Skips, platforms: str | Sequence[str]
) -> Programs:
    """Traces `text_embeddings` for any number of prompts.

    Args:
        params: Of which shapes and dtypes count.
        example: Ids of a prompt, of which the lengths count.
        family: Of the params.
        dtype: Of the computation and the embeddings.
        skips: Layers to leave out.
        platforms: Where the programs are to run.

    Raises:
        ClipJaxError: A platform that JAX does not know, layers that are not there, or interceptors in force.
    """
    if intercepted():
        raise ClipJaxError("export is not for nn.intercept_methods: change the params instead, and export those.")
    platforms = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    if not platforms or not set(platforms) <= set(_KNOWN):  # JAX would make something for any name
        raise ClipJaxError(f"platforms must be among {', '.join(_KNOWN)}, found {', '.join(platforms) or 'none'}.")
    for tower in family.towers:
        layers_taken(family, tower, *skips)

    # A list of params: what is serialised knows no trees but of dicts and lists, and quantised ones have others.
    leaves, tree = jax.tree.flatten(params)

    def encode(
        leaves: list[jax.Array], cond: dict[str, Any], uncond: dict[str, Any] | None = None
    ) -> dict[str, jax.Array]:
        out = text_embeddings(
            jax.tree.unflatten(tree, leaves),
            dataclasses.replace(example, cond=cond, uncond=uncond, zero_uncond=False),
            family=family,
            dtype=dtype,
            compute_dtype=dtype,
            clip_skip_negative=skips[0],
            clip_skip=skips[1],
        )
        fields = ("prompt_embeds", "pooled_prompt_embeds", "text_ids")
        return {name: getattr(out, name) for name in fields if getattr(out, name) is not None}

    (batch,) = export.symbolic_shape("b")
    lengths = {tower: ids.shape[1] for tower, ids in example.cond.items()}
    ids = {tower: jax.ShapeDtypeStruct((batch, length), jnp.int32) for tower, length in lengths.items()}
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    exported = export.export(jax.jit(encode), platforms=platforms)
    both, alone = exported(shapes, ids, ids), exported(shapes, ids)
    return Programs(both, alone, lengths, dtype.name, skips, example.max_sequence_length)


def read_programs(path: Path) -> Programs:
    """Reads what `Programs.write` wrote.

    Raises:
        CheckpointError: There are none, or they are not to be read by this version.
    """
    folder = path / _FOLDER
    if not (folder / _FACTS).is_file():
        raise CheckpointError(f"{path} has no exported programs; expected a folder written by `TextEncoder.export`.")
    try:
        facts = json.loads((folder / _FACTS).read_text())
        if facts["version"] > _VERSION:
            raise CheckpointError(
                f"{folder} has version {facts['version']}, newer than {_VERSION}. Upgrade clip-jax-text."
            )
        both, alone = (export.deserialize(bytearray((folder / f"{n}.jax").read_bytes())) for n in ("both", "alone"))
        skips = facts["skips"]
        length = facts["max_sequence_length"]
        return Programs(both, alone, facts["lengths"], facts["dtype"], (skips[0], skips[1]), length)
    except CheckpointError:
        raise
    except Exception as error:  # JAX has no common base class for what damaged programs raise
        raise CheckpointError(f"{folder} cannot be read ({type(error).__name__}: {error}). Export again.") from error


@jax.jit
def _after_zeros(rows: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros_like(rows), rows])
