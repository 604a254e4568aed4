"""Neighbourhoods on a grid, reordering included, beside FlexAttention, NATTEN and dense attention."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from attention_ours import DIM, SCALE, portable_with
from attention_peers import BACKENDS, compiled_flex, dense, flex_mask, tile_rule
from torch import Tensor

from attention_sections.bench import Bench, Part
from prunekit.runtime.attention.patterns._engine import block_lists
from prunekit.runtime.attention.patterns.neighborhood import Neighborhood
from prunekit_kernels.block_sparse_prefill import block_sparse_prefill, portable
from prunekit_kernels.permute import permute_tokens

# Output of queries, keys and values.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(bench: Bench) -> None:
    shapes = [((16, 16), (5, 5))] if bench.rehearse else [((128, 128), (32, 32)), ((16, 32, 32), (8, 16, 16))]
    for sizes, window in shapes:
        neighborhood(bench, sizes, window)
        torch._dynamo.reset()


def neighborhood(bench: Bench, sizes: tuple[int, ...], window: tuple[int, ...]) -> None:
    n = prod(sizes)
    shape = f"{'x'.join(map(str, sizes))} w{'x'.join(map(str, window))}"
    part = Part(bench, "grid", shape)
    q, k, v = bench.draw(n)
    found: dict[str, float] = {}
    pattern = Neighborhood(sizes, window)
    lists = block_lists(pattern, n, n, device=bench.on)
    order = pattern.order(n).to(bench.on, torch.int32)
    slots = order.argsort().to(torch.int32)
    useful = 4.0 * DIM * n * prod(window) * bench.heads
    touched = lists.touched * lists.block_q * lists.block_k / (n * prod(window))
    keys = torch.arange(n, device=bench.on)

    def reordered(call: Attention) -> Tensor:
        return permute_tokens(call(*(permute_tokens(t, order, slots) for t in (q, k, v))), slots, order)

    ours: dict[str, Attention] = {"ours": lambda q, k, v: block_sparse_prefill(q, k, v, lists, scale=SCALE)[0]}
    if not bench.rehearse:
        fixed = portable_with(portable.Tile(128, 8, 2))
        ours["portable 128x128 w8 s2"] = lambda q, k, v: fixed(q, k, v, lists)[0]
    out = None
    for name, call in ours.items():
        with part.case(name):
            mine = reordered(call)
            out = mine if out is None else out
            rule = lambda rows: pattern.allows(rows[:, None], keys[None, :])[None]  # noqa: E731
            if part.check_rows(f"{name} {shape}", mine, q, k, v, rule):
                found[name] = part.time(f"{name}, reordering included", lambda: reordered(call), flops=useful,
                                        touched_over_useful=touched)  # fmt: skip
    tiled = [permute_tokens(t, order, slots) for t in (q, k, v)]
    with part.case("parts"):
        part.time("ours without reordering", lambda: ours["ours"](*tiled), flops=useful * touched)
        part.time("reordering queries", lambda: permute_tokens(q, order, slots), size=2.0 * q.nbytes)
    with part.case("flex"):
        flex, mask = compiled_flex(), flex_mask(lists, tile_rule(sizes, window, pattern.tile or ()))
        inner = lambda q, k, v: flex(q, k, v, block_mask=mask, enable_gqa=True)  # noqa: E731
        if out is not None:
            part.check(f"flex {shape}", reordered(inner), out, 1e-2)
        found["flex"] = part.time("flex, reordering included", lambda: reordered(inner), flops=useful)
        part.time("flex without reordering", lambda: inner(*tiled), flops=useful * touched)
    with part.case("natten"):
        import natten

        layout = [t.repeat_interleave(bench.heads // t.shape[1], 1).transpose(1, 2).unflatten(1, sizes)
                  .contiguous() for t in (q, k, v)]  # fmt: skip
        peer = lambda: getattr(natten, f"na{len(sizes)}d")(*layout, kernel_size=window)  # noqa: E731
        if out is not None:
            part.check("natten", peer().flatten(1, len(sizes)).transpose(1, 2), out, 1e-2)
        found["natten"] = part.time("natten, heads expanded before", peer, flops=useful)
    for name, backend in BACKENDS.items():
        with part.case(name):
            found[name] = part.time(name, dense(backend, q, k, v, causal=False))
    part.ratios(found)
