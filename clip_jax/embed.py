"""The heart: token ids and params -> the conditioning of a diffusion model, in one compiled program.

Letters: B batch, L tokens, D width, G guidance rows (2 with guidance, 1 without).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.typing

from clip_jax.errors import ClipJaxError
from clip_jax.families import Family, Tower
from clip_jax.models import ClipTextModel
from clip_jax.structs import TextEmbeddings, Tokens

#: A nested dict of arrays.
Params = Mapping[str, Any]


@functools.partial(
    jax.jit, static_argnames=("family", "dtype", "compute_dtype", "clip_skip", "clip_skip_negative")
)
def text_embeddings(
    params: Params,
    tokens: Tokens,
    *,
    family: Family,
    dtype: jax.typing.DTypeLike | None = None,
    compute_dtype: jax.typing.DTypeLike | None = None,
    clip_skip: int | None = None,
    clip_skip_negative: int | None = None,
) -> TextEmbeddings:
    """Encodes negative prompts and prompts in one program: pure, jitted, differentiable.

    The ids of both are stacked to [2, B, L] and every tower is vmapped over them. What comes out is what the
    `encode_prompt` of the family's diffusers pipeline yields, unconditional rows first.

    Args:
        params: One entry per tower of the family, e.g. `{"clip_l": ...}`.
        tokens: Token ids [B, L] of every tower; `tokens.uncond` None means no guidance.
        family: Which towers run, and how they are joined; static.
        dtype: Of the result, cast at the end; None means `compute_dtype`. Static.
        compute_dtype: Of the computation; None means that of the params. Static.
        clip_skip: Layers to leave out at the end, for the prompts (as in diffusers, 1 is the penultimate
            layer and the final LayerNorm still applies); None means 0. Static.
        clip_skip_negative: The same for the negative prompts, which diffusers never skips. Static.

    Returns:
        `prompt_embeds` [2B, L, D], or [B, L, D] without guidance.

    Raises:
        ClipJaxError: Params, ids or `clip_skip` do not fit the family; raised while tracing.
    """
    _check_towers(family, params, "params")
    _check_towers(family, tokens.cond, "tokens.cond")
    skips = [clip_skip]
    guidance = tokens.uncond is not None
    if tokens.uncond is not None:
        _check_towers(family, tokens.uncond, "tokens.uncond")
        skips = [clip_skip_negative, clip_skip]
    if compute_dtype is None:
        compute_dtype = jnp.result_type(*jax.tree.leaves(params))

    embeds = {}
    for tower in family.towers:
        rows = [half[tower.name] for half in (tokens.uncond, tokens.cond) if half is not None]
        if any(row.shape != rows[0].shape or row.ndim != 2 for row in rows):
            raise ClipJaxError(
                f"Expected token ids [B, L] of one shape for the prompts and the negative prompts of "
                f"{tower.name}, found {' and '.join(str(row.shape) for row in rows)}."
            )
        embeds[tower.name] = _encode(tower, params[tower.name], jnp.stack(rows), skips, compute_dtype)
    joined = family.join(embeds)
    return TextEmbeddings(
        prompt_embeds=joined.reshape(-1, *joined.shape[2:]).astype(dtype or compute_dtype),
        guidance=guidance,
    )


def _encode(
    tower: Tower,
    params: Params,
    input_ids: jax.Array,
    skips: list[int | None],
    compute_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Runs one tower over ids [G, B, L]; row g leaves out `skips[g]` layers. Returns [G, B, L, D]."""
    layers = [tower.layer - _valid_skip(tower, skip) for skip in skips]
    model = ClipTextModel(tower.config, dtype=compute_dtype).bind({"params": params})

    def run(input_ids: jax.Array) -> list[jax.Array]:
        hidden_states = model(input_ids).hidden_states
        return [
            model.final_norm(hidden_states[layer]) if tower.final_norm else hidden_states[layer]
            for layer in dict.fromkeys(layers)
        ]

    taps = dict(zip(dict.fromkeys(layers), jax.vmap(run)(input_ids), strict=True))
    if len(taps) == 1:
        return taps[layers[0]]
    return jnp.stack([taps[layer][row] for row, layer in enumerate(layers)])


def _valid_skip(tower: Tower, skip: int | None) -> int:
    most = tower.config.num_hidden_layers + 1 + tower.layer
    if skip is None:
        return 0
    if isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip <= most:
        raise ClipJaxError(f"clip_skip must be an int from 0 to {most} for {tower.name}, found {skip!r}.")
    return skip


def _check_towers(family: Family, found: Mapping[str, Any], what: str) -> None:
    expected = [tower.name for tower in family.towers]
    if sorted(found) != sorted(expected):
        raise ClipJaxError(
            f"Family {family.name!r} has the towers {', '.join(expected)}; "
            f"{what} has {', '.join(found) or 'none'}."
        )
