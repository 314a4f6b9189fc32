"""The logical axes of the parameters: a contract, as their names are.

`init` boxes kernels, embeddings and biases with these names (`nn.LogicallyPartitioned`), so that
`nn.get_partition_spec` and `nn.logical_to_mesh_sharding` split them by a pipeline's own rules. `apply` takes plain
arrays, and constrains nothing. Norms are not boxed: they are whole on every device.

| parameter                                   | CLIP                             | T5                      |
| ------------------------------------------- | -------------------------------- | ----------------------- |
| token embedding                             | vocab, embed                     | vocab, embed            |
| position embedding; relative attention bias | -, embed                         | -, heads                |
| kernels of query, key and value             | embed, heads; bias heads         | embed, heads            |
| kernel of attention's output                | heads, embed; bias -             | heads, embed            |
| kernels into the feed-forward layer         | embed, mlp; bias mlp             | embed, mlp              |
| kernel out of it                            | mlp, embed; bias -               | mlp, embed              |
| text_projection                             | embed, -                         |                         |

"heads" is N times H: it splits well where N divides. Biases over D are whole like the norms: splitting a vector
saves nothing, and would cost a message per block. So would splitting the columns of text_projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn

AXES: Mapping[str, tuple[str | None, str | None]] = MappingProxyType(
    {
        "token_embedding": ("vocab", "embed"),
        "position_embedding": (None, "embed"),
        "q_proj": ("embed", "heads"),
        "k_proj": ("embed", "heads"),
        "v_proj": ("embed", "heads"),
        "out_proj": ("heads", "embed"),
        "fc1": ("embed", "mlp"),
        "fc2": ("mlp", "embed"),
        "text_projection": ("embed", None),
        "shared": ("vocab", "embed"),
        "relative_attention_bias": (None, "heads"),
        "q": ("embed", "heads"),
        "k": ("embed", "heads"),
        "v": ("embed", "heads"),
        "o": ("heads", "embed"),
        "wi_0": ("embed", "mlp"),
        "wi_1": ("embed", "mlp"),
        "wo": ("mlp", "embed"),
    }
)
"""Name of a module with a kernel or an embedding -> the axes of its rows and columns."""


def with_axes(name: str, init: Callable[..., Any]) -> Callable[..., Any]:
    """The initialiser of the kernel or embedding of the module called `name`, boxed."""
    return nn.with_logical_partitioning(init, AXES[name])


def bias_init(name: str) -> Callable[..., Any]:
    """The initialiser of the bias of the module called `name`, boxed."""
    columns = AXES[name][1]
    return nn.with_logical_partitioning(nn.initializers.zeros, (None if columns == "embed" else columns,))
