"""Foreign checkpoints -> params, and back: tables of keys and readers of formats, no maths.

Stands at the top of the repository and is installed as `clip_jax.convert`.
"""

from clip_jax.convert.convert import convert as convert
from clip_jax.convert.export import export as export
