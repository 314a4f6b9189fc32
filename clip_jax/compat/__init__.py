"""The Flax text encoders that transformers 5 removed, as drop-ins: change the import, and the pipeline runs.

    from clip_jax.compat import FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection, FlaxT5EncoderModel

Signatures, parameter trees, outputs and their dtypes are those of transformers 4.57; torch and transformers are not
needed. docs/migration.md tells what differs.
"""

from clip_jax.compat.base import FlaxPreTrainedModel as FlaxPreTrainedModel
from clip_jax.compat.callables import CLIPTextEncoder as CLIPTextEncoder
from clip_jax.compat.callables import T5TextEncoder as T5TextEncoder
from clip_jax.compat.clip import FlaxCLIPTextModel as FlaxCLIPTextModel
from clip_jax.compat.clip import FlaxCLIPTextModelWithProjection as FlaxCLIPTextModelWithProjection
from clip_jax.compat.clip import FlaxCLIPTextPreTrainedModel as FlaxCLIPTextPreTrainedModel
from clip_jax.compat.shim import install as install
from clip_jax.compat.shim import uninstall as uninstall
from clip_jax.compat.t5 import FlaxT5EncoderModel as FlaxT5EncoderModel
