"""Structural pruning of transformers.

Importing it lets the Auto classes of transformers load folders whose blocks differ; nothing else happens, and neither
torch nor transformers is imported.
"""

from prunekit.modeling.register import register_import_hook as _register_import_hook

_register_import_hook()
