"""Prompts under the power pattern: our kernels beside FlexAttention, flash-attn-4 and dense attention."""

from __future__ import annotations

import torch
from attention_device import poisoned
from attention_ours import DIM, SCALE, Prefill, hopper_with, portable_with
from attention_peers import BACKENDS, compiled_flex, dense, flex_mask, power_rule

from attention_sections.bench import Bench, Part
from prunekit.runtime.attention.patterns._engine import block_lists
from prunekit_kernels.block_sparse_prefill import block_sparse_prefill, cases, flash4, portable
from prunekit_kernels.block_sparse_prefill.reference import reference


def run(bench: Bench) -> None:
    names = right_variants(bench)
    for n in (96,) if bench.rehearse else (32768, 131072, 8192):
        prompt(bench, n, names)
        torch._dynamo.reset()


def variants(bench: Bench) -> dict[str, Prefill]:
    """Our kernels by name."""
    if bench.rehearse:
        return {"portable": portable_with(portable.Tile(16, 4, 2))}
    found = {
        "hopper": hopper_with(rows_first=None),
        "portable 128x128 w8 s2": portable_with(portable.Tile(128, 8, 2)),
        "portable 128x64 w8 s3": portable_with(portable.Tile(64, 8, 3)),
    }
    # Not the default: a kernel that hangs must do so in a process that can be ended.
    new = {"hopper, heads first": hopper_with(rows_first=False)}
    return found | {name: call for name, call in new.items() if bench.tried is None or name in bench.tried}


def right_variants(bench: Bench) -> list[str]:
    """Names of the variants that are right on ragged shapes."""
    good, part = [], Part(bench, "power")
    chosen = [cases.Case(1, 4, 2, 70, 70, 128, block_q=32, block_k=32)] if bench.rehearse else [
        cases.Case(2, 8, 2, 1000, 1000, 128), cases.Case(1, 4, 1, 200, 1111, 128, per_head=True),
        cases.Case(1, 4, 1, 63, 63, 128), cases.Case(1, 16, 4, 4097, 4097, 128),
    ]  # fmt: skip
    poisoned(True)
    for name, call in variants(bench).items():
        with part.case(f"check {name}"):
            right = True
            for number, case in enumerate(chosen):
                q, k, v, lists, _, _ = cases.make(case, torch.bfloat16, bench.on, number + 1)
                expected, sums = reference(q.double(), k.double(), v.double(), lists, SCALE)
                out, lse = call(q.contiguous(), k.contiguous(), v.contiguous(), lists)
                right &= part.check(f"{name} {case.name}", out, expected, cases.RELATIVE[out.dtype])
                right &= part.check(f"{name} {case.name} lse", lse, sums, 1e-3)
            if bench.warm:
                torch.cuda.synchronize()
                with bench.marks.open("a") as file:
                    file.write(name + "\n")
            good += [name] * right
    poisoned(False)
    return good


def prompt(bench: Bench, n: int, names: list[str]) -> None:
    """One prompt of `n` tokens by the variants of these names, the first of them once more at the end, and by peers."""
    part = Part(bench, "power", f"B1 S{n}")
    q, k, v = bench.draw(n)
    lists = block_lists(bench.power, n, n, block_q=bench.block, block_k=bench.block, device=bench.on)
    touched = 4.0 * DIM * bench.block**2 * lists.touched * bench.heads
    whole = 4.0 * DIM * n * (n + 1) / 2 * bench.heads
    keys = torch.arange(n, device=bench.on)
    ours, found = variants(bench), {}
    for name in [*names, *names[:1]]:
        with part.case(name):
            again = " again" * (name in found)
            call = ours[name]
            rule = lambda rows: bench.power.allows(rows[:, None], keys[None, :])[None]  # noqa: E731
            if again or part.check_rows(f"{name} {n}", call(q, k, v, lists)[0], q, k, v, rule):
                found[name + again] = part.time(name + again, lambda: call(q, k, v, lists), flops=touched)
    with part.case("flex power"):
        flex, mask = compiled_flex(), flex_mask(lists, power_rule(bench.power))
        peer = lambda: flex(q, k, v, block_mask=mask, enable_gqa=True)  # noqa: E731
        part.check(f"flex {n}", peer(), block_sparse_prefill(q, k, v, lists)[0], 1e-2)
        found["flex power"] = part.time("flex power", peer, flops=touched)
    with part.case("flash-attn-4 power"):
        peer = flash4.prepared(q, k, v, lists, SCALE)
        part.check(f"flash-attn-4 {n}", peer(), block_sparse_prefill(q, k, v, lists)[0], 1e-2)
        found["flash-attn-4 power"] = part.time("flash-attn-4 power", peer, flops=touched)
    for name, backend in BACKENDS.items():
        with part.case(name):
            found[name] = part.time(name, dense(backend, q, k, v), flops=whole, plain=n > 2**16)
    part.ratios(found)
