"""What the classes have in common: a module, its config and its params, called like a function.

Reference: transformers 4.57 `modeling_flax_utils.py` (`FlaxPreTrainedModel`), `modeling_flax_clip.py`,
`modeling_flax_t5.py`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from clip_jax.compat.config import shown_config, tower_config
from clip_jax.compat.outputs import ModelOutput
from clip_jax.compat.pretrained import Shardings, load_pretrained, save_pretrained
from clip_jax.config import ClipTextConfig, TowerConfig
from clip_jax.convert.hub import Access
from clip_jax.errors import ClipJaxError, ConfigError
from clip_jax.models import ClipTextModel, T5Encoder, intercepted
from clip_jax.models.quantized import is_quantized
from clip_jax.params.cast import float_dtype
from clip_jax.params.shapes import check_params, flatten, param_shapes, unflatten

# Arguments of the old `from_pretrained` that changed how weights were read, not what they are.
_WITHOUT_EFFECT = frozenset(
    "from_pt from_flax use_safetensors resume_download low_cpu_mem_usage trust_remote_code mirror user_agent "
    "_from_auto _from_pipeline".split()
)
# Those that asked for something that is not done here; they may be passed as long as they do not ask.
_NOT_OFFERED = {
    "force_download": "delete the cached copy instead",
    "ignore_mismatched_sizes": "weights of other shapes are an error, and nothing is made up for them",
    "proxies": "set HTTPS_PROXY instead",
}


class FlaxPreTrainedModel:
    """Base class of the models; not to be made itself.

    Attributes:
        config: A config object of transformers as it was passed, else an `HfConfig` with the same fields. What is set
            in it afterwards ("output_hidden_states") changes what is returned, not what is computed.
        module: The Linen module: `model.module.apply({"params": params}, input_ids)`.
        dtype: Of the computation.
        input_shape: [B, L] of the ids that `init_weights` is told at first.
    """

    module_class: ClassVar[type[nn.Module]]
    architecture: ClassVar[str]
    base_model_prefix: ClassVar[str] = ""
    main_input_name: ClassVar[str] = "input_ids"
    framework: ClassVar[str] = "flax"

    @jax.transfer_guard_host_to_device("allow")  # the seed comes from there
    def __init__(
        self,
        config: Any,
        input_shape: tuple[int, int] = (1, 1),
        seed: int = 0,
        dtype: jax.typing.DTypeLike = jnp.float32,
        _do_init: bool = True,
    ) -> None:
        """Makes a model.

        Args:
            config: Of transformers 4 or 5, of clip_jax, or the dict of a `config.json`.
            input_shape: [B, L] of ids, for `init`; changes nothing.
            seed: Of the random params.
            dtype: Of the computation, as a dtype or its name; params that are made here are float32.
            _do_init: Whether to make random params. Without, params are passed at every call.

        Raises:
            ConfigError: `config` is none of these, or of another kind of model.
            ClipJaxError: Another dtype than float32, bfloat16 and float16.
        """
        self._tower: TowerConfig = tower_config(config, self.architecture)
        self.config = shown_config(config, self._tower)
        self.dtype = float_dtype(dtype)
        self.input_shape = input_shape
        self.key = jax.random.PRNGKey(seed)
        self.module: ClipTextModel | T5Encoder = self.module_class(self._tower, self.dtype, legacy_dtypes=True)
        self._is_initialized = _do_init
        if _do_init:
            self.params = self.init_weights(self.key, input_shape)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        dtype: jax.typing.DTypeLike = jnp.float32,
        *,
        config: Any = None,
        subfolder: str = "",
        shardings: Shardings | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        input_shape: tuple[int, int] = (1, 1),
        seed: int = 0,
        _do_init: bool = True,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Loads a model from a folder or a Hub repo: safetensors, torch's `.bin`, Flax msgpack, sharded or not.

        Weights keep the dtype that they are stored in, as with the old classes, but for float64, which becomes
        float32. All that the model needs has to be there: nothing is made up. `from_pt` and other arguments that
        told how to read weights are accepted; what a file is, is found out.

        Args:
            pretrained_model_name_or_path: A folder with `config.json`, or a repo id.
            dtype: Of the computation, as a dtype or its name.
            config: To use instead of the one in the folder, with all that is to be set in it.
            subfolder: Of the folder or the repo, such as "text_encoder".
            shardings: Where the params go, each read straight to its parts: one sharding for all, a tree of
                shardings like that of the params, or a function of a parameter's path
                ("text_model/final_layer_norm/scale") and its `jax.ShapeDtypeStruct`. None means the default device,
                or with `_do_init=False` the host, as with the old classes.
            revision: Branch, tag or commit of a repo.
            local_files_only: Takes a repo from the local cache, without asking the network.
            token: For a private repo; True or None means the one that is logged in.
            cache_dir: Where downloads are kept.
            input_shape: As in the constructor.
            seed: As in the constructor.
            _do_init: False returns `(model, params)`, and the model holds no params.
            **kwargs: Fields of the config to set before the model is built: what it returns ("output_hidden_states")
                and what it computes ("num_hidden_layers", "hidden_act"). Only without `config`, as with the old
                classes.

        Warns:
            UserWarning: The weights have more blocks than the config asks for; the last ones are left aside.

        Raises:
            CheckpointError: Not found, not whole, or the weights of another model, or of one with fewer blocks.
            ConfigError: Another kind of model, or one that cannot be honoured.
            ClipJaxError: An unknown argument, or shardings that do not fit the params.
        """
        access = Access(
            revision=revision,
            local_files_only=local_files_only,
            token=kwargs.pop("use_auth_token", token),
            cache_dir=cache_dir,
            folder=subfolder,
        )
        for name, instead in _NOT_OFFERED.items():
            if kwargs.pop(name, None):
                raise ClipJaxError(f"{cls.__name__}.from_pretrained does not offer {name}: {instead}.")
        fields = {name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT}
        if shardings is None and not _do_init:
            shardings = _host()
        loaded = load_pretrained(pretrained_model_name_or_path, cls.architecture, config, fields, access, shardings)
        model = cls(loaded.config, input_shape, seed, dtype, _do_init=False)
        if not _do_init:
            return model, loaded.params
        model._is_initialized = True
        model.params = loaded.params
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        params: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,  # noqa: ARG002
        token: str | bool | None = None,  # noqa: ARG002
        safe_serialization: bool = True,
    ) -> None:
        """Writes `config.json` and `model.safetensors`, under the names of transformers' torch classes.

        These, diffusers, `clip_jax.load` and `from_pretrained` read them. There is one file whatever its size.

        Raises:
            ClipJaxError: `push_to_hub`, or msgpack (`safe_serialization=False`).
            ConfigError: `config` was changed so that it tells of another model.
            CheckpointError: Params that are missing, of another shape, or not the model's (those of a LoRA); or the
                folder cannot be written. What was in it stays.
        """
        if push_to_hub:
            raise ClipJaxError("push_to_hub is not offered: huggingface_hub.upload_folder uploads what is written.")
        if not safe_serialization:
            raise ClipJaxError("Only safetensors are written: leave out safe_serialization=False.")
        if tower_config(self.config, self.architecture) != self._tower:
            raise ConfigError(
                "model.config was changed after the model was made from it, and would tell of another model than the "
                "params are of. Set such fields by from_pretrained, or make a model from this config."
            )
        params = self.params if params is None else params
        self.config.architectures = [self.architecture]
        save_pretrained(save_directory, self.config, self._tower, params)

    def init_weights(
        self,
        rng: jax.Array,
        input_shape: tuple[int, int] = (1, 1),
        params: Mapping[str, Any] | None = None,
        eval_only: bool = False,
    ) -> dict[str, Any]:
        """Random params, float32, in the boxes of `nn.LogicallyPartitioned` that name their logical axes.

        `nn.get_partition_spec` and `nn.logical_to_mesh_sharding` read the axes, `nn.meta.unbox` takes them off, and
        calls take params with and without. Numbers differ from those of the old classes.

        Args:
            rng: A key.
            input_shape: [B, L] of ids; changes nothing.
            params: If given, they are returned, once it is sure that they are whole.
            eval_only: Whether to return shapes and dtypes in place of arrays.

        Raises:
            ClipJaxError: Params are missing in `params`.
        """
        if params is not None:
            self._check_whole(params)
            return dict(params)

        def init(rng: jax.Array) -> dict[str, Any]:
            return self.module.init(rng, jnp.zeros(input_shape, jnp.int32))["params"]

        return jax.eval_shape(init, rng) if eval_only else jax.jit(init)(rng)

    @property
    def params(self) -> dict[str, Any]:
        """Plain nested dict, as the old classes had it.

        Raises:
            ClipJaxError: The model was made with `_do_init=False`, on reading and on writing; or what is written is
                not whole.
        """
        if not self._is_initialized:
            raise ClipJaxError(
                "This model was made with _do_init=False and holds no params: pass them at every call, or load it "
                "without _do_init=False."
            )
        return self._params

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        if not self._is_initialized:
            raise ClipJaxError("This model was made with _do_init=False: params are kept outside of it.")
        self._check_whole(params)
        self._params = unflatten(flatten(params))

    @property
    def required_params(self) -> set[tuple[str, ...]]:
        """The paths of all params."""
        return {tuple(path.split("/")) for path in param_shapes(self._tower)}

    def to_bf16(self, params: Mapping[str, Any], mask: Any = None) -> dict[str, Any]:
        """Params cast to bfloat16, where `mask` (a tree of bools) is true if there is one."""
        return _cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Mapping[str, Any], mask: Any = None) -> dict[str, Any]:
        """Params cast to float16; T5 in float16 wants its `wo` kernels left out of `mask`."""
        return _cast(params, jnp.float16, mask)

    def to_fp32(self, params: Mapping[str, Any], mask: Any = None) -> dict[str, Any]:
        """Params cast to float32."""
        return _cast(params, jnp.float32, mask)

    def _check_whole(self, params: Mapping[str, Any]) -> None:
        check_params(self._tower, params, f"The params for {type(self).__name__}")

    def _forward(
        self,
        params: Mapping[str, Any] | None,
        arrays: tuple[Any, ...],
        *,
        train: bool,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        return_dict: bool | None,
    ) -> ModelOutput | tuple[Any, ...]:
        """Runs the module on ids and what goes with them, each [B, L]; None among the options is the config's."""
        arrays = self._checked(arrays, train)
        options = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        options = {n: bool(getattr(self.config, n) if value is None else value) for n, value in options.items()}
        variables = {"params": params or self.params}
        # Compiled code knows nothing of interceptors, and a function that was traced without is reused with them.
        run = self.module.apply if intercepted() else functools.partial(_compiled, self.module)
        with jax.numpy_dtype_promotion("standard"):  # Flax' norms promote, whatever users forbid themselves
            return run(variables, *as_ids(arrays), **options)

    def _checked(self, arrays: tuple[Any, ...], train: bool) -> tuple[Any, ...]:
        """The same, as arrays of numpy or jax. Refuses dropout, and ids, masks and positions that cannot be run."""
        dropout = max(getattr(self.config, name, 0) or 0 for name in ("attention_dropout", "dropout", "dropout_rate"))
        if train and dropout:
            raise ClipJaxError(
                f"train=True means dropout, of which the config asks for {dropout}, and which is not computed. Pass "
                f"train=False, or set it to 0 in model.config."
            )
        ids, *others = map(_as_array, arrays)
        if ids is None or ids.ndim != 2 or 0 in ids.shape:
            raise ClipJaxError(
                f"Expected input_ids [B, L] of at least one token, found {'none' if ids is None else ids.shape}."
            )
        for array in others:
            if array is not None and array.shape not in (ids.shape, (1, ids.shape[1])):
                raise ClipJaxError(f"Expected arrays of the shape of input_ids, {ids.shape}, found {array.shape}.")
        _check_range(ids, self._tower.vocab_size, "ids", "token embedding", "are they another tokenizer's?")
        if isinstance(self._tower, ClipTextConfig):
            limit = self._tower.max_position_embeddings
            _check_range(others[1], limit, "position_ids", "position embedding", "they count from 0.")
        return ids, *others


def _as_array(array: Any) -> np.ndarray | jax.Array | None:
    """What is no array of jax, as one of numpy; None stays."""
    if array is None or isinstance(array, jax.Array):
        return array
    try:
        return np.asarray(array)
    except ValueError as error:
        raise ClipJaxError("Expected arrays [B, L], found rows of several lengths. Pad them to one.") from error


def _check_range(ids: np.ndarray | jax.Array | None, rows: int, name: str, embedding: str, advice: str) -> None:
    """Refuses ids without a row in an embedding where a look costs nothing: they would be NaN."""
    if isinstance(ids, np.ndarray) and not 0 <= ids.min() <= ids.max() < rows:
        raise ClipJaxError(
            f"Expected {name} from 0 to {rows - 1}, as the {embedding} has rows, found {ids.min()} to {ids.max()}: "
            f"{advice}"
        )


def as_ids(arrays: tuple[Any, ...]) -> tuple[jax.Array | None, ...]:
    """Ids and what goes with them as int32; None stays."""
    return tuple(None if array is None else jnp.asarray(array, jnp.int32) for array in arrays)


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("output_attentions", "output_hidden_states", "return_dict")
)
def _compiled(module: nn.Module, variables: Mapping[str, Any], *arrays: Any, **options: bool) -> Any:
    return module.apply(variables, *arrays, **options)


def _host() -> jax.sharding.Sharding | None:
    """The CPU; None, the default device, where jax was told to do without."""
    try:
        return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return None


def _cast(params: Mapping[str, Any], dtype: jax.typing.DTypeLike, mask: Any) -> dict[str, Any]:
    def cast(leaf: Any, wanted: bool = True) -> Any:
        keeps = is_quantized(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if wanted and not keeps else leaf

    trees = (params,) if mask is None else (params, mask)
    return jax.tree.map(cast, *trees, is_leaf=is_quantized)
