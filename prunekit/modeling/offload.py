"""Models larger than memory: whether one is, and how weights stay in their files until they are needed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What must be left free beside the weights for what a pass makes.
_SPARE = 0.2
_LIMITS = (("memory", "/sys/fs/cgroup/memory{group}/memory.limit_in_bytes"), ("", "/sys/fs/cgroup{group}/memory.max"))


def fits(weight_bytes: int) -> bool:
    """Whether so many bytes of weights fit into the memory that is free, with room for a pass."""
    return weight_bytes <= free_bytes() * (1 - _SPARE)


def free_bytes() -> int:
    """Memory that this process may still take: what the machine has free, or less where its control group says so."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            for controller, path in _LIMITS:
                if controller in controllers.split(","):
                    with suppress(OSError, ValueError):
                        limit = int(Path(path.format(group=group.rstrip("/"))).read_text())
                        free = min(free, limit - int(psutil.Process().memory_info().rss))
    return max(0, free)


def options() -> dict[str, Any]:
    """Arguments of `from_pretrained` that leave every weight in the safetensors files; each is read for its own use.

    transformers and accelerate do the work: a layer's weights are read before it runs and dropped after.
    """
    return {"device_map": {"": "disk"}}


def is_offloaded(model: PreTrainedModel) -> bool:
    """Whether a model's weights stay in its files."""
    return "disk" in (getattr(model, "hf_device_map", None) or {}).values()
