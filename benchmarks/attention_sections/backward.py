"""Gradients under the power pattern, beside those of FlexAttention and dense attention."""

from __future__ import annotations

import torch
from attention_device import poisoned
from attention_ours import DIM, SCALE
from attention_peers import BACKENDS, compiled_flex, dense, flex_mask, power_rule

from attention_sections.bench import GRADIENT, Bench, Part
from prunekit.runtime.attention.patterns._engine import block_lists
from prunekit_kernels.block_sparse_prefill import BlockLists, backward, block_sparse_prefill, cases
from prunekit_kernels.block_sparse_prefill.reference import backward_reference, reference

# Of the kernel for queries and of the one for keys and values; None for the default of both.
Layouts = tuple[backward.Layout, backward.Layout] | None


def run(bench: Bench) -> None:
    layouts: dict[str, Layouts] = {"default": None}
    if bench.rehearse:
        layouts = {"16x16": (backward.Layout(16, 16, 4, 2),) * 2}
    right, checks = {}, Part(bench, "backward")
    for name, layout in layouts.items():
        with checks.case(f"check {name}"):
            if check(bench, checks, name, layout):
                right[name] = layout
    gradients(bench, 64 if bench.rehearse else 32768, right)
    torch._dynamo.reset()


def after_forward(lists: BlockLists) -> tuple[object, ...]:
    """What the gradients take of lists behind queries, keys, values, output and log-sum-exp."""
    return (*lists.tensors, None, None, None, *lists.numbers, SCALE)


def check(bench: Bench, part: Part, name: str, layouts: Layouts) -> bool:
    """Whether the gradients are right on ragged shapes, against float64."""
    chosen = [cases.Case(1, 4, 2, 70, 70, 128, block_q=32, block_k=32)] if bench.rehearse else [
        cases.Case(2, 8, 2, 1000, 1000, 128), cases.Case(2, 8, 2, 700, 700, 128, table=True),
        cases.Case(1, 4, 1, 200, 1111, 128, per_head=True),
    ]  # fmt: skip
    right = True
    for number, case in enumerate(chosen):
        q, k, v, lists, _, _ = cases.make(case, torch.bfloat16, bench.on, number + 1)
        wide = [t.double() for t in (q, k, v)]
        out, lse = reference(*wide, lists, SCALE)
        grad, less = torch.randn_like(q), torch.randn_like(lse)
        expected = backward_reference(grad.double(), less, *wide, out, lse, *after_forward(lists))
        poisoned(True)
        got = backward.launch(grad, less, q, k, v, out.to(q.dtype), lse, *after_forward(lists), layouts=layouts,
                              chunk=2)  # fmt: skip
        poisoned(False)
        for letter, a, b in zip("qkv", got, expected, strict=True):
            right &= part.check(f"{name} {case.name} d{letter}", a, b, GRADIENT)
    return right


def gradients(bench: Bench, n: int, layouts: dict[str, Layouts]) -> None:
    """Gradients of one prompt of `n` tokens by layouts of our kernels, and by peers."""
    part = Part(bench, "backward", f"B1 S{n}")
    q, k, v = bench.draw(n)
    lists = block_lists(bench.power, n, n, block_q=bench.block, block_k=bench.block, device=bench.on)
    flops = 10.0 * DIM * bench.block**2 * lists.touched * bench.heads
    grad = torch.randn_like(q)
    found: dict[str, float] = {}
    out, lse = block_sparse_prefill(q, k, v, lists, scale=SCALE)
    nothing = torch.zeros_like(lse)
    mine = None
    for name, chosen in layouts.items():
        with part.case(name):
            call = lambda: backward.launch(  # noqa: E731
                grad, nothing, q, k, v, out, lse, *after_forward(lists), layouts=chosen
            )
            mine = call()
            found[f"ours {name}"] = part.time(f"ours {name}", call, flops=flops)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with part.case("flex power"):
        peer = compiled_flex()(*leaves, block_mask=flex_mask(lists, power_rule(bench.power)), enable_gqa=True)
        call = lambda: torch.autograd.grad(peer, leaves, grad, retain_graph=True)  # noqa: E731
        if mine is not None:
            for name, a, b in zip("qkv", mine, call(), strict=True):
                part.check(f"flex {name} {n}", b, a, GRADIENT)
        found["flex power"] = part.time("flex power", call, flops=flops, plain=True)
    for name, backend in BACKENDS.items():
        with part.case(name):
            full = dense(backend, *leaves)()
            call = lambda: torch.autograd.grad(full, leaves, grad, retain_graph=True)  # noqa: E731
            found[name] = part.time(name, call, plain=True)
    part.ratios(found)
