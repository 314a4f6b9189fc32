"""One text encoder of a foreign checkpoint: its architecture, and where every parameter comes from."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.convert.hf_keys import KeyMap, map_keys, to_flax
from clip_jax.convert.layouts import Encoder, Projection
from clip_jax.convert.source import TensorSource
from clip_jax.convert.state import StateDict, Tensor
from clip_jax.errors import CheckpointError
from clip_jax.families import Tower
from clip_jax.params.cast import cast
from clip_jax.params.memory import aligned_copy
from clip_jax.params.quantize import PLAIN, Scheme
from clip_jax.params.shapes import TensorSpec, param_shapes
from clip_jax.params.shard import Index, sharded_array
from clip_jax.tokenizers import ClipTokenizer, RowTokenizer, T5Tokenizer, read_tokenizer
from clip_jax.tokenizers.files import exists

_CLIP_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "spiece.model")
_PROJECTION = "text_projection.weight"
_SWITCH = 'text_projection="as_is" or "transpose" to clip_jax.load (--text-projection)'

# The corner of bigG's projection [D, P], row 0 and column 0, in sd_xl_base_1.0: https://github.com/Stability-AI/
# generative-models/issues/111.
_BIG_G_ROW, _BIG_G_COLUMN = (-0.0348, 0.0218, -0.0025), (-0.0348, -0.0037, 0.0261)


@dataclasses.dataclass(frozen=True)
class ForeignTower:
    """One text encoder of a foreign checkpoint.

    Attributes:
        config: Its architecture.
        encoder: Its tensors under transformers' names, and what they are called in the source.
        source: The files that hold them.
        map: Where its parameters are among them.
        tokenizer_folder: Where its tokenizer should be, if anywhere.
        pad_token: Of its tokenizer, if there is none, or one that came with a whole CLIP.
        whole: Whether the source is a whole CLIP, or what is left of one, rather than a part of a pipeline.
    """

    config: TowerConfig
    encoder: Encoder
    source: TensorSource
    map: KeyMap
    tokenizer_folder: Path | None
    pad_token: str
    whole: bool = False

    @property
    def state(self) -> StateDict:
        """Its tensors, under transformers' names."""
        return self.encoder.state

    def specs(self) -> dict[str, TensorSpec]:
        """Path -> shape and dtype, in the order of the tree."""
        shapes = param_shapes(self.config)
        return {p: TensorSpec(shapes[p], _stored_dtype(self.state[key])) for p, (key, _) in self.map.keys.items()}

    def read(self, path: str, dtype: np.dtype | None, scheme: Scheme = PLAIN) -> np.ndarray:
        """One parameter for a tower in `dtype` (None: that of `specs`), or to be quantised; it may be a view."""
        return np.ascontiguousarray(self.reader(path, dtype, scheme)(()))

    def reader(self, path: str, dtype: np.dtype | None, scheme: Scheme = PLAIN) -> Callable[[Index], np.ndarray]:
        """What reads a part of one parameter, in any order; of a file, no bytes of other parts but on their pages."""
        key, transposed = self.map.keys[path]
        tensor = self.state[key]
        array = to_flax(tensor.read(), transposed)
        wanted = scheme.read_dtype(path, _stored_dtype(tensor), dtype)
        return lambda index: cast(array[index], wanted, tensor.key)

    def read_params(
        self,
        dtype: np.dtype | None,
        placement: Callable[[str, TensorSpec], Sharding] | None,
        update: Callable[[int], object],
        scheme: Scheme = PLAIN,
    ) -> dict[str, Any]:
        """Path -> parameter, tensor by tensor.

        Args:
            dtype: To cast to; None keeps that of `specs`.
            placement: Where a parameter goes, by its path, and its shape and dtype as stored; None means the default
                device. Only the parts for devices of this process are read, and cast.
            update: Called with the number of source bytes that are done since its last call.
            scheme: To quantise by.

        Raises:
            CheckpointError: float16 cannot hold a value, or two copies of a tensor differ.
        """
        self.check_twins()
        leaves = {}
        for path, spec in self.specs().items():
            part = functools.partial(_part, self.reader(path, dtype, scheme))
            if placement is None:
                array = jax.device_put(part(()))
            else:
                array = sharded_array(spec.shape, placement(path, spec), part)
            leaves[path] = scheme.quantize(path, array)
            update(spec.nbytes)
        return leaves

    def check_twins(self) -> None:
        """Compares tensors of which the source has two copies.

        Raises:
            CheckpointError: They differ, so that there is no telling which one is meant.
        """
        for key, other in self.map.twins:
            if not np.array_equal(self.state[key].read(), self.state[other].read()):
                raise CheckpointError(
                    f"{self.source.files[0]}: {key} and {other} are the same parameter, and differ. "
                    f"Save the model again with one of them."
                )

    def tokenizer(self) -> RowTokenizer:
        """The tokenizer of its folder; where there is none, the packaged one of CLIP, or that of a GGUF file."""
        folder = self.tokenizer_folder
        if isinstance(self.config, ClipTextConfig):
            if folder is not None and any(exists(folder / name) for name in _CLIP_TOKENIZER_FILES):
                # OpenCLIP's models were trained on rows padded with "!", whatever the tokenizers beside them say.
                return ClipTokenizer.from_folder(folder, self.pad_token if self.whole else None)
            return ClipTokenizer.packaged(self.pad_token, self.config.max_position_embeddings)
        found = None if folder is None else T5Tokenizer.find(folder)  # beside a file CLIP's may lie as well
        if found is None and "tokenizer.ggml.tokens" in self.source.metadata:
            from clip_jax.convert.gguf_tokenizer import gguf_tokenizer

            return gguf_tokenizer(self.source.metadata, self.source.files[0])
        return found or read_tokenizer(self.config, folder or Path())  # which says what is missing


def open_tower(
    tower: Tower,
    encoder: Encoder,
    config: TowerConfig,
    source: TensorSource,
    *,
    tokenizer_folder: Path | None,
    where: str,
    projection: Projection,
    whole: bool,
) -> ForeignTower:
    """Pairs the parameters of a tower with the tensors of an encoder.

    Args:
        tower: Of the family.
        encoder: The tensors.
        config: The encoder's architecture.
        source: The files that hold them.
        tokenizer_folder: Where its tokenizer should be, if anywhere.
        where: The source, for messages.
        projection: How `text_projection` is stored.
        whole: Whether the source is a whole CLIP, or may be what is left of one: it may have the block that the family
            does without (SD 2: the last of 24), and its tokenizer may pad otherwise.

    Raises:
        CheckpointError: The tensors are not those of the architecture, or `text_projection` is a dummy.
    """
    source_blocks = None
    _check_kind(encoder, config, where)
    if isinstance(config, ClipTextConfig) and isinstance(tower.config, ClipTextConfig):
        kept = tower.config.num_hidden_layers
        if whole and tower.without_last and config.num_hidden_layers == kept + 1:
            source_blocks = kept + 1
            config = dataclasses.replace(config, num_hidden_layers=kept)
        if tower.config.projection_dim is None:
            config = dataclasses.replace(config, projection_dim=None)
        elif config.projection_dim is not None:
            encoder, config = _check_projection(encoder, config, where, projection)
        if tower.config.projection_dim is not None and config.projection_dim is None and not tower.identity_projection:
            raise CheckpointError(
                f"{where}: {tower.name} has no text_projection, without which there is no pooled embedding. Take a "
                f"checkpoint that has it; it is never made up."
            )
    key_map = map_keys(encoder.state, config, _what(encoder, where), source_blocks=source_blocks)
    return ForeignTower(config, encoder, source, key_map, tokenizer_folder, tower.pad_token, whole)


def open_alone(config: TowerConfig, encoder: Encoder, source: TensorSource, where: str) -> ForeignTower:
    """Pairs the parameters of one architecture with the tensors of an encoder; no family, and no tokenizer.

    Args:
        config: The architecture; without projection, that of the weights is left aside.
        encoder: The tensors.
        source: The files that hold them.
        where: The source, for messages.

    Raises:
        CheckpointError: The tensors are not those of the architecture.
    """
    _check_kind(encoder, config, where)
    if isinstance(config, ClipTextConfig) and config.projection_dim is not None:
        encoder, _ = _check_projection(encoder, config, where, "auto")
        if _PROJECTION not in encoder.state:
            raise CheckpointError(
                f"{where} has no text_projection, which the class with projection needs; it is never made up. Take "
                f"the class without, or a checkpoint that has it."
            )
    return ForeignTower(config, encoder, source, map_keys(encoder.state, config, _what(encoder, where)), None, "")


def _what(encoder: Encoder, where: str) -> str:
    """The source, for messages about names of tensors."""
    return where if encoder.layout == "transformers" else f"{where} ({encoder.layout} names, as those of transformers)"


def _check_kind(encoder: Encoder, config: TowerConfig, where: str) -> None:
    if encoder.kind != ("clip" if isinstance(config, ClipTextConfig) else "t5"):
        found = {"clip": "a CLIP text model", "t5": "a T5 encoder"}[encoder.kind]
        raise CheckpointError(f"{where}: its config and its weights are of two models; found the tensors of {found}.")


def _check_projection(
    encoder: Encoder, config: ClipTextConfig, where: str, projection: Projection
) -> tuple[Encoder, ClipTextConfig]:
    """Leaves out a projection that is a dummy, and warns of one that looks like its own transpose."""
    tensor = encoder.state.get(_PROJECTION)
    if tensor is None or len(tensor.shape) != 2 or 0 in tensor.shape or projection != "auto":
        return encoder, config
    kernel = tensor.read().T  # [D, P]
    if np.all(kernel[0] == 1) and np.all(kernel == 1):
        warnings.warn(
            f"{where}: {tensor.key} is all ones, a dummy that some tools write; it is left out. To take it as it is, "
            f"pass {_SWITCH}.",
            UserWarning,
            stacklevel=2,
        )
        rest = {name: other for name, other in encoder.state.items() if name != _PROJECTION}
        return dataclasses.replace(encoder, state=rest), dataclasses.replace(config, projection_dim=None)
    if _is_big_g(kernel.T):
        warnings.warn(
            f"{where}: {tensor.key} looks like SDXL's projection transposed, as one of kohya's scripts leaves it. It "
            f"is read by its name; pass {_SWITCH} if the images are wrong.",
            UserWarning,
            stacklevel=2,
        )
    return encoder, config


def _is_big_g(kernel: np.ndarray) -> bool:
    """Whether this is the projection [D, P] of SDXL's bigG, or one fine-tuned from it."""
    if min(kernel.shape) < 3:
        return False
    row, column = kernel[0, :3].astype(np.float32), kernel[:3, 0].astype(np.float32)
    return bool(np.allclose(row, _BIG_G_ROW, atol=2e-3) and np.allclose(column, _BIG_G_COLUMN, atol=2e-3))


def _part(read: Callable[[Index], np.ndarray], index: Index) -> np.ndarray:
    """A copy of what is read: on a CPU a device would take a view of a file as it is."""
    return aligned_copy(read(index))


def _stored_dtype(tensor: Tensor) -> np.dtype:
    """What a parameter is kept in by default: that of its tensor, bfloat16 where the tensor is quantised."""
    if tensor.stored is not None:
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(np.float32) if tensor.dtype == np.float64 else tensor.dtype
