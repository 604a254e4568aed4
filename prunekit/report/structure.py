"""What a model is made of: one line a range of equal blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from prunekit.plan.cost import Cost, cost, unit_cost
from prunekit.report.ranges import fold, numbers

if TYPE_CHECKING:
    from prunekit.structure.parts import Block
    from prunekit.structure.view import ModelView


@dataclass(frozen=True)
class BlockShape:
    """Widths and costs of one block; None where the block has no such sub-layer.

    Args:
        block: index in the model, or in its stack.
        heads: query heads.
        kv_groups: key-value heads.
        head_width: numbers per head.
        ffn: neurons of the FFN, of each expert where it has experts.
        experts: experts of the FFN, None for none.
        params: parameters of the block.
        flops: floating-point operations a token.
        kv_bytes: bytes of KV cache a token.
        stack: `encoder` or `decoder`, "" in a model with one stack.
        cross_heads: heads of the cross-attention, None where there is none.
    """

    block: int
    heads: int | None
    kv_groups: int | None
    head_width: int | None
    ffn: int | None
    experts: int | None
    params: int
    flops: int
    kv_bytes: int
    stack: str = ""
    cross_heads: int | None = None

    def shape(self) -> tuple[object, ...]:
        """All but the index: equal shapes are printed as one range."""
        return tuple(v for k, v in asdict(self).items() if k != "block")


def block_shapes(view: ModelView) -> list[BlockShape]:
    """Shape and cost of every block, in order of depth."""
    return [_shape(view, block) for block in view.blocks]


def _shape(view: ModelView, block: Block) -> BlockShape:
    attention, ffn, cross = block.attention, block.ffn, block.cross_attention
    present = [s.address for s in block.sublayers]

    def total(of: str) -> int:
        return round(sum(unit_cost(view, address, of) for address in present))

    return BlockShape(
        block=block.index if block.number is None else block.number,
        heads=attention.widths["kv"] * attention.widths["rep"] if attention else None,
        kv_groups=attention.widths["kv"] if attention else None,
        head_width=attention.widths["hd"] if attention else None,
        ffn=ffn.widths["ffn"] if ffn else None,
        experts=ffn.widths.get("experts") if ffn else None,
        params=total("params"),
        flops=total("flops"),
        kv_bytes=total("kv_bytes"),
        stack=block.stack,
        cross_heads=cross.widths["kv"] if cross else None,
    )


def structure_table(shapes: Sequence[BlockShape]) -> Table:
    """Rich table: a line a range of equal blocks, costs per block."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    mixed, crossed = any(shape.experts for shape in shapes), any(shape.cross_heads for shape in shapes)
    table.add_column("blocks")
    heads = (
        "count",
        "heads",
        "KV groups",
        "head width",
        *(["cross heads"] if crossed else []),
        "FFN width",
        *(["experts"] if mixed else []),
        "parameters (k)",
        "MFLOPs/token",
        "KV bytes/token",
    )
    for head in heads:
        table.add_column(head, justify="right")
    for run in fold(shapes, BlockShape.shape):
        first = run[0]
        cross = [first.cross_heads] if crossed else []
        experts = [first.experts] if mixed else []
        widths = (first.heads, first.kv_groups, first.head_width, *cross, first.ffn, *experts)
        table.add_row(
            f"{first.stack} {numbers([s.block for s in run])}".lstrip(),
            str(len(run)),
            *("none" if w is None else f"{w:,}" for w in widths),
            f"{first.params / 1e3:,.1f}",
            f"{first.flops / 1e6:,.2f}",
            f"{first.kv_bytes:,}",
        )
    return table


@dataclass(frozen=True)
class Structure:
    """Everything `inspect` tells about a model; `quantised` names the method, "" where weights are plain."""

    model_type: str
    architectures: tuple[str, ...]
    tied: bool
    file_bytes: int
    total: Cost
    blocks: tuple[BlockShape, ...]
    quantised: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON values; the totals under `total`, one entry a block under `blocks`."""
        return asdict(self)


def describe(view: ModelView) -> Structure:
    """Structure and cost of a model, from its files alone: no weight is read."""
    architectures = tuple(view.config.get("architectures") or ())
    total = cost(view)
    blocks, file_bytes = tuple(block_shapes(view)), view.checkpoint.file_bytes
    return Structure(view.model_type, architectures, view.tied, file_bytes, total, blocks, view.quantised)


def structure_summary(name: str, structure: Structure) -> Table:
    """Two-column rich table: what the model is and what it costs as a whole."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    total = structure.total
    table.add_row("model", name)
    table.add_row("class", ", ".join(structure.architectures) or structure.model_type)
    table.add_row("tied embeddings", "yes" if structure.tied else "no")
    if structure.quantised:
        table.add_row("quantised", structure.quantised)
    table.add_row("blocks", str(len(structure.blocks)))
    table.add_row("parameters", f"{total.params:,}")
    table.add_row("parameters in blocks", f"{total.block_params:,}")
    table.add_row("FLOPs a token", f"{total.flops_per_token:,}")
    table.add_row("KV bytes a token", f"{total.kv_bytes_per_token:,}")
    table.add_row("weight files, bytes", f"{structure.file_bytes:,}")
    return table
