"""Writes clip.npz: what transformers' torch models yield on weights that every machine can make again.

Run by hand where torch and transformers are installed: `python -m tests.golden.make_golden`.
"""

import json
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers

from clip_jax.tokenizers import ClipTokenizer
from tests.checkpoints import hf_state
from tests.golden.cases import CASES, PROMPTS, SLICE


def main() -> None:
    arrays = {}
    for name, (config, pad_token, seed) in CASES.items():
        with TemporaryDirectory() as folder:
            ClipTokenizer.packaged(pad_token).save(Path(folder))
            tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        ids = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
        projected = config.projection_dim is not None
        cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
        model = cls(transformers.CLIPTextConfig(**config.to_hf())).eval()
        model.set_attn_implementation("eager")
        dropped = "" if projected else "text_model."  # transformers 5.6 and later
        state = {key.removeprefix(dropped): array for key, array in hf_state(config, seed=seed).items()}
        model.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=True)
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        arrays[f"{name}/ids"] = ids.numpy().astype(np.int32)
        arrays[f"{name}/last_hidden_state"] = out.last_hidden_state.numpy()[SLICE]
        arrays[f"{name}/penultimate"] = out.hidden_states[-2].numpy()[SLICE]
        arrays[f"{name}/pooled"] = (out.text_embeds if projected else out.pooler_output).numpy()
    made_with = {package: version(package) for package in ("torch", "transformers", "tokenizers", "numpy")}
    arrays["made_with"] = np.array(json.dumps({"prompts": PROMPTS, "versions": made_with}))
    np.savez_compressed(Path(__file__).parent / "clip.npz", **arrays)


if __name__ == "__main__":
    main()
