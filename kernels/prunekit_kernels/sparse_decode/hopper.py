"""Decode over short lists for Hopper in Gluon: the programs of a list are a cluster and join without a second kernel.

Each program has an SM to itself and reads one chunk of a list for all query heads of the group. It asks for all page
numbers of the chunk at once, keeps the places of its tokens in shared memory, and has up to 192 KiB of keys and values
on their way. What the programs of a list find meets in the L2 cache behind one cluster barrier.

Shapes: B sequences, H query heads, G key-value heads, D head size.
"""

# mypy: ignore-errors
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _meet(
    part_ptr, part_lse, line, group,
    DIM: gl.constexpr, HEADS: gl.constexpr, PROGRAMS: gl.constexpr, JOIN: gl.constexpr,
):  # fmt: skip
    """Output [HEADS, D] and log-sum-exp [HEADS] of a list from those of its programs, once all have written theirs."""
    gl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; // $0", "=r", [],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    c = gl.arange(0, PROGRAMS, gl.SliceLayout(1, gl.SliceLayout(2, JOIN)))
    h = gl.arange(0, HEADS, gl.SliceLayout(0, gl.SliceLayout(2, JOIN)))
    d = gl.arange(0, DIM, gl.SliceLayout(0, gl.SliceLayout(1, JOIN)))
    at = (line * PROGRAMS + c)[:, None] * group + h[None, :]
    real = (c >= 0)[:, None] & (h < group)[None, :]
    # Past the L1 cache, which may hold what was there before.
    lse = gl.load(part_lse + at, mask=real, other=float("-inf"), cache_modifier=".cg")
    part_at = part_ptr + at[:, :, None] * DIM + d[None, None, :]
    part = gl.load(part_at, mask=real[:, :, None], other=0.0, cache_modifier=".cg")
    most = gl.max(lse, 0)
    safe_most = gl.where(most == float("-inf"), 0.0, most)
    weight = gl.exp2(lse - safe_most[None, :])
    total = gl.sum(weight, 0)
    # A sum of weights beside each number: layouts of a cluster do not convert in Triton 3.6.
    beside = weight[:, :, None] + gl.zeros([PROGRAMS, HEADS, DIM], gl.float32, JOIN)
    whole = gl.sum(beside, 0)
    out = gl.sum(part * beside, 0) / gl.where(whole == 0.0, 1.0, whole)
    safe = gl.where(total == 0.0, 1.0, total)
    return out, gl.where(total == 0.0, float("-inf"), safe_most + gl.log2(safe))


@gluon.jit(do_not_specialize=["chunk", "kv_heads", "group"])
def sparse_decode_hopper(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, part_ptr, part_lse, indices, starts, tokens,
    stride_qb, stride_qh, stride_b, stride_g, stride_t, chunk, kv_heads, group, scale_log2,
    DIM: gl.constexpr, HEADS: gl.constexpr, PAGE: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr,
    STAGES: gl.constexpr, PROGRAMS: gl.constexpr, ASK: gl.constexpr, COPY: gl.constexpr, MMA: gl.constexpr,
    PLACES: gl.constexpr, JOIN: gl.constexpr, LINE: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """One chunk of one list; the grid is [1, lists].

    Layouts are of a whole cluster: queries and accumulators are one tensor of PROGRAMS x 16 rows, of which each program
    holds 16; keys are the same tensor in each program, with contents of its own that nothing moves between programs.

    Args:
        q_ptr: [B, H, 1, D].
        k_ptr: cache, slot s of page p at `stride_t * (PAGE * p + s)` of its sequence and head; `v_ptr` alike.
        out_ptr: [B, H, 1, D], written; `lse_ptr` float32 [B, H, 1], natural logarithm.
        part_ptr: float32 [lists, PROGRAMS, group, D], scratch, not looked at by a single program; `part_lse`
            [lists, PROGRAMS, group] alike, base two.
        indices: as in `PageLists`, like `starts` and `tokens`.
        chunk: tokens of a program, at most CHUNK, a power of two.
        group: query heads of a key-value head, at most HEADS.
        STAGES: tiles of keys and values that are on their way, or read, at a time.
    """
    line = gl.program_id(1)
    rank = gl.inline_asm_elementwise("mov.u32 $0, %cluster_ctarank;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    batch = line // kv_heads
    kv = line % kv_heads
    n_tokens = gl.load(tokens + line)
    list_at = indices + gl.load(starts + line)
    first = rank * chunk
    last = gl.minimum(first + chunk, n_tokens)
    place = first + gl.arange(0, CHUNK, PLACES)
    page = gl.load(list_at + place // PAGE, mask=place < last, other=0)
    ROWS: gl.constexpr = PROGRAMS * 16
    r_q = gl.arange(0, ROWS, gl.SliceLayout(1, ASK)) % 16
    d_q = gl.arange(0, DIM, gl.SliceLayout(0, ASK))
    q_at = q_ptr + batch.to(gl.int64) * stride_qb + (kv * group + r_q)[:, None] * stride_qh + d_q[None, :]
    q = gl.load(q_at, mask=(r_q < group)[:, None], other=0.0)
    q = gl.convert_layout(q, gl.DotOperandLayout(0, MMA, 2))

    slots = gl.allocate_shared_memory(gl.int32, [CHUNK], LINE)
    slots.store(page * PAGE + place % PAGE)
    slots = slots._reinterpret(gl.int32, [CHUNK // TILE, TILE], LINE)
    BUFFERS: gl.constexpr = STAGES if STAGES * TILE < CHUNK else CHUNK // TILE
    ks = gl.allocate_shared_memory(k_ptr.dtype.element_ty, [BUFFERS, TILE, DIM], TILES)
    vs = gl.allocate_shared_memory(k_ptr.dtype.element_ty, [BUFFERS, TILE, DIM], TILES)
    at_t = gl.arange(0, TILE, gl.SliceLayout(1, COPY))
    at_d = gl.arange(0, DIM, gl.SliceLayout(0, COPY))
    base = batch.to(gl.int64) * stride_b + kv.to(gl.int64) * stride_g
    at_s = gl.arange(0, TILE, gl.SliceLayout(0, MMA))
    acc = gl.zeros([ROWS, DIM], gl.float32, MMA)
    zeros = gl.zeros([ROWS, TILE], gl.float32, MMA)
    # One sum for each row and place in the tile: sums across warps wait for one another, once at the end is enough.
    l = gl.zeros([ROWS, TILE], gl.float32, MMA)
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, MMA))
    n_steps = gl.maximum(last - first + TILE - 1, 0) // TILE
    # The first STAGES - 1 turns ask and compute nothing, so the code that asks for a tile is there once: a cold
    # instruction cache is part of the time.
    for turn in range(n_steps + STAGES - 1):
        step = turn - (STAGES - 1)
        if step >= 0:
            async_copy.wait_group(STAGES - 2)
            # The buffer that is filled next was read in the turn before.
            tl.debug_barrier()
        if turn < n_steps:
            slot = slots.index(turn).load(gl.SliceLayout(1, COPY))
            offset = base + slot.to(gl.int64)[:, None] * stride_t + at_d[None, :]
            inside = (first + turn * TILE + at_t < last)[:, None]
            async_copy.async_copy_global_to_shared(ks.index(turn % BUFFERS), k_ptr + offset, inside)
            async_copy.async_copy_global_to_shared(vs.index(turn % BUFFERS), v_ptr + offset, inside)
        async_copy.commit_group()
        if step >= 0:
            k = ks.index(step % BUFFERS).permute((1, 0)).load(gl.DotOperandLayout(1, MMA, 2))
            s = mma_v2(q, k, zeros)
            s = gl.where((first + step * TILE + at_s < last)[None, :], s, float("-inf"))
            m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
            alpha = gl.exp2(m - m_new)
            p = gl.exp2(s * scale_log2 - m_new[:, None])
            l = l * alpha[:, None] + p
            p = gl.convert_layout(p.to(k_ptr.dtype.element_ty), gl.DotOperandLayout(0, MMA, 2))
            v = vs.index(step % BUFFERS).load(gl.DotOperandLayout(1, MMA, 2))
            acc = mma_v2(p, v, acc * alpha[:, None])
            m = m_new
    async_copy.wait_group(0)
    total = gl.sum(l, 1)
    safe = gl.where(total == 0.0, 1.0, total)
    out = acc / safe[:, None]
    lse = gl.where(total == 0.0, float("-inf"), m + gl.log2(safe))
    r = gl.arange(0, ROWS, gl.SliceLayout(1, MMA)) % 16
    d = gl.arange(0, DIM, gl.SliceLayout(0, MMA))
    at = (line * PROGRAMS + rank) * group + r
    real = r < group
    if PROGRAMS == 1:
        gl.store(lse_ptr + at, lse * LN2, mask=real)
        gl.store(out_ptr + at[:, None] * DIM + d[None, :], out.to(out_ptr.dtype.element_ty), mask=real[:, None])
    else:
        gl.store(part_lse + at, lse, mask=real)
        gl.store(part_ptr + at[:, None] * DIM + d[None, :], out, mask=real[:, None])
        joined, sums = _meet(part_ptr, part_lse, line, group, DIM, HEADS, PROGRAMS, JOIN)
        h_l = gl.arange(0, HEADS, gl.SliceLayout(0, gl.SliceLayout(2, JOIN)))
        gl.store(lse_ptr + line * group + h_l, sums * LN2, mask=h_l < group)
        h = gl.arange(0, HEADS, gl.SliceLayout(1, gl.SliceLayout(0, JOIN)))
        d_o = gl.arange(0, DIM, gl.SliceLayout(0, gl.SliceLayout(0, JOIN)))
        out_at = out_ptr + (line * group + h)[:, None] * DIM + d_o[None, :]
        gl.store(out_at, joined.to(out_ptr.dtype.element_ty), mask=(h < group)[:, None])
