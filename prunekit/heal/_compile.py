"""Blocks that are compiled while a model is trained, and are what they were afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from prunekit.modeling.modeling_prunekit import blocks_of

# Each shape is compiled anew, for seconds; one that so few of the blocks share is not worth it.
_SHARED_BY = 0.25


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    """Meanwhile the blocks of a model run compiled; those that are alike share what the compiler made.

    Block by block instead of the whole: one block is compiled in seconds, and FSDP may shard blocks. Blocks of a shape
    that less than a quarter of them have stay as they are.
    """
    blocks = list(blocks_of(model))
    shapes = [tuple(parameter.shape for parameter in block.parameters()) for block in blocks]
    counts = Counter(shapes)
    chosen = [b for b, shape in zip(blocks, shapes, strict=True) if counts[shape] >= _SHARED_BY * len(blocks)]
    for block in chosen:
        block.forward = torch.compile(block.forward)
    try:
        yield
    finally:
        for block in chosen:
            # What hides the class's own.
            del block.forward
