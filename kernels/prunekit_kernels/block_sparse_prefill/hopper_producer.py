"""What the two roles of the Hopper prefill kernel agree on, and the role that copies: one producer warp.

Shapes: B batch, H query heads, G key-value heads, S queries, T keys, D head size.
"""

# mypy: ignore-errors
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def tile_at(t, n_tiles, n_rows, group, n_kv_heads, ROWS_FIRST: gl.constexpr):
    """Row of blocks, batch, query head and key-value head of tile `t`, the longest rows first.

    Either all rows of one key-value head before the next head, or all heads of one row before the next row.
    """
    if ROWS_FIRST:
        per_row = n_tiles // n_rows
        row = t // per_row
        rest = t % per_row
        kv = rest // group
    else:
        kv = t // (n_rows * group)
        rest = t % (n_rows * group)
        row = rest // group
    kv_head = kv % n_kv_heads
    return n_rows - 1 - row, kv // n_kv_heads, kv_head * group + rest % group, kv_head


@gluon.jit
def span_of(starts, ends, sequence, row, n_keys, apart, SPANS: gl.constexpr):
    """Row of the batch that a sequence lies in, the place of its first token there, and its length."""
    if SPANS:
        start = gl.load(starts + sequence)
        length = gl.load(ends + sequence) - start
        batch = sequence * apart
    else:
        start = row * 0
        length = n_keys
        batch = sequence
    return batch, start, length


@gluon.jit
def counts_of(counts, partials, line, row, length, SPANS: gl.constexpr):
    """Blocks of a tile, and how many of them are masked; one of each for a tile behind the end of its sequence."""
    count = gl.load(counts + line)
    partial = gl.maximum(gl.load(partials + line), 1)
    if SPANS:
        count = gl.where(row * 128 < length, count, 1)
        partial = gl.minimum(partial, count)
    return count, partial


@gluon.jit
def _load_block(
    desc, smem, full, empty, slot, phase, batch, head, start, block, BLOCK: gl.constexpr, DIM: gl.constexpr
):
    """Copies one key or value block into a slot of the ring once both consumers have left it."""
    mbarrier.wait(empty.index(slot), phase)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    place = smem.index(slot)._reinterpret(desc.dtype, [1, 1, BLOCK, DIM], desc.layout)
    tma.async_copy_global_to_shared(desc, [batch, head, start + block * BLOCK, 0], full.index(slot), place)


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    counts, partials, indices, starts, ends, stride_head, max_count, n_tiles, n_rows, group, n_kv_heads, n_keys, apart,
    STAGES: gl.constexpr, DIM: gl.constexpr, ROWS_FIRST: gl.constexpr, SPANS: gl.constexpr,
):  # fmt: skip
    """Copies the queries of each tile and the listed key and value blocks, as far ahead as the ring allows.

    After the last tile it sends that tile's queries and first key block once more, for the scores that the consumers
    start before they know that nothing follows.
    """
    first = gl.program_id(0)
    n_mine = (n_tiles - first + gl.num_programs(0) - 1) // gl.num_programs(0)
    step = 0
    for i in range(n_mine + 1):
        t = first + gl.minimum(i, n_mine - 1) * gl.num_programs(0)
        row, sequence, head, kv_head = tile_at(t, n_tiles, n_rows, group, n_kv_heads, ROWS_FIRST)
        line = head * stride_head + row
        batch, start, length = span_of(starts, ends, sequence, row, n_keys, apart, SPANS)
        count, _partial = counts_of(counts, partials, line, row, length, SPANS)
        count = gl.where(i == n_mine, 0, count)
        for half in gl.static_range(2):
            mbarrier.wait(q_empty.index(half), (i & 1) ^ 1)
            mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes)
            place = q_smem.index(half)._reinterpret(q_desc.dtype, [1, 1, 64, DIM], q_desc.layout)
            q_first = start + row * 128 + half * 64
            tma.async_copy_global_to_shared(q_desc, [batch, head, q_first, 0], q_full.index(half), place)
        block = gl.load(indices + line * max_count)
        slot = step % STAGES
        phase = ((step // STAGES) & 1) ^ 1
        _load_block(k_desc, k_smem, k_full, k_empty, slot, phase, batch, kv_head, start, block, 128, DIM)
        for j in range(1, count):
            ahead = gl.load(indices + line * max_count + j)
            _load_block(v_desc, v_smem, v_full, v_empty, slot, phase, batch, kv_head, start, block, 128, DIM)
            step += 1
            slot = step % STAGES
            phase = ((step // STAGES) & 1) ^ 1
            _load_block(k_desc, k_smem, k_full, k_empty, slot, phase, batch, kv_head, start, ahead, 128, DIM)
            block = ahead
        if i < n_mine:
            _load_block(v_desc, v_smem, v_full, v_empty, slot, phase, batch, kv_head, start, block, 128, DIM)
            step += 1
