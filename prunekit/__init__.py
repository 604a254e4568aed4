"""Structural pruning of transformers.

Importing it lets the Auto classes of transformers load folders whose blocks differ, and makes
`attn_implementation="prunekit"` known; nothing else happens, and neither torch nor transformers is imported.
"""

from prunekit.modeling.register import register_import_hook as _register_import_hook


def _add_attention() -> None:
    from prunekit.runtime.attention.interface import register

    register()


_register_import_hook(_add_attention)
