"""CLIP's tokenizer: prompts to padded ids, on the host."""

import dataclasses
from pathlib import Path
from typing import ClassVar, Self

from clip_jax.tokenizers.files import telling_damage
from clip_jax.tokenizers.folder import read_folder
from clip_jax.tokenizers.pipeline import EOS, MAX_LENGTH, Recipe, build_pipeline, packaged_recipe
from clip_jax.tokenizers.rows import RowTokenizer, id_of


class ClipTokenizer(RowTokenizer):
    """CLIP's BPE: the ids of transformers 5 (tokenization_clip.py, `CLIPTokenizer`) on every string.

    Text is not cleaned with ftfy, as OpenAI CLIP and transformers 4's slow tokenizer do. The pad token is a
    special token: with pad `"!"`, each literal `!` in a prompt becomes the pad id. Immutable, and so safe to
    share between threads.

    Attributes:
        pad_token: token that fills the rows, `"<|endoftext|>"` or, for OpenCLIP text encoders, `"!"`.
        pad_token_id: its id.
        bos_token_id: id that starts each row.
        eos_token_id: id that ends each prompt.
        model_max_length: default length of a row.
        vocab_size: number of tokens, added ones included.
    """

    bos_token_id: int

    _frame: ClassVar[str] = "BOS and EOS"
    _class_name: ClassVar[str] = "CLIPTokenizer"

    def __init__(self, recipe: Recipe) -> None:
        """Builds a tokenizer; use `packaged` or `from_folder`."""
        special = {name: str(token) for name, token in recipe.special.items()}
        super().__init__(build_pipeline(recipe), special, recipe.model_max_length)
        self.bos_token_id = id_of(self._pipeline, special["bos_token"])

    @classmethod
    def packaged(cls, pad_token: str = EOS, model_max_length: int = MAX_LENGTH) -> Self:
        """Returns the tokenizer of OpenAI CLIP, which OpenCLIP, Stable Diffusion and FLUX share.

        Args:
            pad_token: `"<|endoftext|>"` (SD 1.5, FLUX, first tokenizer of SDXL and SD3) or `"!"` (SD 2.1,
                second tokenizer of SDXL and SD3).
            model_max_length: default length of a row.

        Raises:
            CheckpointError: `pad_token` is not in the vocabulary.
        """
        return cls(packaged_recipe(pad_token, model_max_length))

    @classmethod
    def from_folder(cls, folder: Path, pad_token: str | None = None) -> Self:
        """Reads a tokenizer folder: vocab.json and merges.txt, or tokenizer.json; see `folder.read_folder`.

        Args:
            folder: The folder.
            pad_token: To pad with, whatever the folder says.

        Raises:
            CheckpointError: files are missing, unreadable, or of another kind of tokenizer, or name a special
                token that the vocabulary does not have.
        """
        with telling_damage(folder):
            recipe = read_folder(Path(folder))
            if pad_token is not None:
                recipe = dataclasses.replace(recipe, special={**recipe.special, "pad_token": pad_token})
            return cls(recipe)
