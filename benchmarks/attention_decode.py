"""One decode step of attention on one GPU: dense against lists of pages and tokens; tests first.

    python benchmarks/attention_decode.py --out rows.jsonl

One query a sequence, bfloat16, heads as in Llama-3-8B and SmolLM2-135M. Every timed call follows a read of four times
the L2 cache and replays a CUDA graph; times are of the attention alone, without choosing the pages. A row's floor is
the bytes it must touch at the measured copy rate. Speed-ups are printed only when every check passed. Rows are written
as they come; what the time limit leaves out is named at the end. `--rehearse` runs all of it on small shapes without a
GPU, under TRITON_INTERPRET=1; its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import torch
from attention_device import Device, Run, facts
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from prunekit_kernels.sparse_decode import PageLists, cases, portable, sparse_decode
from prunekit_kernels.sparse_decode.chunks import choose_chunks
from prunekit_kernels.sparse_decode.op import hopper_chunks
from prunekit_kernels.sparse_decode.portable import Tile
from prunekit_kernels.sparse_decode.reference import attend, decode_reference, listed

DENSE = {"dense flash": SDPBackend.FLASH_ATTENTION, "dense cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Shape:
    """Attention of one model over one cache."""

    model: str
    heads: int
    kv_heads: int
    dim: int
    batch: int = 1
    context: int = 1

    def __str__(self) -> str:
        return f"{self.model} B{self.batch} S{self.context}"


MODELS = (Shape("Llama-3-8B", 32, 8, 128), Shape("SmolLM2-135M", 9, 3, 64))
# Layouts that may beat the default, and where they are tried: batch, context, lists.
TILES = (
    Tile(64), Tile(64, early=True), Tile(64, programs=1), Tile(64, programs=4), Tile(64, stages=3, programs=3),
    Tile(64, stages=5, programs=1), Tile(64, warps=2), Tile(32, warps=2, programs=4), Tile(32, programs=4),
    Tile(128, stages=3, programs=1), Tile(128, warps=8, stages=3, programs=1),
)  # fmt: skip
SWEEP = ((1, 131072, "2048 tokens"), (8, 131072, "2048 tokens"), (8, 32768, "1/8 p64"), (1, 8192, "all"))


@dataclass
class Row:
    """One line of the results; each head reads `tokens` of `context` cached ones."""

    what: str
    model: str
    batch: int
    context: int
    tokens: int
    median_us: float
    p20_us: float
    p80_us: float
    scratch_mib: float
    graph: bool
    mib: float
    gb_s: float
    floor_us: float
    chunks: str = ""
    tile: str = ""
    baseline: str = ""
    times_baseline: float | None = None
    dtype: str = "bfloat16"
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, int, int]:
        """Rows with the same place are compared."""
        return self.model, self.batch, self.context


def choose(shape: Shape, page: int, part: int, paged: bool, device: str) -> PageLists:
    """One page of every `part`, at random, in order: for each head, or of a shuffled paged cache for each sequence."""
    n_pages = shape.context // page
    n = max(1, n_pages // part)
    lines = (shape.batch, 1 if paged else shape.kv_heads, n)
    table = torch.arange(n, device=device) * part + torch.randint(min(part, n_pages), lines, device=device)
    if paged:
        table = torch.randperm(shape.batch * n_pages, device=device).view(shape.batch, 1, -1).gather(-1, table)
    tokens = torch.full((shape.batch, 1), n * page, device=device)
    return PageLists.from_table(table, tokens, shape.kv_heads, page, paged=paged)


def variants(shape: Shape, device: str) -> Iterator[tuple[str, Callable[[], PageLists]]]:
    """What is timed at one shape, by name: all, parts in pages of 64 and 16, single tokens, paged caches."""

    def named(page: int, part: int, paged: bool = False) -> Callable[[], PageLists]:
        return lambda: choose(shape, page, part, paged, device)

    whole = torch.full((shape.batch, shape.kv_heads), shape.context, device=device)
    yield "all", lambda: PageLists.whole(whole, shape.context, 64)
    yield "2048 tokens", named(1, max(1, shape.context // 2048))
    for part in (4, 8, 16):
        yield f"1/{part} p64", named(64, part)
        yield f"1/{part} p16", named(16, part)
        if shape.context // part != 2048:
            yield f"1/{part} tokens", named(1, part)
    for page in (64, 16):
        yield f"paged p{page} all", named(page, 1, True)
        yield f"paged p{page} 1/8", named(page, 8, True)


class Bench:
    """Checks, rows and what went wrong."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began = options, time.monotonic()
        self.device = Device(options.rehearse)
        self.log: list[str] = []
        self.left_out: list[str] = []
        self.rows: list[Row] = []
        self.facts: dict[str, str] = {}
        self.copy_gb_s = 0.0
        # Random numbers that serve every shape as keys and values, in either layout.
        self.cache: list[Tensor] = []
        options.out.write_text("")

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def late(self, what: str) -> bool:
        """Whether the time is up, in which case it is written down that `what` is left out."""
        late = self.seconds() > self.options.seconds
        if late:
            self.left_out.append(what)
        return late

    def ours(self, q: Tensor, k: Tensor, v: Tensor, lists: PageLists, tile: Tile | None) -> tuple[Tensor, Tensor]:
        """The operation, or the portable kernel in a layout; in a rehearsal the kernel, where an operation refers."""
        if tile is None and not self.options.rehearse:
            return sparse_decode(q, k, v, lists)
        if tile and self.options.rehearse:
            tile = replace(tile, early=False)
        where = (lists.indices, lists.starts, lists.tokens, lists.page_tokens, lists.paged, lists.longest, lists.total)
        return portable.launch(q, k, v, *where, q.shape[-1] ** -0.5, tile)

    def check(self, name: str, dtype: torch.dtype, out: Tensor, lse: Tensor, expected: Tensor, sums: Tensor) -> None:
        """Notes what is further from the reference than rounding explains."""
        finite = sums > float("-inf")
        error = cases.relative_error(out, expected)
        worst = float((lse - sums)[finite].abs().max()) if finite.any() else 0.0
        same = bool(((lse > float("-inf")) == finite).all())
        if not (error <= cases.RELATIVE[dtype] and worst <= cases.LSE_ABSOLUTE[dtype] and same):
            self.log.append(f"{name}: output {error:.2e} lse {worst:.2e} rows {'agree' if same else 'differ'}")

    def check_small(self) -> None:
        """The operation on ragged cases and random shapes against float64, NaN where nobody may read or wrote."""
        seed, rehearse = self.options.seed, self.options.rehearse
        chosen = cases.SMALL if rehearse else cases.LARGE
        chosen += tuple(cases.random_case(seed + i) for i in range(2 if rehearse else 8))
        torch.use_deterministic_algorithms(True, warn_only=True)
        for number, case in enumerate(chosen):
            dtype, name = torch.float16 if number % 8 == 5 else torch.bfloat16, f"{case.name} seed {seed + number}"
            q, k, v, lists = cases.make(case, dtype, self.device.name, seed + number)
            where = (lists.indices, lists.starts, lists.tokens, lists.page_tokens, lists.paged, case.dim**-0.5)
            expected = decode_reference(q.double(), k.double(), v.double(), *where)
            try:
                self.check(f"operation {name}", dtype, *sparse_decode(q, k, v, lists), *expected)
                if rehearse or case == cases.LARGE[-1]:
                    early = replace(portable.default_tile(case.dim), early=True)
                    self.check(f"joined early {name}", dtype, *self.ours(q, k, v, lists, early), *expected)
            except Exception as error:  # the other cases still tell something
                self.log.append(f"{name}: {type(error).__name__} {str(error)[:200]}")
        torch.use_deterministic_algorithms(False)
        print(f"{self.seconds():4.0f} s  {len(chosen)} small checks, seed {seed}: {len(self.log)} failed", flush=True)

    def check_large(self, name: str, q: Tensor, k: Tensor, v: Tensor, lists: PageLists, tile: Tile | None) -> Tensor:
        """First and last list of a full-size shape against float32; returns the output."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        out, lse = self.ours(q, k, v, lists, tile)
        torch.use_deterministic_algorithms(False)
        if not bool(torch.isfinite(out).all() & torch.isfinite(lse).all()):
            self.log.append(f"{name}: not finite everywhere")
        batch, kv_heads = lists.starts.shape
        group = q.shape[1] // kv_heads
        for b, g in {(0, 0), (batch - 1, kv_heads - 1)}:
            mine = slice(g * group, (g + 1) * group)
            start, tokens = int(lists.starts[b, g]), int(lists.tokens[b, g])
            where = (lists.indices, start, tokens, lists.page_tokens, lists.paged, b, g)
            keys, values = listed(k, *where).float(), listed(v, *where).float()
            expected = attend(q[b, mine].float(), keys, values, q.shape[-1] ** -0.5)
            self.check(f"{name} list {b},{g}", q.dtype, out[b, mine], lse[b, mine], *expected)
        return out

    def tensors(self, shape: Shape, page: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, the same whenever the shape is, and the cache [B, G, S, D] or [pages, page, G, D]."""
        generator = torch.Generator().manual_seed(shape.heads * 1000 + shape.batch)
        q = torch.randn(shape.batch, 1, shape.heads, shape.dim, generator=generator)
        size = (shape.batch, shape.kv_heads, shape.context, shape.dim)
        if page is not None:
            size = (shape.batch * shape.context // page, page, shape.kv_heads, shape.dim)
        k, v = (flat[: torch.Size(size).numel()].view(size) for flat in self.cache)
        return q.to(self.device.name, torch.bfloat16).transpose(1, 2), k, v

    def add(self, what: str, shape: Shape, tokens: int, entries: int, run: Run, **more: str) -> None:
        """Times a call that reads the keys and values of `tokens` tokens a head and 4-byte list entries."""
        timing = self.device.measure(run)
        size = 4 * shape.batch * shape.dim * (shape.kv_heads * tokens + shape.heads) + 4 * entries
        rates = (size / 2**20, size / timing[0] / 1e3, size / self.copy_gb_s / 1e3)
        place = (shape.model, shape.batch, shape.context)
        self.rows.append(Row(what, *place, tokens, *timing, *rates, **more, facts=self.facts))
        with self.options.out.open("a") as file:
            file.write(json.dumps(asdict(self.rows[-1])) + "\n")

    def time_lists(self, name: str, shape: Shape, lists: PageLists, tile: Tile | None = None) -> Tensor:
        """Checks and times the kernel over the lists; returns its output."""
        q, k, v = self.tensors(shape, lists.page_tokens if lists.paged else None)
        used = tile or portable.default_tile(shape.dim)
        out = self.check_large(f"{name} {shape} {used}", q, k, v, lists, tile)
        where = (shape.kv_heads, lists.page_tokens, lists.paged, lists.longest)
        clusters = None if tile or self.options.rehearse else hopper_chunks(q, k, v, *where)
        slots = used.programs * self.device.multiprocessors
        cut = clusters or choose_chunks(lists.starts.numel(), lists.longest, lists.total, used.keys, slots)
        layout = f"{used.keys} keys, {used.warps} warps, {used.stages} stages, {used.programs} an SM"
        self.add(
            f"tile {name}" if tile else name, shape, int(lists.tokens[0, 0]), lists.indices.numel(),
            lambda: self.ours(q, k, v, lists, tile), chunks=f"{cut.n} x {cut.tokens}",
            tile="clusters" if clusters else layout + ", joined early" * used.early,
        )  # fmt: skip
        return out

    def time_dense(self, shape: Shape, ours: Tensor) -> None:
        """Attention over the whole cache; what refuses or computes something else is named and is no baseline."""
        q, k, v = self.tensors(shape, None)
        for name, run in dense_runs(q, k, v).items():
            try:
                difference = cases.relative_error(run(), ours)
                if not difference < 1e-2:
                    print(f"  {name} differs by {difference:.1e} and is no baseline", flush=True)
                    continue
                self.add(name, shape, shape.context, 0, run)
            except Exception as error:  # a baseline that fails must not cost the others
                print(f"  {name} does not run: {str(error).strip().splitlines()[0][:120]}", flush=True)

    def shape(self, shape: Shape) -> None:
        """All variants and the dense baselines at one shape."""
        for name, make in variants(shape, self.device.name):
            if self.late(f"{name} {shape}"):
                continue
            torch.manual_seed(self.options.seed)
            try:
                out = self.time_lists(name, shape, make())
            except Exception as error:  # the other rows are worth having
                self.log.append(f"{name} {shape}: {type(error).__name__} {str(error)[:200]}")
                continue
            if name == "all":
                self.time_dense(shape, out)
        print(f"{self.seconds():4.0f} s  {shape}", flush=True)

    def sweep(self, model: Shape) -> None:
        """Other layouts of the launch, each checked."""
        for batch, context, name in SWEEP if not self.options.rehearse else ((1, 256, "1/4 p16"),):
            shape = replace(model, batch=batch, context=context)
            if context > max(self.options.contexts) or batch > max(self.options.batches):
                continue
            lists = dict(variants(shape, self.device.name))[name]()
            for tile in TILES:
                if self.late(f"{name} {shape} {tile}"):
                    continue
                try:
                    self.time_lists(name, shape, lists, tile)
                except Exception as error:  # one layout that does not compile must not cost the others
                    self.left_out.append(f"{name} {shape} {tile}: {type(error).__name__} {str(error)[:100]}")
        print(f"{self.seconds():4.0f} s  launch layouts", flush=True)

    def ceilings(self) -> None:
        """Measured copy rate, time of the smallest call, hardware and versions."""
        source = torch.ones(2**28 if self.device.name == "cuda" else 2**20, device=self.device.name)
        target = torch.empty_like(source)
        self.copy_gb_s = 2 * source.nbytes / self.device.measure(lambda: target.copy_(source))[0] / 1e3
        least = self.device.measure(lambda: target[:1].copy_(source[:1]))[0]
        self.facts = facts(self.options.commit) | {
            "copy_gb_s": f"{self.copy_gb_s:.0f}", "smallest_call_us": f"{least:.2f}", "seed": str(self.options.seed),
        }  # fmt: skip
        print(self.facts, flush=True)

    def run(self) -> int:
        """Everything, in order of what would be missed most if the time ran out; 1 if a check failed."""
        contexts, batches = self.options.contexts, self.options.batches
        self.check_small()
        if not self.options.check_only:
            self.ceilings()
            numbers = max(batches) * max(contexts) * max(m.kv_heads * m.dim for m in MODELS)
            for _ in range(2):
                self.cache.append(torch.empty(numbers, device=self.device.name, dtype=torch.bfloat16).normal_())
            for model in MODELS:
                for context in sorted(contexts, reverse=True):
                    for batch in batches:
                        self.shape(replace(model, batch=batch, context=context))
                if model is MODELS[0] and not self.options.no_sweep:
                    self.sweep(model)
        for row in self.rows if not self.log else ():
            dense = [r for r in self.rows if r.place == row.place and r.what.startswith("dense")]
            if dense:
                best = min(dense, key=lambda r: r.median_us)
                row.baseline, row.times_baseline = best.what, best.median_us / row.median_us
        self.options.out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in self.rows))
        print(*(f"left out: {line}" for line in self.left_out[:12]), sep="\n")
        if self.log:
            print("checks failed, so no speed-up is printed:", *self.log[:20], sep="\n  ")
            return 1
        if self.rows:
            print_tables(self.rows, self.copy_gb_s)
        print(
            f"all checks passed; {len(self.left_out)} left out; {self.seconds():.0f} s; written to {self.options.out}"
        )
        return 0


def dense_runs(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Torch's attention over the whole cache by backend, and flash-attn's decode where it is installed."""
    runs: dict[str, Callable[[], Tensor]] = {}
    for name, backend in DENSE.items():

        def run(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, enable_gqa=True)

        runs[name] = run
    for name, module in (("dense flash-attn-3", "flash_attn_interface"), ("dense flash-attn-2", "flash_attn")):
        try:
            decode = importlib.import_module(module).flash_attn_with_kvcache
        except (ImportError, AttributeError):
            continue
        mine = [t.transpose(1, 2) for t in (q, k, v)]
        runs[name] = lambda decode=decode, mine=mine: decode(*mine).transpose(1, 2)
    return runs


def print_tables(rows: list[Row], copy_gb_s: float) -> None:
    """For each shape all variants; for each swept shape the layouts from fast to slow; what was asked of the kernel."""
    named = list(dict.fromkeys(r.what for r in rows if not r.what.startswith("tile")))
    print("\nus/times as fast as the fastest dense, for", *named, sep=" | ")
    for place in dict.fromkeys(r.place for r in rows):
        found = {r.what: f"{r.median_us:.1f}/{r.times_baseline or 0:.2f}" for r in rows if r.place == place}
        print("{} B{} S{}:".format(*place), *(found.get(name, "-") for name in named))
    swept = [r for r in rows if r.what.startswith("tile")]
    for at in dict.fromkeys((r.what, *r.place) for r in swept):
        print("\n{}, {} B{} S{}, us".format(*at))
        for r in sorted((r for r in swept if (r.what, *r.place) == at), key=lambda r: r.median_us):
            print(f"  {r.median_us:7.1f} ({r.p20_us:.1f} to {r.p80_us:.1f})  {r.chunks:>10}  {r.tile}")
    print(f"\nfull lists, GB/s and share of the copy rate, {copy_gb_s:.0f} GB/s")
    for r in rows:
        if r.what == "all":
            print("  {} B{} S{}: ".format(*r.place) + f"{r.gb_s:.0f}, {r.floor_us / r.median_us:.0%}")
    for r in rows:
        if r.what == "2048 tokens" and r.context == 131072 and r.model == MODELS[0].model:
            share = r.floor_us / r.median_us
            print(f"2,048 of 131,072 tokens, batch {r.batch}: {r.median_us:.1f} us, {share:.0%} of copy "
                  "(wanted: at most 25 us at batch 1, at least 60% at batch 8)")  # fmt: skip


def main() -> int:
    """Checks, times, prints tables; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are written here")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=130, help="nothing new is begun after so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--commit", default="", help="what the rows call the code; asked of git if not given")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--no-sweep", action="store_true", help="leave other launch layouts out")
    parser.add_argument("--rehearse", action="store_true", help="small, without a GPU, times mean nothing")
    options = parser.parse_args()
    if options.rehearse:
        options.contexts, options.batches, options.seconds = [256], [1, 2], 1e9
    elif not torch.cuda.is_available():
        parser.error("no CUDA device; `--rehearse` runs without one, under TRITON_INTERPRET=1")
    warnings.filterwarnings("ignore", message=".*determinis")
    return Bench(options).run()


if __name__ == "__main__":
    sys.exit(main())
