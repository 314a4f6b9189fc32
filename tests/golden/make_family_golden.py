"""Writes families.npz: what diffusers' pipelines yield on weights that every machine can make again.

Run by hand where torch, transformers and diffusers are installed: `python -m tests.golden.make_family_golden`.
"""

import json
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import transformers

from clip_jax import FAMILIES, T5EncoderConfig
from tests.checkpoints import write_family
from tests.golden.cases import FAMILY_CALL, FAMILY_SLICE
from tests.parity import pipelines


def main() -> None:
    arrays = {}
    for name, family in FAMILIES.items():
        with TemporaryDirectory() as scratch:
            folder = write_family(Path(scratch) / "folder", family)
            pipeline = pipelines.REFERENCES[name].build(Path(scratch))
            for tower in family.towers:
                is_t5 = isinstance(tower.config, T5EncoderConfig)
                architecture = json.loads((folder / tower.folder / "config.json").read_text())["architectures"][0]
                tokenizer = transformers.T5Tokenizer if is_t5 else transformers.CLIPTokenizer
                pipeline.register_modules(
                    **{
                        tower.folder: getattr(transformers, architecture).from_pretrained(folder / tower.folder),
                        tower.tokenizer_folder: tokenizer.from_pretrained(folder / tower.tokenizer_folder),
                    }
                )
            call = {k: v for k, v in FAMILY_CALL.items() if pipelines.REFERENCES[name].takes({k: v})}
            out = pipelines.reference(pipeline, name, **call)
        for field in ("prompt_embeds", "pooled_prompt_embeds"):
            if field in out:
                arrays[f"{name}/{field}"] = out[field][FAMILY_SLICE[field]]
    made_with = {package: version(package) for package in ("torch", "transformers", "diffusers", "numpy")}
    arrays["made_with"] = np.array(json.dumps({"call": FAMILY_CALL, "versions": made_with}))
    np.savez_compressed(Path(__file__).parent / "families.npz", **arrays)


if __name__ == "__main__":
    main()
