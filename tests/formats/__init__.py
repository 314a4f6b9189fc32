"""One small model in every layout that people have checkpoints in.

The names of each are spelt out here, and not taken from `clip_jax.convert`, which is what they test; what is known
of them comes from the projects that write them.
"""

from tests.formats.clip import open_clip_layouts, transformers_layouts
from tests.formats.comfy import comfy_layouts
from tests.formats.layout import Layout
from tests.formats.single_file import single_files
from tests.formats.t5 import t5_layouts
from tests.formats.writers import other_writers

#: Name -> layout.
LAYOUTS: dict[str, Layout] = {
    **transformers_layouts(),
    **open_clip_layouts(),
    **single_files(),
    **comfy_layouts(),
    **t5_layouts(),
    **other_writers(),
}
