"""What a model reads while it runs: sparse attention for Hugging Face models.

`attach(model, pattern=...)` turns a pattern on for one model and back off. `register()`, which `import prunekit` sees
to, makes `attn_implementation="prunekit"` known, which reads the pattern from the model's config.
"""

from prunekit.runtime.attention.attach import Attachment, attach
from prunekit.runtime.attention.interface import register

__all__ = ["Attachment", "attach", "register"]
