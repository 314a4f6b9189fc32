"""The text encoders of a pipeline as transformers has them, joined to what the pipeline takes of them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

_CLASSES = {
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
}


class Towers(torch.nn.Module):
    """Token ids [R, 77] -> `prompt_embeds`, and for SDXL `pooled_prompt_embeds`.

    SDXL takes the penultimate layers of both its towers, side by side, and the projected row of the second.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Reads the text encoders of a diffusers folder."""
        super().__init__()
        self.towers = torch.nn.ModuleList(
            cls.from_pretrained(folder / name, dtype=dtype).eval()
            for name, cls in _CLASSES.items()
            if (folder / name).exists()
        )

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As the class says."""
        if len(self.towers) == 1:
            return (self.towers[0](input_ids=ids).last_hidden_state,)
        outputs = [tower(input_ids=ids, output_hidden_states=True) for tower in self.towers]
        return torch.cat([out.hidden_states[-2] for out in outputs], -1), outputs[-1].text_embeds
