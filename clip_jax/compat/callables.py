"""Text encoders as pipelines hold them that know neither Flax nor params: ids in, an array out.

The methods are those of maxdiffusion's wrappers around torchax (AI-Hypercomputer/maxdiffusion PR 483,
`text_encoders/torchax_text_encoders.py`), so that one stands in for the other.
"""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from clip_jax.compat.base import FlaxPreTrainedModel
from clip_jax.compat.clip import FlaxCLIPTextModel
from clip_jax.compat.t5 import FlaxT5EncoderModel
from clip_jax.errors import ClipJaxError
from clip_jax.models.quantized import is_quantized
from clip_jax.params.shard import over_auto_axes, sharded_array


class _CallableEncoder:
    """Holds a model, of which it casts the params, but quantised ones.

    Attributes:
        model: The model.
        dtype: Of the params, of the computation and of what a call returns.
    """

    model_class: type[FlaxPreTrainedModel]

    def __init__(self, model: FlaxPreTrainedModel) -> None:
        self.model = model
        self.dtype = model.dtype
        self.params = jax.tree.map(self._cast, model.params, is_leaf=is_quantized)

    @classmethod
    def from_pretrained(cls, source: str, dtype: jax.typing.DTypeLike = jnp.float32, **kwargs: Any) -> Self:
        """Loads it; arguments and errors as in `from_pretrained` of the model."""
        model = cls.model_class.from_pretrained(source, dtype, **kwargs)
        if not isinstance(model, FlaxPreTrainedModel):
            raise ClipJaxError(f"{cls.__name__} holds params. Leave out _do_init, or use {cls.model_class.__name__}.")
        return cls(model)

    def _cast(self, leaf: Any) -> Any:
        return leaf if is_quantized(leaf) else leaf.astype(self.dtype)

    @property
    def params(self) -> dict[str, Any]:
        """Those of the model."""
        return self.model.params

    @params.setter
    def params(self, params: dict[str, Any]) -> None:
        self.model.params = params

    def place_params(self, device_or_sharding: jax.Device | jax.sharding.Sharding) -> None:
        """Moves the params to a device, or to where a sharding says, devices of other processes included."""
        place = device_or_sharding
        if isinstance(place, jax.sharding.Sharding):
            place = over_auto_axes(place)

        def moved(leaf: Any) -> jax.Array:
            if isinstance(place, jax.sharding.Sharding) and not place.is_fully_addressable:
                return sharded_array(leaf.shape, place, np.array(leaf).__getitem__)
            return jax.device_put(leaf, place)

        self.params = jax.tree.map(moved, self.params)

    def offload_params(self) -> None:
        """Moves the params to the host. Calls run there until they are placed again."""
        self.place_params(jax.local_devices(backend="cpu")[0])


class CLIPTextEncoder(_CallableEncoder):
    """FLUX's use of CLIP-L: the row of the end-of-text token, [B, L] -> [B, D]."""

    model_class = FlaxCLIPTextModel

    def __call__(self, input_ids: jax.typing.ArrayLike) -> jax.Array:
        """Encodes token ids."""
        return self.model(input_ids).pooler_output.astype(self.dtype)  # type: ignore[operator]


class T5TextEncoder(_CallableEncoder):
    """FLUX's use of T5: all rows, [B, L] -> [B, L, D]."""

    model_class = FlaxT5EncoderModel

    def __call__(
        self, input_ids: jax.typing.ArrayLike, attention_mask: jax.typing.ArrayLike | None = None
    ) -> jax.Array:
        """Encodes token ids; a mask [B, L] is nonzero for tokens to attend to."""
        return self.model(input_ids, attention_mask).last_hidden_state.astype(self.dtype)  # type: ignore[operator]
