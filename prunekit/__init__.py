"""Structural pruning of transformers.

Importing it lets the Auto classes of transformers load folders whose blocks differ, and makes
`attn_implementation="prunekit"` known; nothing else happens, and neither torch nor transformers is imported.
"""

from typing import Any

from prunekit.modeling.register import register_import_hook as _register_import_hook


# The runtime is imported at the first call: it needs transformers, which is half imported when the names are added.
def _attention(*inputs: Any, **options: Any) -> Any:
    from prunekit.runtime.attention import interface

    interface.register()
    return interface.attention(*inputs, **options)


def _attention_mask(*inputs: Any, **options: Any) -> Any:
    from prunekit.runtime.attention import interface

    interface.register()
    return interface.attention_mask(*inputs, **options)


_register_import_hook(_attention, _attention_mask)
