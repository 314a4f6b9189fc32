"""The heart: token ids and params -> the conditioning of a diffusion model, in one compiled program.

Letters: G guidance rows (2 with guidance, 1 without), B batch, L tokens, D width, P pooled width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from clip_jax.config import ClipTextConfig
from clip_jax.errors import ClipJaxError
from clip_jax.families import Family, Tower, TowerOutput
from clip_jax.models import Attention, ClipTextModel, T5Encoder, check_attention, intercepted, model_of
from clip_jax.params.shapes import check_params
from clip_jax.structs import TextEmbeddings, Tokens

#: A nested dict of arrays, or of `qwix.QArray`s where they are quantised.
Params = Mapping[str, Any]

#: `clip_skip_negative` and `clip_skip`.
Skips = tuple[int | None, int | None]


def _jitted(function: Callable[..., TextEmbeddings]) -> Any:
    """Under `jit`, which is refused to interceptors; `__wrapped__` is the function as it was."""

    @functools.wraps(function)
    def without_interceptors(*arguments: Any, **options: Any) -> TextEmbeddings:
        if intercepted():  # what is traced with them would be run for everybody
            raise ClipJaxError(
                "text_embeddings is jitted, and takes no notice of nn.intercept_methods. Use TextEncoder, or "
                "text_embeddings.__wrapped__ within a jit of your own."
            )
        return function(*arguments, **options)

    static = ("family", "dtype", "compute_dtype", "clip_skip", "clip_skip_negative", "attention")
    jitted: Any = jax.jit(without_interceptors, static_argnames=static)
    jitted.__wrapped__ = function
    return jitted


@_jitted
def text_embeddings(
    params: Params,
    tokens: Tokens,
    *,
    family: Family,
    dtype: jax.typing.DTypeLike | None = None,
    compute_dtype: jax.typing.DTypeLike | None = None,
    clip_skip: int | None = None,
    clip_skip_negative: int | None = None,
    attention: Attention = "xla",
) -> TextEmbeddings:
    """Encodes negative prompts and prompts in one program: pure, jitted, differentiable.

    The ids of both are stacked to [2, B, L] and every tower is vmapped over them. What comes out is what the
    `encode_prompt` of the family's diffusers pipeline yields, unconditional rows first.

    Under `nn.intercept_methods` (a LoRA) use `TextEncoder`, or `text_embeddings.__wrapped__` within a `jit` of your
    own: this `jit`, like any other, takes no notice of interceptors once it has traced without them. To trace with
    them is an error.

    Args:
        params: One entry per tower of the family, e.g. `{"clip_l": ...}`.
        tokens: Token ids [B, L] of every tower; without `uncond` there is no guidance, with `zero_uncond` the
            unconditional rows are zeros.
        family: Which towers run, and how they are joined; static.
        dtype: Of the result, cast at the end; None means `compute_dtype`. Static.
        compute_dtype: Of the computation; None means that of the params, as their embeddings of positions have it.
            Static.
        clip_skip: Layers of the CLIP towers to leave out at the end, for the prompts, counted as in diffusers
            from the layer that the family takes; None means 0. Static.
        clip_skip_negative: The same for the negative prompts, which diffusers never skips. Static.
        attention: "cudnn" lets cuDNN compute attention on CUDA devices, in bfloat16 or float16: one kernel that does
            not write the scores to memory (`jax.nn.dot_product_attention`). It has gradients for even L alone. Static.

    Returns:
        `prompt_embeds` [2B, L, D], or [B, L, D] without guidance, and what else the family has.

    Raises:
        ClipJaxError: Params, ids or `clip_skip` do not fit the family, there is no cuDNN, or interceptors are in
            force; raised while tracing.
    """
    if not isinstance(family, Family):
        raise ClipJaxError(f"Expected a family, such as that of an encoder or of clip_jax.FAMILIES, found {family!r}.")
    _check_params(family, params)
    check_tokens(family, tokens)
    ids = [side for side in (tokens.uncond, tokens.cond) if side is not None]
    if compute_dtype is None:
        compute_dtype = jnp.result_type(*(_embedding_dtype(tower, params[tower.name]) for tower in family.towers))
    dtype = dtype or compute_dtype
    for wanted in (dtype, compute_dtype):
        if not _is_floating(wanted):
            raise ClipJaxError(f"dtype and compute_dtype must be floating point, found {wanted!r}.")
    check_attention(attention, compute_dtype)

    skips = clip_skip_negative, clip_skip
    layers = {tower.name: layers_taken(family, tower, *skips)[-len(ids) :] for tower in family.towers}
    with jax.numpy_dtype_promotion("standard"):  # Flax' norms promote, whatever users forbid themselves
        outputs = {
            tower.name: _run(
                tower,
                params[tower.name],
                jnp.stack([half[tower.name] for half in ids]),
                layers[tower.name],
                model_of(tower.config, compute_dtype, attention),
            )
            for tower in family.towers
        }
    embeds, pooled = family.join(outputs, tokens.max_sequence_length or family.max_sequence_length)

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


def embed(
    params: Params, tokens: Tokens, family: Family, dtype: np.dtype, skips: Skips, attention: Attention
) -> TextEmbeddings:
    """`text_embeddings` with one dtype for all, and without its `jit` under interceptors."""
    function = text_embeddings.__wrapped__ if intercepted() else text_embeddings
    out: TextEmbeddings = function(
        params,
        tokens,
        family=family,
        dtype=dtype,
        compute_dtype=dtype,
        clip_skip_negative=skips[0],
        clip_skip=skips[1],
        attention=attention,
    )
    return out


def _run(
    tower: Tower,
    params: Params,
    input_ids: jax.Array,
    layers: Sequence[int],
    module: ClipTextModel | T5Encoder,
) -> TowerOutput:
    """Runs one tower over ids [G, B, L]; row g of the guidance batch takes the hidden state `layers[g]`."""
    model = module.bind({"params": params})
    if isinstance(model, T5Encoder):
        return TowerOutput(jax.vmap(lambda ids: model(ids).last_hidden_state)(input_ids))
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


def check_tokens(family: Family, tokens: Tokens) -> None:
    """Refuses ids that `family` cannot encode: each tower wants [B, L], the same B in all, the same L on both sides.

    Raises:
        ClipJaxError: Ids of other towers, of other shapes, or (on the host) ids that an embedding has no row for.
    """
    if not isinstance(tokens, Tokens):
        raise ClipJaxError(f"Expected Tokens, as of TextEncoder.tokenize, found {type(tokens).__name__}.")
    sides = {"cond": tokens.cond} if tokens.uncond is None else {"uncond": tokens.uncond, "cond": tokens.cond}
    for name, side in sides.items():
        _check_towers(family, side, f"tokens.{name}")
    if tokens.zero_uncond and tokens.uncond is not None:
        raise ClipJaxError("Tokens have both uncond and zero_uncond: expected one of them.")
    for tower in family.towers:
        rows = [side[tower.name] for side in sides.values()]
        for row in rows:
            if not isinstance(row, np.ndarray | jax.Array) or not jnp.issubdtype(row.dtype, jnp.integer):
                dtype = f" of {row.dtype}" if hasattr(row, "dtype") else ""
                raise ClipJaxError(
                    f"Expected token ids of {tower.name} as arrays of integers of NumPy or JAX, found "
                    f"{type(row).__name__}{dtype}."
                )
        if any(row.shape != rows[0].shape or row.ndim != 2 for row in rows):
            raise ClipJaxError(
                f"Expected token ids [B, L] of one shape for the prompts and the negative prompts of "
                f"{tower.name}, found {' and '.join(str(row.shape) for row in rows)}."
            )
        for row in rows:
            _check_range(row, tower)
    joined = {t.name: tokens.cond[t.name].shape[1] for t in family.towers if _is_clip(t) and not t.pooled_only}
    if len(set(joined.values())) > 1:
        raise ClipJaxError(f"Expected as many token ids in a row of each CLIP tower, found {joined}.")
    if len(batches := {rows.shape[0] for rows in tokens.cond.values()}) > 1:
        raise ClipJaxError(f"Expected one batch of token ids in all towers, found the sizes {sorted(batches)}.")
    if any(0 in rows.shape for rows in tokens.cond.values()):
        raise ClipJaxError("Token ids have no rows; expected at least one prompt, and ids of it.")


def _check_range(ids: np.ndarray | jax.Array, tower: Tower) -> None:
    """What an embedding has no row for would become NaN without a word; what is on a device is not looked at."""
    # As unsigned ones, of which what is below zero is the largest: one look instead of two.
    if isinstance(ids, np.ndarray) and ids.size:
        largest = ids.astype(np.int64).view(np.uint64).max()
        if largest >= tower.config.vocab_size:
            raise ClipJaxError(
                f"Token ids of {tower.name} are from {ids.min()} to {ids.max()}; expected 0 to "
                f"{tower.config.vocab_size - 1}. Use the tokenizer that belongs to these weights."
            )


def layers_taken(family: Family, tower: Tower, *skips: int | None) -> list[int]:
    """Which hidden state of `tower` to take for the negative prompts and for the prompts.

    Raises:
        ClipJaxError: The family or the tower has no such layer to skip to.
    """
    layers = []
    for name, skip in zip(("clip_skip_negative", "clip_skip"), skips, strict=True):
        if skip is not None and all(t.pooled_only or not _is_clip(t) for t in family.towers):
            raise ClipJaxError(f"{family.name} takes no {name}: it uses no hidden state of CLIP. Leave it out.")
        if skip is None or not isinstance(tower.config, ClipTextConfig):
            layers.append(tower.layer)
            continue
        most = tower.config.num_hidden_layers + 1 + tower.layer
        if isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip <= most:
            raise ClipJaxError(f"{name} must be an int from 0 to {most} for {tower.name}, found {skip!r}.")
        layers.append(tower.layer - skip)
    return layers


def skips_of(tokens: Tokens, skips: Skips) -> Skips:
    """Those that count, for there to be one program: 0 is None, and without negative prompts none of theirs."""
    return (skips[0] or None if tokens.uncond is not None else None), skips[1] or None


def check_finite(embeddings: TextEmbeddings) -> None:
    """Refuses float16 that has overflowed; waits for the embeddings.

    Raises:
        ClipJaxError: There is an infinity, or what became of one.
    """
    if not all(jax.device_get([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(embeddings)])):
        raise ClipJaxError(
            "The embeddings overflow float16: this text encoder computes values beyond 65504. "
            "Load it with dtype='bfloat16' or 'float32'."
        )


def _embedding_dtype(tower: Tower, params: Params) -> jnp.dtype:
    """That of the positions: norms, and T5's `wo`, may be kept in a wider one, and quantised params have their own."""
    if isinstance(tower.config, ClipTextConfig):
        table = params["text_model"]["embeddings"]["position_embedding"]
    else:
        table = params["encoder"]["block"]["0"]["layer"]["0"]["SelfAttention"]["relative_attention_bias"]
    return nn.meta.unbox(table["embedding"]).dtype


def _is_clip(tower: Tower) -> bool:
    return isinstance(tower.config, ClipTextConfig)


def _is_floating(dtype: jax.typing.DTypeLike) -> bool:
    try:
        return bool(jnp.issubdtype(dtype, jnp.floating))
    except TypeError:  # a name that is none
        return False


def _check_params(family: Family, params: Params) -> None:
    """Refuses params of other towers, or shapes; interceptors may want others than ours in their place."""
    _check_towers(family, params, "params")
    for tower in family.towers if not intercepted() else ():
        check_params(tower.config, params[tower.name], f"params[{tower.name!r}]")


def _check_towers(family: Family, found: Mapping[str, Any], what: str) -> None:
    expected = [tower.name for tower in family.towers]
    if not isinstance(found, Mapping):
        raise ClipJaxError(f"Expected {what} as a dict, of {', '.join(expected)}, found {type(found).__name__}.")
    if sorted(found) != sorted(expected):
        raise ClipJaxError(
            f"Family {family.name!r} has the towers {', '.join(expected)}; {what} has {', '.join(found) or 'none'}."
        )
