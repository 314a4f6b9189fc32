"""Runs the Flax classes of transformers 4, in an environment of their own, and writes down all that they return.

`python -m tests.oracle.old_flax FOLDER`: a folder for each model, as its `save_pretrained` writes it, and
`outputs.npz` with outputs, gradients and, as JSON, dtypes.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.oracle.cases import DTYPES, EOS, IDS, MODELS, VOCABULARY, calls_of, cotangent, flat_outputs, weights

jax.config.update("jax_default_matmul_precision", "float32")


def main(folder: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    dtypes: dict[str, dict[str, str]] = {}
    for name, (cls, fields, saving) in MODELS.items():
        config_class = transformers.T5Config if name == "t5" else transformers.CLIPTextConfig
        if name != "t5":
            fields = {"intermediate_size": 80, "projection_dim": 24, "eos_token_id": EOS, **fields}
        config = config_class(vocab_size=VOCABULARY, **fields)
        model = getattr(transformers, cls)(config)
        params = {path: weights("/".join(path), leaf.shape) for path, leaf in flatten_dict(model.params).items()}
        model.params = unflatten_dict(params)
        model.save_pretrained(folder / name, **saving)
        arrays |= {f"{name}/params/{'/'.join(path)}": leaf for path, leaf in params.items()}
        for call, kwargs in calls_of(name).items():
            arrays |= {f"{name}/{call}/{key}": np.asarray(a) for key, a in flat_outputs(model(IDS, **kwargs)).items()}
        for key, leaf in flatten_dict(gradient(model)).items():
            arrays[f"{name}/gradient/{'/'.join(key)}"] = np.asarray(leaf)
        for policy, (dtype, param_dtype) in DTYPES.items():
            low = getattr(transformers, cls)(config, dtype=getattr(jnp, dtype))
            low.params = jax.tree.map(lambda leaf: jnp.asarray(leaf, getattr(jnp, param_dtype)), model.params)  # noqa: B023
            out = flat_outputs(low(IDS, output_hidden_states=True))
            dtypes[f"{name}/{policy}"] = {key: array.dtype.name for key, array in out.items()}
            arrays |= {f"{name}/{policy}/{key}": np.asarray(array, np.float32) for key, array in out.items()}
    versions = {"transformers": transformers.__version__, "jax": jax.__version__}
    np.savez(folder / "outputs.npz", about=json.dumps({"dtypes": dtypes, "versions": versions}), **arrays)


def gradient(model: transformers.FlaxPreTrainedModel) -> dict:
    """Of the first output along `cotangent`, by the params, mask included: one step of DreamBooth's."""

    def along(params):
        out = model(IDS, params=params, train=False)[0]
        return jnp.vdot(out, cotangent(out.shape))

    return jax.grad(along)(model.params)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
