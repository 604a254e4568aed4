"""The faster of our kernels and a peer's, measured once for each shape on each device."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from prunekit_kernels._device import elapsed_ms
from prunekit_kernels.block_sparse_prefill import flash4
from prunekit_kernels.block_sparse_prefill.cases import RELATIVE, relative_error
from prunekit_kernels.block_sparse_prefill.lists import BlockLists
from prunekit_kernels.block_sparse_prefill.op import block_sparse_prefill

OWN = "prunekit"
REPEATS = 5
Key = tuple[object, ...]


class Peer(Protocol):
    """Another implementation: `NAME`, `refusal(q, k, lists)` and `run(q, k, v, lists, scale)`."""

    NAME: str

    def refusal(self, q: Tensor, k: Tensor, lists: BlockLists) -> str:
        """Why it does not take the case, or an empty string."""
        ...

    def run(self, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float) -> Tensor:
        """Output [B, H, S, D]."""
        ...


# Name of the faster one by case, for this process.
_CHOSEN: dict[Key, str] = {}


def prefill_fastest(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, *, scale: float | None = None, peer: Peer = flash4
) -> Tensor:
    """The output of `block_sparse_prefill` alone, by whichever implementation was faster for such a case.

    The first call of a case runs both: a peer whose output is not ours within the tolerance of the type is left out,
    and said so. Where nothing can be measured, in a compiled or captured step, ours runs.

    Args:
        q: [B, H, S, D]; `k`, `v` and `lists` as for `block_sparse_prefill`.
        scale: factor on the scores, 1 / sqrt(D) if None.
        peer: the other implementation.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def own() -> Tensor:
        return block_sparse_prefill(q, k, v, lists, scale=scale)[0]

    busy = torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing())
    if busy or peer.refusal(q, k, lists):
        return own()
    device = torch.cuda.get_device_name(q.device) if q.is_cuda else "cpu"
    key = (peer.NAME, device, q.dtype, tuple(q.shape), tuple(k.shape), tuple(lists.indices.shape))

    def theirs() -> Tensor:
        return peer.run(q, k, v, lists, scale)

    if key not in _CHOSEN:
        _CHOSEN[key] = _choose(own, theirs, peer.NAME, q)
    return own() if _CHOSEN[key] == OWN else theirs()


def _choose(own: Callable[[], Tensor], theirs: Callable[[], Tensor], name: str, q: Tensor) -> str:
    """Name of the faster one, ours where the peer fails or computes something else."""
    expected = own()
    try:
        error = relative_error(theirs(), expected)
    except Exception as failure:
        # A package of another version may fail in any way; the work goes on without it.
        warnings.warn(f"{name} is left out: {type(failure).__name__}: {str(failure)[:200]}", stacklevel=4)
        return OWN
    # Both round once, each its own way.
    if not error <= 2 * RELATIVE[q.dtype]:
        warnings.warn(f"{name} is left out: its output is {error:.1e} off", stacklevel=4)
        return OWN
    return name if milliseconds(theirs, q.is_cuda) < milliseconds(own, q.is_cuda) else OWN


def milliseconds(run: Callable[[], object], cuda: bool) -> float:
    """Median time of a call that ran before."""
    return statistics.median(elapsed_ms(run, cuda) for _ in range(REPEATS))
