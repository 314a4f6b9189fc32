"""The table of families in the README: `python -m bench.families bench/results/parity.json --write README.md`.

Towers, layers, parameters and shapes are those of `clip_jax.FAMILIES`, the errors those of the parity tests.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.report import splice
from clip_jax import FAMILIES, ClipTextConfig, Family, Tokens, text_embeddings
from clip_jax.families import Tower
from clip_jax.params.shapes import param_shapes, unflatten


def render(errors: Mapping[str, Any]) -> str:
    """The markdown table of all families, for a batch of B prompts."""
    rows = [
        "| family | pipelines | text encoders | parameters | `prompt_embeds` | pooled | max abs error |",
        "| --- | --- | --- | ---: | --- | --- | ---: |",
    ]
    for name, family in FAMILIES.items():
        out = _abstract_call(family)
        pooled = "" if out.pooled_prompt_embeds is None else _shape(family, out.pooled_prompt_embeds)
        error = errors[f"{name}, encode_prompt of diffusers"]["max_abs_error"]
        towers = ", ".join(map(_tower, family.towers))
        parameters = sum(math.prod(shape) for tower in family.towers for shape in param_shapes(tower.config).values())
        embeds = _shape(family, out.prompt_embeds)
        rows.append(f"| `{name}` | {family.title} | {towers} | {parameters:,} | {embeds} | {pooled} | {error:.1e} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.families", description=__doc__)
    parser.add_argument("errors", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", type=Path, metavar="README", help="fail unless its table is up to date")
    what.add_argument("--write", type=Path, metavar="README", help="replace its table")
    arguments = parser.parse_args(argv)
    path = arguments.check or arguments.write
    readme = path.read_text(encoding="utf-8")
    wanted = splice(readme, render(json.loads(arguments.errors.read_text())["errors"]), "families")
    if arguments.write:
        path.write_text(wanted, encoding="utf-8")
    elif wanted != readme:
        sys.exit(f"bench.families: the table in {path} is out of date. Write it again with --write.")


def _abstract_call(family: Family) -> Any:
    """The shapes of a call with one prompt; nothing is allocated or compiled."""
    ids = {tower.name: jax.ShapeDtypeStruct((1, family.row_length(tower, 77)), np.int32) for tower in family.towers}
    tokens = Tokens(cond=ids, uncond=ids if family.guidance else None)
    return jax.eval_shape(lambda p, t: text_embeddings(p, t, family=family), abstract_params(family), tokens)


def abstract_params(family: Family) -> dict[str, Any]:
    """Shapes and dtypes of the params of a family at full size."""
    return {
        tower.name: unflatten(
            {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in param_shapes(tower.config).items()}
        )
        for tower in family.towers
    }


def _shape(family: Family, x: jax.ShapeDtypeStruct) -> str:
    return f"[{', '.join(['2B' if family.guidance else 'B', *map(str, x.shape[1:])])}]"


def _tower(tower: Tower) -> str:
    config = tower.config
    layers, width = (
        (config.num_hidden_layers, config.hidden_size)
        if isinstance(config, ClipTextConfig)
        else (config.num_layers, config.d_model)
    )
    return f"`{tower.name}` ({layers} layers of {width})"


if __name__ == "__main__":
    main()
