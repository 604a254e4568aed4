"""The layer map: what it says about a plan, in text and as an image."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from prunekit.report.layer_map import LayerMap, Row, details, layer_map, summary
from prunekit.report.layer_map_image import write_layer_map
from prunekit.structure.architecture import SublayerKind
from prunekit.structure.parts import Block, SubLayer


def stand_in_view(n_blocks: int, without: tuple[str, ...] = ()) -> SimpleNamespace:
    """Blocks of 3 KV groups x 3 heads and 1536 neurons; `without` names sub-layers the source lacks."""

    def sublayer(block: int, kind: SublayerKind) -> SubLayer | None:
        address = f"blocks.{block}.{kind}"
        widths = {"kv": 3, "rep": 3, "hd": 64} if kind == "attention" else {"ffn": 1536}
        return None if address in without else SubLayer(address, kind, block, widths, ())

    blocks = [Block(i, sublayer(i, "attention"), sublayer(i, "ffn")) for i in range(n_blocks)]
    return SimpleNamespace(blocks=tuple(blocks))


def rows_of(n_blocks: int, drop: tuple[str, ...] = (), keep: dict[str, tuple[int, ...]] | None = None) -> list[Row]:
    return layer_map(stand_in_view(n_blocks), SimpleNamespace(drop=drop, keep=keep or {}))  # type: ignore[arg-type]


def printed(rows: list[Row], width: int = 80, encoding: str = "utf-8") -> list[str]:
    class Sink(StringIO):
        pass

    Sink.encoding = encoding  # type: ignore[misc,assignment]
    console = Console(file=Sink(), width=width, color_system=None, legacy_windows=False)
    console.print(LayerMap(rows))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_dropped_sublayer_is_removed_and_its_neighbour_kept() -> None:
    rows = rows_of(4, drop=("blocks.2.attention",))
    assert [r.attention.state for r in rows] == ["kept", "kept", "removed", "kept"]
    assert [r.ffn.state for r in rows] == ["kept"] * 4


def test_narrowed_cell_carries_counts_and_share() -> None:
    keep = {"blocks.1.attention.kv_groups": (0, 2), "blocks.1.attention.query_heads": (0, 1)}
    cell = rows_of(2, keep=keep)[1].attention
    assert cell.state == "narrowed"
    assert cell.widths == {"kv_groups": (2, 3), "query_heads": (2, 3)}
    assert cell.share == pytest.approx(4 / 9)


def test_keeping_every_unit_is_not_narrowed() -> None:
    assert rows_of(1, keep={"blocks.0.attention.kv_groups": (0, 1, 2)})[0].attention.state == "kept"


def test_sublayer_missing_in_source_is_absent_and_not_counted() -> None:
    view = stand_in_view(3, without=("blocks.1.attention",))
    rows = layer_map(view, SimpleNamespace(drop=("blocks.2.ffn",), keep={}))  # type: ignore[arg-type]
    assert rows[1].attention.state == "absent"
    assert summary(rows) == "3 blocks: 0 of 2 attention and 1 of 3 ffn sub-layers removed"


def test_details_fold_block_numbers() -> None:
    keep = {f"blocks.{i}.ffn.neurons": tuple(range(1024)) for i in (0, 1, 2, 5)}
    rows = rows_of(8, drop=("blocks.3.attention", "blocks.4.attention", "blocks.7.ffn"), keep=keep)
    assert details(rows) == [
        "removed attention: 3-4",
        "removed ffn: 7",
        "narrowed neurons 1536 -> 1024: 0-2, 5",
    ]


def test_states_differ_without_colour() -> None:
    rows = rows_of(4, drop=("blocks.2.attention",), keep={"blocks.1.attention.kv_groups": (0,)})
    text = printed(rows)
    line = next(x for x in text if x.startswith("attention"))
    assert line.split()[1] == "█▄·█"
    assert any("kept" in x and "narrowed" in x and "removed" in x for x in text)


def test_ascii_terminal_gets_ascii_cells() -> None:
    text = "\n".join(printed(rows_of(3, drop=("blocks.1.ffn",)), encoding="ascii"))
    assert "#.#" in text
    assert text.isascii()


@pytest.mark.parametrize("width", [30, 60, 120])
def test_no_cell_line_is_wider_than_the_terminal(width: int) -> None:
    text = printed(rows_of(80), width=width)
    cells = [x for x in text if x.startswith("attention")]
    assert max(map(len, cells)) <= width
    assert sum(x.count("█") for x in cells) == 80


def test_ruler_numbers_stand_over_their_cells() -> None:
    text = printed(rows_of(25))
    ruler = next(x for x in text if x.startswith("block "))
    cells = next(x for x in text if x.startswith("attention"))
    assert ruler.index("20") == cells.index("█") + 20


def test_rows_survive_json() -> None:
    row = rows_of(1, keep={"blocks.0.ffn.neurons": (0, 1)})[0]
    assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row
    assert row.to_json() == {
        "block": 0,
        "attention": {"state": "kept", "widths": {}},
        "ffn": {"state": "narrowed", "widths": {"neurons": [2, 1536]}},
    }


@pytest.mark.parametrize("n_blocks", [1, 6, 30, 126])
def test_image_is_a_png_of_sane_size(tmp_path: Path, n_blocks: int) -> None:
    path = tmp_path / "map.png"
    write_layer_map(rows_of(n_blocks, drop=("blocks.0.attention",)), path, "model")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert 900 <= width <= 3000
    assert 300 <= height <= 400


def test_image_shows_the_cut(tmp_path: Path) -> None:
    write_layer_map(rows_of(6), tmp_path / "a.png")
    write_layer_map(rows_of(6, drop=("blocks.3.ffn",)), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
