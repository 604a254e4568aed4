"""Block-sparse prefill for Hopper in Gluon: one producer warp, two warpgroups of matrix work, persistent programs.

A program walks tiles of 128 queries of one head. The producer follows the tile's key-block list and copies K and V
blocks into a ring with the tensor copy engine; each consumer warpgroup owns 64 of the queries. A consumer issues the
scores of the next block before the output product of the last one, so that its softmax runs under both products, and
it does so across tiles: the first scores of the next tile run beside the last product of this one.

Shapes: B batch, H query heads, G key-value heads, S queries, T keys, D head size.
"""

# mypy: ignore-errors
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from prunekit_kernels.block_sparse_prefill.hopper_producer import counts_of, produce, span_of, tile_at


@gluon.jit
def _words(masks, mask_at, masked, WHO: gl.constexpr, TABLE: gl.constexpr, LAYOUT: gl.constexpr):
    """The four words of a block's mask for each of 64 queries; all ones if it is not `masked`.

    Args:
        masks: int32 [n, 128, 4], bit b of word w for key `32 w + b`.
        mask_at: place of the block's mask number.
    """
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    if TABLE:
        number = gl.load(mask_at, mask=masked, other=0)
        at = masks + (number * 128 + WHO * 64 + row) * 4
        seen = (row >= 0) & masked
        first = gl.load(at, mask=seen, other=-1)
        second = gl.load(at + 1, mask=seen, other=-1)
        third = gl.load(at + 2, mask=seen, other=-1)
        fourth = gl.load(at + 3, mask=seen, other=-1)
    else:
        first, second, third, fourth = row, row, row, row
    return first, second, third, fourth


@gluon.jit
def _mask(
    s, q_first, k_first, n_keys, first, second, third, fourth,
    CAUSAL: gl.constexpr, TABLE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores of hidden keys at minus infinity: by table, or those of the future and past the end."""
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, LAYOUT))
    if TABLE:
        at = gl.expand_dims(column, 0)
        low = gl.where(at < 32, gl.expand_dims(first, 1), gl.expand_dims(second, 1))
        high = gl.where(at < 96, gl.expand_dims(third, 1), gl.expand_dims(fourth, 1))
        keep = ((gl.where(at < 64, low, high) >> (at & 31)) & 1) != 0
    else:
        q_at = q_first + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
        k_at = k_first + column
        keep = gl.expand_dims(k_at, 0) < n_keys
        if CAUSAL:
            keep = keep & (gl.expand_dims(q_at, 1) >= gl.expand_dims(k_at, 0))
    return gl.where(keep, s, float("-inf"))


@gluon.jit
def _softmax(s, m, scale_log2, MASKED: gl.constexpr):
    """New row maximum, factor for what was summed before, and exponentials of one block of scores (base two)."""
    m_new = gl.maximum(m, gl.max(s, axis=1) * scale_log2)
    safe = gl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    alpha = gl.exp2(m - safe)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(safe, 1))
    return m_new, alpha, p


@gluon.jit
def _hold(l):
    """The row sums, through an instruction that stores them if they are negative, which they never are.

    The assembler may move a wait for matrix work over plain arithmetic, and it did: the softmax then ran behind the
    product that it should hide. It does not move the wait over a store that needs the softmax's result.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred never; .reg .b32 at; mov.b32 at, 0; setp.lt.f32 never, $1, 0f00000000;"
        " @never st.volatile.shared.f32 [at], $1; mov.b32 $0, $1; }",
        "=r,r",
        [l],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _packed(p, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Exponentials in the operand layout of the output product."""
    if gl.bfloat16 == DTYPE:
        p16 = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        p16 = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=gl.float16, is_pure=True, pack=2
        )
    return gl.convert_layout(p16, LAYOUT)


@gluon.jit
def _store_some(at, out, first, last, stride, DIM: gl.constexpr):
    """Stores the rows `first` and on, before `last`, of an output tile in shared memory, [64, D]."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    row = first + gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, ROWS))
    places = gl.expand_dims(row.to(gl.int64) * stride, 1) + gl.expand_dims(column, 0)
    gl.store(at + places, out.load(ROWS), mask=gl.expand_dims(row < last, 1))


@gluon.jit
def _issue(
    q, acc, p16, k_smem, v_smem, k_full, v_full, k_empty, turn, step,
    STAGES: gl.constexpr, PINGPONG: gl.constexpr, WHO: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Starts the scores of block `step` and the output product of block `step - 1`; returns with the scores."""
    slot = step % STAGES
    before = (step - 1) % STAGES
    mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
    if PINGPONG:
        mbarrier.wait(turn.index(WHO), (step & 1) ^ (1 - WHO))
    zero = gl.zeros([64, 128], gl.float32, layout=S_LAYOUT)
    s = warpgroup_mma(q, k_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
    acc = warpgroup_mma(p16, v_smem.index(before), acc, is_async=True)
    if PINGPONG:
        mbarrier.arrive(turn.index(1 - WHO), count=1)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    return s, acc


@gluon.jit
def _step(
    q, acc, p16, m, l, k_smem, v_smem, k_full, v_full, k_empty, v_empty, turn, step, block_at, mask_at, masks,
    q_first, n_keys, scale_log2,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr, TABLE: gl.constexpr, STAGES: gl.constexpr, PINGPONG: gl.constexpr,
    WHO: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """One block further within a tile."""
    if MASKED:
        # Asked for here, the mask is there when the scores are.
        first, second, third, fourth = _words(masks, mask_at, step >= 0, WHO, TABLE, S_LAYOUT)
    s, acc = _issue(
        q, acc, p16, k_smem, v_smem, k_full, v_full, k_empty, turn, step, STAGES, PINGPONG, WHO, S_LAYOUT
    )  # fmt: skip
    if MASKED:
        s = _mask(
            s, q_first, gl.load(block_at) * 128, n_keys, first, second, third, fourth, CAUSAL, TABLE, S_LAYOUT
        )  # fmt: skip
    m, alpha, p = _softmax(s, m, scale_log2, MASKED)
    l = _hold(l * alpha + gl.sum(p, axis=1))
    acc, p16 = warpgroup_mma_wait(0, deps=(acc, p16))
    mbarrier.arrive(v_empty.index((step - 1) % STAGES), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT)), 1)
    return acc, _packed(p, v_smem.dtype, P_LAYOUT), m, l


@gluon.jit
def _consume(
    o_desc, out_ptr, lse, q_smem, k_smem, v_smem, o_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
    counts, partials, indices, mask_ids, masks, starts, ends, stride_head, max_count, mask_width, n_tiles, n_rows,
    heads, group, n_kv_heads, n_queries, n_keys, q_offset, apart, stride_ob, stride_oh, stride_os, scale_log2,
    CAUSAL: gl.constexpr, TABLE: gl.constexpr, STAGES: gl.constexpr, PINGPONG: gl.constexpr, DIM: gl.constexpr,
    ROWS_FIRST: gl.constexpr, SPANS: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Attention of 64 queries over the listed blocks, tile after tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    q = q_smem.index(WHO)
    out = o_smem.index(WHO)
    first = gl.program_id(0)
    n_mine = (n_tiles - first + gl.num_programs(0) - 1) // gl.num_programs(0)
    nothing = gl.full([64], float("-inf"), gl.float32, layout=ROW)

    row, sequence, head, _kv_head = tile_at(first, n_tiles, n_rows, group, n_kv_heads, ROWS_FIRST)
    line = head * stride_head + row
    batch, start, length = span_of(starts, ends, sequence, row, n_keys, apart, SPANS)
    partial = gl.load(partials + line)
    first_word, second_word, third_word, fourth_word = _words(
        masks, mask_ids + line * mask_width, partial > 0, WHO, TABLE, S_LAYOUT
    )
    mbarrier.wait(q_full.index(WHO), 0)
    mbarrier.wait(k_full.index(0), 0)
    if PINGPONG:
        mbarrier.wait(turn.index(WHO), 1 - WHO)
    zero = gl.zeros([64, 128], gl.float32, layout=S_LAYOUT)
    s = warpgroup_mma(q, k_smem.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    if PINGPONG:
        mbarrier.arrive(turn.index(1 - WHO), count=1)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(0), count=1)
    s = _mask(
        s, q_offset + row * 128 + WHO * 64, gl.load(indices + line * max_count) * 128, length,
        first_word, second_word, third_word, fourth_word, CAUSAL, TABLE, S_LAYOUT,
    )  # fmt: skip
    m, _, p = _softmax(s, nothing, scale_log2, True)
    l = gl.sum(p, axis=1)
    p16 = _packed(p, v_smem.dtype, P_LAYOUT)

    step = 1
    for i in range(n_mine):
        at = indices + line * max_count
        mask_at = mask_ids + line * mask_width
        q_first = q_offset + row * 128 + WHO * 64
        count, partial = counts_of(counts, partials, line, row, length, SPANS)
        acc = gl.zeros([64, DIM], gl.float32, layout=O_LAYOUT)
        for j in range(1, partial):
            acc, p16, m, l = _step(
                q, acc, p16, m, l, k_smem, v_smem, k_full, v_full, k_empty, v_empty, turn, step, at + j, mask_at + j,
                masks, q_first, length, scale_log2, True, CAUSAL, TABLE, STAGES, PINGPONG, WHO, S_LAYOUT, O_LAYOUT,
                P_LAYOUT,
            )  # fmt: skip
            step += 1
        for j in range(partial, count):
            acc, p16, m, l = _step(
                q, acc, p16, m, l, k_smem, v_smem, k_full, v_full, k_empty, v_empty, turn, step, at + j, mask_at + j,
                masks, q_first, length, scale_log2, False, CAUSAL, TABLE, STAGES, PINGPONG, WHO, S_LAYOUT, O_LAYOUT,
                P_LAYOUT,
            )  # fmt: skip
            step += 1
        mbarrier.arrive(q_empty.index(WHO), count=1)

        rows = row * 128 + WHO * 64 + gl.arange(0, 64, layout=ROW)
        lse_at = lse + (batch * heads + head) * n_queries + start + rows
        row_out, batch_out, head_out, start_out = row, batch, head, start
        last_out = length if SPANS else n_queries
        m_out, l_out = m, l
        t = first + gl.minimum(i + 1, n_mine - 1) * gl.num_programs(0)
        row, sequence, head, _kv_head = tile_at(t, n_tiles, n_rows, group, n_kv_heads, ROWS_FIRST)
        line = head * stride_head + row
        batch, start, length = span_of(starts, ends, sequence, row, n_keys, apart, SPANS)
        k_first = gl.load(indices + line * max_count) * 128
        first_word, second_word, third_word, fourth_word = _words(
            masks, mask_ids + line * mask_width, gl.load(partials + line) > 0, WHO, TABLE, S_LAYOUT
        )
        mbarrier.wait(q_full.index(WHO), (i + 1) & 1)
        q = q_smem.index(WHO)
        s, acc = _issue(
            q, acc, p16, k_smem, v_smem, k_full, v_full, k_empty, turn, step, STAGES, PINGPONG, WHO, S_LAYOUT
        )  # fmt: skip
        s = _mask(
            s, q_offset + row * 128 + WHO * 64, k_first, length, first_word, second_word, third_word, fourth_word,
            CAUSAL, TABLE, S_LAYOUT,
        )  # fmt: skip
        m, _, p = _softmax(s, nothing, scale_log2, True)
        l = _hold(gl.sum(p, axis=1))
        acc, p16 = warpgroup_mma_wait(0, deps=(acc, p16))
        mbarrier.arrive(v_empty.index((step - 1) % STAGES), count=1)
        p16 = _packed(p, v_smem.dtype, P_LAYOUT)
        step += 1

        inverse = 1.0 / gl.where(l_out == 0.0, 1.0, l_out)
        acc = acc * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT)), 1)
        tma.store_wait(0)
        out.store(acc.to(o_desc.dtype))
        fence_async_shared()
        place = out._reinterpret(o_desc.dtype, [1, 1, 64, DIM], o_desc.layout)
        q_out = row_out * 128 + WHO * 64
        if SPANS:
            # What follows a sequence is another one, or zeros.
            if q_out + 64 <= last_out:
                tma.async_copy_shared_to_global(o_desc, [batch_out, head_out, start_out + q_out, 0], place)
            else:
                o_at = out_ptr + batch_out.to(gl.int64) * stride_ob + head_out.to(gl.int64) * stride_oh
                o_at += start_out.to(gl.int64) * stride_os
                _store_some(o_at, out, q_out, last_out, stride_os, DIM)
        else:
            tma.async_copy_shared_to_global(o_desc, [batch_out, head_out, q_out, 0], place)
        gl.store(lse_at, (m_out + gl.log2(l_out)) * 0.6931471805599453, mask=rows < last_out)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "stride_head", "max_count", "mask_width", "n_tiles", "n_rows", "heads", "group", "n_kv_heads", "n_queries",
        "n_keys", "q_offset", "apart",
    ]
)  # fmt: skip
def block_sparse_prefill_hopper(
    q_desc, k_desc, v_desc, o_desc, out_ptr, lse, counts, partials, indices, mask_ids, masks, starts, ends,
    stride_head, max_count, mask_width, n_tiles, n_rows, heads, group, n_kv_heads, n_queries, n_keys, q_offset, apart,
    stride_ob, stride_oh, stride_os, scale_log2,
    CAUSAL: gl.constexpr, TABLE: gl.constexpr, STAGES: gl.constexpr, PINGPONG: gl.constexpr, DIM: gl.constexpr,
    ROWS_FIRST: gl.constexpr, SPANS: gl.constexpr,
):  # fmt: skip
    """Attention over listed key blocks of 128 by 128.

    Args:
        q_desc: tensor descriptor [B, H, S, D], block [1, 1, 64, D]; `o_desc` alike, of what `out_ptr` points to.
        k_desc: tensor descriptor [B, G, T, D], block [1, 1, 128, D]; `v_desc` alike.
        lse: float32 [B, H, S], written, natural logarithm.
        counts: int32 [1 or H, rows], blocks of a row, at least one.
        partials: int32 like `counts`, how many of them, the leading ones, want the mask.
        indices: int32 [1 or H, rows, max_count].
        mask_ids: int32 [1 or H, rows, mask_width] into `masks`, int32 [n, 128, 4], if TABLE; else not looked at.
        starts: int32, first token of each sequence, and `ends` past its last, if SPANS; else not looked at. The lists
            are of the longest sequence; rows outside a sequence are not written. Causal lists alone.
        stride_head: rows if the lists differ by head, 0 if one list serves all.
        apart: 1 if each sequence is a row of the batch, 0 if all lie behind one another in one.
        stride_ob: elements of `out_ptr` from one row of the batch to the next, `stride_oh` head, `stride_os` token.
        ROWS_FIRST: whether all heads of a row of blocks come before the next row.
        scale_log2: softmax scale times log2(e).
    """
    dtype: gl.constexpr = q_desc.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [2, 64, DIM], flat)
    o_smem = gl.allocate_shared_memory(dtype, [2, 64, DIM], flat)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 128, DIM], flat)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 128, DIM], flat)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    o_desc, out_ptr, lse, q_smem, k_smem, v_smem, o_smem, q_full, q_empty, k_full, k_empty, v_full,
                    v_empty, turn, counts, partials, indices, mask_ids, masks, starts, ends, stride_head, max_count,
                    mask_width, n_tiles, n_rows, heads, group, n_kv_heads, n_queries, n_keys, q_offset, apart,
                    stride_ob, stride_oh, stride_os, scale_log2, CAUSAL, TABLE, STAGES, PINGPONG, DIM, ROWS_FIRST,
                    SPANS, 0,
                ),
            ),
            (
                _consume,
                (
                    o_desc, out_ptr, lse, q_smem, k_smem, v_smem, o_smem, q_full, q_empty, k_full, k_empty, v_full,
                    v_empty, turn, counts, partials, indices, mask_ids, masks, starts, ends, stride_head, max_count,
                    mask_width, n_tiles, n_rows, heads, group, n_kv_heads, n_queries, n_keys, q_offset, apart,
                    stride_ob, stride_oh, stride_os, scale_log2, CAUSAL, TABLE, STAGES, PINGPONG, DIM, ROWS_FIRST,
                    SPANS, 1,
                ),
            ),
            (
                produce,
                (
                    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    counts, partials, indices, starts, ends, stride_head, max_count, n_tiles, n_rows, group,
                    n_kv_heads, n_keys, apart, STAGES, DIM, ROWS_FIRST, SPANS,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
