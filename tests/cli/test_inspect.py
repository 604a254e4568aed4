"""`prunekit inspect` on a real folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

from prunekit.cli.inspect import inspect
from prunekit.core.errors import StructureError


def test_equal_blocks_share_a_line(invoke, tiny_llama) -> None:
    done = invoke(inspect, tiny_llama)
    assert done.exit_code == 0, done.exception
    assert [line for line in done.stdout.splitlines() if line.startswith("0-3")]
    assert not [line for line in done.stdout.splitlines() if line.startswith("1")]


def test_json_holds_every_block_with_its_widths(invoke, tiny_llama) -> None:
    data = json.loads(invoke(inspect, tiny_llama, "--json").stdout)
    assert [b["block"] for b in data["blocks"]] == [0, 1, 2, 3]
    first = data["blocks"][0]
    assert (first["heads"], first["kv_groups"], first["head_width"], first["ffn"]) == (4, 2, 8, 48)
    assert data["tied"] is True
    # q and o 32x32, k and v 16x32, gate, up and down 48x32, two norms of 32.
    assert first["params"] == 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    # Keys and values, 2 groups of 8 numbers, 4 bytes each.
    assert first["kv_bytes"] == 2 * 2 * 8 * 4


def test_total_is_the_number_of_parameters_on_disk(invoke, tiny_llama) -> None:
    data = json.loads(invoke(inspect, tiny_llama, "--json").stdout)
    in_blocks = sum(b["params"] for b in data["blocks"])
    assert data["total"]["block_params"] == in_blocks
    # Tied embedding once, final norm.
    assert data["total"]["params"] == in_blocks + 64 * 32 + 32
    assert data["file_bytes"] == (tiny_llama / "model.safetensors").stat().st_size


def test_tensors_lists_each_tensor_once(invoke, tiny_llama) -> None:
    data = json.loads(invoke(inspect, tiny_llama, "--json", "--tensors").stdout)
    names = [t["name"] for t in data["tensors"]]
    assert len(names) == len(set(names)) == 4 * 9 + 2
    query = next(t for t in data["tensors"] if t["name"] == "model.layers.2.self_attn.q_proj.weight")
    assert query["unit"] == "blocks.2.attention"
    assert query["layout"][0] == "kv rep hd"


def test_inspect_reads_only(invoke, tiny_llama) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in tiny_llama.iterdir()}
    invoke(inspect, tiny_llama)
    assert {p.name: p.stat().st_mtime_ns for p in tiny_llama.iterdir()} == before


def test_unknown_model_gets_a_draft_and_an_error(invoke, tiny_llama, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    done = invoke(inspect, folder)
    assert isinstance(done.exception, StructureError)
    assert done.exception.exit_code == 1
    assert "check the draft" in done.exception.hint
    draft = yaml.safe_load(done.stdout)
    assert draft["model_types"] == ["lama"]
    assert draft["ffn"]["mlp.down_proj.weight"] == ["hidden", "ffn"]
    assert invoke(inspect, folder, "--json").stdout == ""
