"""The layer map: which sub-layers a plan keeps, narrows or removes, over depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from prunekit.report.ranges import fold, numbers

if TYPE_CHECKING:
    from prunekit.plan.plan import Plan
    from prunekit.structure.parts import SubLayer
    from prunekit.structure.view import ModelView

State = Literal["kept", "narrowed", "removed", "absent"]
KINDS: tuple[str, ...] = ("attention", "cross_attention", "ffn")
# Without colour the glyphs alone must tell the states apart, so each state has its own shape.
GLYPHS: dict[str, str] = {"kept": "█", "narrowed": "▄", "removed": "·", "absent": " "}
ASCII_GLYPHS: dict[str, str] = {"kept": "#", "narrowed": "o", "removed": ".", "absent": " "}
STYLES: dict[str, str] = {"kept": "cyan", "narrowed": "yellow", "removed": "red", "absent": ""}


@dataclass(frozen=True)
class Cell:
    """One sub-layer of the source model and what the plan does to it.

    Args:
        state: `kept`, `narrowed`, `removed`, or `absent` where the source has no such sub-layer.
        widths: units kept and units before, by unit kind, e.g. `{"kv_groups": (2, 3)}`; empty unless narrowed.
    """

    state: State
    widths: dict[str, tuple[int, int]]

    @property
    def share(self) -> float:
        """Share of the sub-layer's width that stays, 0 to 1; kv_groups 2 of 3 and query_heads 2 of 3 make 4/9."""
        if self.state in ("removed", "absent"):
            return 0.0
        share = 1.0
        for kept, before in self.widths.values():
            share *= kept / before
        return share


@dataclass(frozen=True)
class Row:
    """One block of the source model.

    Args:
        block: its number, within its stack.
        attention: over the stream itself.
        ffn: the FFN.
        cross_attention: absent in most models.
        stack: `encoder` or `decoder`, "" in a model with one.
    """

    block: int
    attention: Cell
    ffn: Cell
    cross_attention: Cell = Cell("absent", {})
    stack: str = ""

    @property
    def name(self) -> str:
        """`3`, or `decoder 3`."""
        return f"{self.stack} {self.block}".strip()

    @property
    def address(self) -> str:
        """`blocks.3`, or `decoder.blocks.3`."""
        return f"{self.stack}.blocks.{self.block}".removeprefix(".")

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values; `stack` and `cross_attention` where there are several stacks."""
        cells = {kind: getattr(self, kind) for kind in KINDS if kind != "cross_attention" or self.stack}
        return {
            **({"stack": self.stack} if self.stack else {}),
            "block": self.block,
            **{k: {"state": c.state, "widths": {n: list(w) for n, w in c.widths.items()}} for k, c in cells.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The row that `to_json` wrote."""
        cells = {
            kind: Cell(data[kind]["state"], {n: (w[0], w[1]) for n, w in data[kind]["widths"].items()})
            for kind in KINDS
            if kind in data
        }
        return cls(data["block"], **cells, stack=data.get("stack", ""))


def kinds_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Kinds of sub-layer that any block has, in the order they run; attention and FFN always."""
    cross = any(row.cross_attention.state != "absent" for row in rows)
    return tuple(kind for kind in KINDS if kind != "cross_attention" or cross)


def layer_map(view: ModelView, plan: Plan) -> list[Row]:
    """What the plan does to every block of the source model, in order of depth.

    Args:
        view: the model before the cut.
        plan: the cuts.
    """
    dropped = set(plan.drop)
    return [
        Row(
            block.index if block.number is None else block.number,
            _cell(block.attention, plan, dropped),
            _cell(block.ffn, plan, dropped),
            _cell(block.cross_attention, plan, dropped),
            block.stack,
        )
        for block in view.blocks
    ]


def _cell(sublayer: SubLayer | None, plan: Plan, dropped: set[str]) -> Cell:
    if sublayer is None:
        return Cell("absent", {})
    if sublayer.address in dropped:
        return Cell("removed", {})
    widths = {}
    for kind, before in _unit_counts(sublayer).items():
        kept = plan.keep.get(f"{sublayer.address}.{kind}")
        if kept is not None and len(kept) < before:
            widths[kind] = (len(kept), before)
    return Cell("narrowed" if widths else "kept", widths)


def _unit_counts(sublayer: SubLayer) -> dict[str, int]:
    w = sublayer.widths
    if sublayer.kind == "ffn":
        return {"neurons": w["ffn"], **({"experts": w["experts"]} if "experts" in w else {})}
    return {"kv_groups": w["kv"], "query_heads": w["rep"]}


def summary(rows: Sequence[Row]) -> str:
    """One line: `30 blocks: 4 of 30 attention and 8 of 30 ffn sub-layers removed, 2 narrowed`."""
    parts = []
    for kind in kinds_of(rows):
        cells = [getattr(r, kind) for r in rows if getattr(r, kind).state != "absent"]
        parts.append(f"{sum(c.state == 'removed' for c in cells)} of {len(cells)} {kind.replace('_', '-')}")
    narrowed = sum(getattr(r, kind).state == "narrowed" for r in rows for kind in KINDS)
    blocks = "1 block" if len(rows) == 1 else f"{len(rows)} blocks"
    text = f"{blocks}: {', '.join(parts[:-1])} and {parts[-1]} sub-layers removed"
    return text + (f", {narrowed} narrowed" if narrowed else "")


def details(rows: Sequence[Row]) -> list[str]:
    """Lines that name what went: `removed attention: 12, 14-16`, `narrowed kv_groups 3 -> 2: 0-29`."""
    return [line for stack in _stacks(rows) for line in _details(stack)]


def _details(rows: Sequence[Row]) -> list[str]:
    lines, stack = [], f"{rows[0].stack} ".lstrip() if rows else ""
    for kind in KINDS:
        removed = [r.block for r in rows if getattr(r, kind).state == "removed"]
        if removed:
            lines.append(f"removed {stack}{kind}: {numbers(removed)}")
    narrowed: dict[tuple[str, int, int], list[int]] = {}
    for row in rows:
        for kind in KINDS:
            for unit, (kept, before) in getattr(row, kind).widths.items():
                name = f"{kind} {unit}" if kind == "cross_attention" else unit
                narrowed.setdefault((name, before, kept), []).append(row.block)
    lines += [
        f"narrowed {stack}{unit} {before} -> {kept}: {numbers(n)}" for (unit, before, kept), n in narrowed.items()
    ]
    return lines


def _stacks(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by stack, in order."""
    return fold(rows, lambda row: row.stack)


@dataclass(frozen=True)
class LayerMap:
    """Rich renderable of the rows: one line of cells per sub-layer kind, a ruler, a legend, and what went by number."""

    rows: Sequence[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = ASCII_GLYPHS if options.ascii_only else GLYPHS
        yield Text(summary(self.rows))
        label = max(len(k) for k in kinds_of(self.rows)) + 2
        # Ten cells between ruler marks: a whole number of tens per line keeps the marks aligned over lines.
        per_line = max(10, (options.max_width - label) // 10 * 10)
        chunks = [
            stack[start : start + per_line] for stack in _stacks(self.rows) for start in range(0, len(stack), per_line)
        ]
        for chunk in chunks:
            yield Text((chunk[0].stack or "block").ljust(label) + _ruler([r.block for r in chunk]), no_wrap=True)
            for kind in kinds_of(chunk):
                line = Text(kind.ljust(label), no_wrap=True)
                for row in chunk:
                    state = getattr(row, kind).state
                    line.append(glyphs[state], STYLES[state])
                yield line
        yield from _legend(self.rows, glyphs, label)
        for detail in details(self.rows):
            yield Text(detail)


def _ruler(blocks: Sequence[int]) -> str:
    """Block numbers at every tenth cell: `0         10        20`."""
    text = ""
    for cell, block in enumerate(blocks):
        if cell % 10 == 0:
            text = text.ljust(cell) + str(block)
    return text


def _legend(rows: Sequence[Row], glyphs: dict[str, str], label: int) -> Iterator[Text]:
    seen = {getattr(row, kind).state for row in rows for kind in KINDS}
    line = Text(" " * label, no_wrap=True)
    for state in ("kept", "narrowed", "removed"):
        if state in seen:
            line.append(glyphs[state], STYLES[state])
            line.append(f" {state}   ")
    line.rstrip()
    yield line
