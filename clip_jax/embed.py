"""The heart: token ids and params -> the conditioning of a diffusion model, in one compiled program.

Letters: G guidance rows (2 with guidance, 1 without), B batch, L tokens, D width, P pooled width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.typing

from clip_jax.config import ClipTextConfig
from clip_jax.errors import ClipJaxError
from clip_jax.families import Family, Tower, TowerOutput
from clip_jax.models import ClipTextModel, T5Encoder
from clip_jax.structs import TextEmbeddings, Tokens

#: A nested dict of arrays.
Params = Mapping[str, Any]


@functools.partial(
    jax.jit,
    static_argnames=(
        "family",
        "dtype",
        "compute_dtype",
        "clip_skip",
        "clip_skip_negative",
        "max_sequence_length",
    ),
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
    max_sequence_length: int | None = None,
) -> TextEmbeddings:
    """Encodes negative prompts and prompts in one program: pure, jitted, differentiable.

    The ids of both are stacked to [2, B, L] and every tower is vmapped over them. What comes out is what the
    `encode_prompt` of the family's diffusers pipeline yields, unconditional rows first.

    Args:
        params: One entry per tower of the family, e.g. `{"clip_l": ...}`.
        tokens: Token ids [B, L] of every tower; without `uncond` there is no guidance, with `zero_uncond` the
            unconditional rows are zeros.
        family: Which towers run, and how they are joined; static.
        dtype: Of the result, cast at the end; None means `compute_dtype`. Static.
        compute_dtype: Of the computation; None means that of the params. Static.
        clip_skip: Layers of the CLIP towers to leave out at the end, for the prompts, counted as in diffusers
            from the layer that the family takes; None means 0. Static.
        clip_skip_negative: The same for the negative prompts, which diffusers never skips. Static.
        max_sequence_length: How many rows of zeros stand for T5's where the family is without it; None means
            the family's default. Static.

    Returns:
        `prompt_embeds` [2B, L, D], or [B, L, D] without guidance, and what else the family has.

    Raises:
        ClipJaxError: Params, ids or `clip_skip` do not fit the family; raised while tracing.
    """
    _check_towers(family, params, "params")
    _check_towers(family, tokens.cond, "tokens.cond")
    ids, skips = [tokens.cond], [clip_skip]
    if tokens.uncond is not None:
        _check_towers(family, tokens.uncond, "tokens.uncond")
        ids, skips = [tokens.uncond, tokens.cond], [clip_skip_negative, clip_skip]
    if compute_dtype is None:
        compute_dtype = jnp.result_type(*jax.tree.leaves(params))
    dtype = dtype or compute_dtype

    layers = {tower.name: [_layer(family, tower, skip) for skip in skips] for tower in family.towers}
    outputs = {
        tower.name: _run(
            tower,
            params[tower.name],
            _stack(tower, [half[tower.name] for half in ids]),
            layers[tower.name],
            compute_dtype,
        )
        for tower in family.towers
    }
    embeds, pooled = family.join(outputs, max_sequence_length or family.max_sequence_length)

    def rows(x: jax.Array) -> jax.Array:  # [G, B, ...] -> [GB, ...]
        if tokens.zero_uncond:
            x = jnp.concatenate([jnp.zeros_like(x), x])
        return x.reshape(-1, *x.shape[2:]).astype(dtype)

    return TextEmbeddings(
        prompt_embeds=rows(embeds),
        pooled_prompt_embeds=None if pooled is None else rows(pooled),
        text_ids=jnp.zeros((embeds.shape[-2], 3), dtype) if family.text_ids else None,
        guidance=tokens.uncond is not None or tokens.zero_uncond,
    )


def _run(
    tower: Tower,
    params: Params,
    input_ids: jax.Array,
    layers: Sequence[int],
    compute_dtype: jax.typing.DTypeLike,
) -> TowerOutput:
    """Runs one tower over ids [G, B, L]; row g of the guidance batch takes the hidden state `layers[g]`."""
    if not isinstance(tower.config, ClipTextConfig):
        t5 = T5Encoder(tower.config, dtype=compute_dtype).bind({"params": params})
        return TowerOutput(jax.vmap(lambda ids: t5(ids).last_hidden_state)(input_ids))

    model = ClipTextModel(tower.config, dtype=compute_dtype).bind({"params": params})
    taken = list(dict.fromkeys(layers))

    def run(input_ids: jax.Array) -> tuple[list[jax.Array], jax.Array, jax.Array | None]:
        out = model(input_ids)
        embeds = [out.hidden_states[layer] for layer in taken]
        return (
            [model.final_norm(x) if tower.final_norm else x for x in embeds],
            out.pooler_output,
            out.text_embeds,
        )

    embeds, pooled, projected = jax.vmap(run)(input_ids)
    if len(taken) > 1:
        embeds = [jnp.stack([embeds[taken.index(layer)][row] for row, layer in enumerate(layers)])]
    return TowerOutput(embeds[0], pooled, projected)


def _stack(tower: Tower, rows: Sequence[jax.Array]) -> jax.Array:
    if any(row.shape != rows[0].shape or row.ndim != 2 for row in rows):
        raise ClipJaxError(
            f"Expected token ids [B, L] of one shape for the prompts and the negative prompts of "
            f"{tower.name}, found {' and '.join(str(row.shape) for row in rows)}."
        )
    return jnp.stack(rows)


def _layer(family: Family, tower: Tower, skip: int | None) -> int:
    """Which hidden state of `tower` to take when `skip` layers are left out."""
    if skip is None:
        return tower.layer
    if all(t.pooled_only or not isinstance(t.config, ClipTextConfig) for t in family.towers):
        raise ClipJaxError(f"{family.name} takes no clip_skip: it uses no hidden state of CLIP. Leave it out.")
    if not isinstance(tower.config, ClipTextConfig):
        return tower.layer
    most = tower.config.num_hidden_layers + 1 + tower.layer
    if isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip <= most:
        raise ClipJaxError(f"clip_skip must be an int from 0 to {most} for {tower.name}, found {skip!r}.")
    return tower.layer - skip


def _check_towers(family: Family, found: Mapping[str, Any], what: str) -> None:
    expected = [tower.name for tower in family.towers]
    if sorted(found) != sorted(expected):
        raise ClipJaxError(
            f"Family {family.name!r} has the towers {', '.join(expected)}; {what} has {', '.join(found) or 'none'}."
        )
