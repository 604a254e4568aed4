"""Static patterns: block lists, dense mask and density all say the same."""

import itertools
import random

import pytest
import torch

from prunekit.core import registry
from prunekit.core.errors import RuntimePolicyError, UsageError
from prunekit.runtime.attention.patterns._engine import block_lists, dense_mask, density
from prunekit.runtime.attention.patterns._scored import is_scored
from prunekit.runtime.attention.patterns.dense import Dense
from prunekit.runtime.attention.patterns.dilated import Dilated
from prunekit.runtime.attention.patterns.halo import Halo
from prunekit.runtime.attention.patterns.neighborhood import Neighborhood
from prunekit.runtime.attention.patterns.power import Power
from prunekit.runtime.attention.patterns.sink_window import SinkWindow
from prunekit.runtime.attention.patterns.streaming import Streaming
from prunekit.runtime.attention.policy import names, policy, policy_of

PATTERNS = (
    Dense(), Dense(causal=False), Power(16, 2), Power(20, 3, 0), Power(1, 1), SinkWindow(3, 20), SinkWindow(40, 30),
    SinkWindow(0, 7, causal=False), Dilated(8, 3), Dilated(5, 70), Dilated(5, 70, causal=False),
    Streaming(16, 1, 2), Streaming(30, 0, 1),
)  # fmt: skip


@pytest.mark.parametrize("n", [1, 63, 100, 1000])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_block_lists_agree_with_the_rule(pattern, n):
    for offset, block_q, block_k in ((0, 128, 128), (37, 64, 32), (0, 32, 64)):
        lists = block_lists(pattern, n, n + offset, offset, block_q, block_k)
        mask = dense_mask(pattern, n, n + offset, offset)
        assert torch.equal(lists.dense()[0], mask)
        assert lists.pairs == int(mask.sum())


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [Power(128, 8), SinkWindow(4, 1024), Dilated(256, 4)], ids=str)
def test_block_lists_agree_with_the_rule_at_4097(pattern):
    assert torch.equal(block_lists(pattern, 4097, 4097).dense()[0], dense_mask(pattern, 4097, 4097))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_future_key_and_every_query_sees_one(pattern):
    mask = dense_mask(pattern, 300, 300)
    assert mask.any(1).all()
    if pattern.causal:
        assert not mask.triu(1).any()
    assert block_lists(pattern, 300, 300).shortest > 0


def test_partial_blocks_come_first_and_are_never_full():
    lists = block_lists(SinkWindow(5, 100), 400, 400, block_q=64, block_k=64)
    mask = torch.nn.functional.pad(lists.dense()[0], (0, 48, 0, 48)).view(7, 64, 7, 64)
    for row in range(7):
        for slot, col in enumerate(lists.indices[0, row, : lists.counts[0, row]].tolist()):
            cell = mask[row, : min(64, 400 - row * 64), col]
            assert bool(cell.all()) == (slot >= lists.partials[0, row])
            assert cell.any()


def test_power_reads_the_blocks_it_names():
    mask = dense_mask(Power(block_tokens=4, window_blocks=2, sink_blocks=1), 80, 80)
    blocks = sorted({k // 4 for k in mask[79].nonzero().flatten().tolist()})
    assert blocks == [0, 3, 11, 15, 17, 18, 19]


def test_power_needs_no_mask_table_where_its_blocks_are_the_kernels():
    assert block_lists(Power(128, 8), 1000, 1000).masks is None
    assert block_lists(Power(96, 8), 1000, 1000).masks is not None


def test_sink_window_reads_sinks_and_window():
    mask = dense_mask(SinkWindow(sink_tokens=2, window_tokens=3), 10, 10)
    assert mask[9].nonzero().flatten().tolist() == [0, 1, 7, 8, 9]


def test_dilated_reads_every_third():
    assert dense_mask(Dilated(3, 3), 10, 10)[9].nonzero().flatten().tolist() == [3, 6, 9]


def test_distinct_masks_are_kept_once():
    lists = block_lists(SinkWindow(4, 256), 4096, 4096)
    assert lists.masks.shape[0] < 8 < int(lists.partials.sum())


def test_density_counts_pairs():
    assert density(Dense(), 100) == 1.0
    assert density(SinkWindow(0, 1), 100) == pytest.approx(100 / 5050)


def window_keys(i, size, window, dilation, stride, causal):
    """Keys of coordinate i along one axis, by the words of the definition: a list of its group, a slice of the list."""
    group = list(range(i % dilation, size, dilation))
    at = group.index(i)
    first_of_stride = at - at % stride
    if causal:
        leader = min(first_of_stride + stride - 1, len(group) - 1)
        return [j for j in group[max(leader - window + 1, 0) : leader + 1] if j <= i]
    leader = min(first_of_stride + stride // 2, len(group) - 1)
    start = min(max(leader - window // 2, 0), len(group) - window)
    return group[start : start + window]


def drawn_neighborhood(seed):
    draw = random.Random(seed)
    axes = draw.randint(1, 3)
    grid = tuple(draw.randint(3, {1: 150, 2: 14, 3: 7}[axes]) for _ in range(axes))
    dilation = tuple(draw.randint(1, min(3, size)) for size in grid)
    window = tuple(draw.randint(1, size // d) for size, d in zip(grid, dilation, strict=True))
    stride = tuple(draw.randint(1, w) for w in window)
    causal = tuple(draw.choice((0, 0, 1)) for _ in grid)
    tile = tuple(draw.randint(1, 5) for _ in grid)
    return Neighborhood(grid, window, dilation, stride, causal, draw.choice((0, 0, 1, 3)), tile)


@pytest.mark.parametrize("seed", range(40))
def test_neighborhood_equals_its_definition_and_its_lists(seed):
    pattern = drawn_neighborhood(seed)
    prefix = pattern.prefix_tokens
    places = list(itertools.product(*map(range, pattern.grid)))
    n = prefix + len(places)
    expected = torch.ones(n, n, dtype=torch.bool)
    for q, at in enumerate(places):
        axes = zip(at, pattern.grid, pattern.window, pattern.dilation, pattern.stride, pattern.causal_axes, strict=True)
        seen = set(itertools.product(*(window_keys(*axis) for axis in axes)))
        expected[prefix + q, prefix:] = torch.tensor([place in seen for place in places])
    mask = dense_mask(pattern, n, n)
    assert torch.equal(mask, expected)
    assert pattern.causal == (all(pattern.causal_axes) and not prefix)
    order = pattern.order(n)
    lists = block_lists(pattern, n, n, block_q=32, block_k=32)
    assert torch.equal(lists.dense()[0], mask[order][:, order])
    assert lists.pairs == int(mask.sum())


@pytest.mark.parametrize("seed", range(10))
def test_halo_blocks_read_themselves_and_a_rim(seed):
    draw = random.Random(seed)
    grid = tuple(draw.randint(2, 9) for _ in range(draw.randint(1, 3)))
    pattern = Halo(
        grid, tuple(draw.randint(1, 4) for _ in grid), tuple(draw.randint(0, 2) for _ in grid), draw.randint(0, 1)
    )
    places = list(itertools.product(*map(range, grid)))
    n = pattern.prefix_tokens + len(places)
    mask = dense_mask(pattern, n, n)
    for q, at in enumerate(places):
        for k, to in enumerate(places):
            inside = all(
                i // b * b - h <= j < i // b * b + b + h
                for i, j, b, h in zip(at, to, pattern.block, pattern.halo, strict=True)
            )
            assert bool(mask[pattern.prefix_tokens + q, pattern.prefix_tokens + k]) == inside
    order = pattern.order(n)
    assert torch.equal(block_lists(pattern, n, n, block_q=32, block_k=32).dense()[0], mask[order][:, order])


def test_the_tile_that_is_taken_is_among_the_best():
    chosen = Neighborhood((48, 64), 17)
    touched = {
        tile: block_lists(Neighborhood((48, 64), 17, tile=tile), 3072, 3072).touched
        for tile in ((2, 64), (4, 32), (8, 16), (16, 8), chosen.tile)
    }
    assert touched[chosen.tile] < 1.1 * min(touched.values()) < max(touched.values())


def test_grids_refuse_what_does_not_fit():
    with pytest.raises(UsageError, match="does not fit an axis of 8"):
        Neighborhood((8, 8), 5, dilation=2)
    with pytest.raises(UsageError, match="does not fit a grid of 2 axes"):
        Neighborhood((8, 8), (3, 3, 3))
    with pytest.raises(UsageError, match="is no grid"):
        Halo(grid=5)
    with pytest.raises(UsageError, match="does not fit a sequence of 65"):
        block_lists(Neighborhood((8, 8), 3), 65, 65)


def test_unknown_patterns_and_options_are_refused_by_name():
    with pytest.raises(UsageError, match="no pattern named `powr`"):
        policy("powr")
    with pytest.raises(UsageError, match="`window` is no option of pattern `power`"):
        policy({"pattern": "power", "window": 3})
    with pytest.raises(UsageError, match="`window_blocks: 0`"):
        policy({"pattern": "power", "window_blocks": 0})
    with pytest.raises(UsageError, match="`causal: no` must be true or false"):
        policy({"pattern": "sink_window", "causal": "no"})
    with pytest.raises(UsageError, match="`mass: x` must be a number"):
        policy({"pattern": "antidiagonal", "mass": "x"})
    with pytest.raises(RuntimePolicyError, match="no pattern in the config"):
        policy_of(object())


@pytest.mark.parametrize("name", names())
def test_every_pattern_carries_its_card_and_an_example(name):
    known = registry.PATTERNS.get(name)
    title, link = known.paper
    assert title
    assert link.startswith("https://")
    assert known.status in ("preview", "stable")
    made = policy({"pattern": name, **known.example})
    assert policy(made.section()) == made
    assert is_scored(made.pattern) == (name in ("antidiagonal", "block_topk", "quest", "vertical_slash"))
