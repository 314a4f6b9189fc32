"""The text encoders of a pipeline as transformers has them, joined to what the pipeline takes of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

_CLASSES = (
    transformers.CLIPTextModel,
    transformers.CLIPTextModelWithProjection,
    transformers.T5EncoderModel,
)


class Towers(torch.nn.Module):
    """Token ids [R, 77], and of T5 [R, L] -> `prompt_embeds`, and for SDXL and FLUX `pooled_prompt_embeds`.

    SDXL takes the penultimate layers of both its towers, side by side, and the projected row of the second. FLUX takes
    the last layer of T5, and the pooled row of CLIP.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Reads the text encoders of a diffusers folder."""
        super().__init__()
        self.towers = torch.nn.ModuleList(
            _class_of(folder / name).from_pretrained(folder / name, dtype=dtype).eval()
            for name in ("text_encoder", "text_encoder_2")
            if (folder / name).exists()
        )

    def forward(self, ids: torch.Tensor, t5_ids: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """As the class says."""
        if t5_ids is not None:
            clip, t5 = self.towers
            return t5(input_ids=t5_ids).last_hidden_state, clip(input_ids=ids).pooler_output
        if len(self.towers) == 1:
            return (self.towers[0](input_ids=ids).last_hidden_state,)
        outputs = [tower(input_ids=ids, output_hidden_states=True) for tower in self.towers]
        return torch.cat([out.hidden_states[-2] for out in outputs], -1), outputs[-1].text_embeds


def _class_of(folder: Path) -> type[transformers.PreTrainedModel]:
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return next(cls for cls in _CLASSES if cls.__name__ == name)
