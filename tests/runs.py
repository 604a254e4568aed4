"""Manifests of pruning runs made by hand, with every kind of section that a report has."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

BLOCKS = 12


def manifest(hostile: str = "") -> dict[str, Any]:
    """A heterogeneous run of three steps: a search, scores of blocks and scores of KV groups.

    Args:
        hostile: put into every text that a user or a model can choose.
    """
    drop = ["blocks.3.attention", "blocks.7.ffn", "blocks.9.attention", "blocks.9.ffn"]
    steps = [(drop[:1], 0.0123), (drop[1:2], 0.0312), (drop[2:], math.inf)]
    groups = [f"blocks.{b}.attention.kv_groups.{g}" for b in range(BLOCKS) for g in range(3)]
    return {
        "schema": 1,
        "versions": {"prunekit": "0.1.0", "torch": f"2.13.0{hostile}"},
        "source": {"name": f"a-model{hostile}", "kind": "folder", "sha256": {"config.json": "ab" * 32}},
        "recipe": {
            "schema": 1,
            "name": f"a run{hostile}",
            "description": f"three steps{hostile}",
            "model": {"source": f"a-model{hostile}"},
            "calibrate": {"data": "wikitext2", "sequences": 2, "length_tokens": 16, "seed": 7},
            "evaluate": {
                "perplexity": {"data": f"wikitext2_eval{hostile}", "sequences": 8, "length_tokens": 128},
                "sample": {"prompt": f"Once{hostile}", "new_tokens": 8},
            },
        },
        "plan": {
            "plan": 1,
            "model": {
                "model_type": "llama",
                "hidden": 576,
                "sublayers": [
                    entry
                    for b in range(BLOCKS)
                    for entry in ([f"blocks.{b}.attention", 3, 3, 64], [f"blocks.{b}.ffn", 1536])
                ],
            },
            "drop": drop,
            "keep": {"blocks.1.attention.kv_groups": [0, 2], "blocks.2.ffn.neurons": list(range(768))},
        },
        "orders": [
            {
                "method": "finercut",
                "steps": [{"units": units, "distance": distance} for units, distance in steps],
                "provenance": {"knobs": {"distance": "js"}},
            },
            {
                "method": "gardener",
                "kind": "blocks",
                "units": [f"blocks.{b}" for b in range(BLOCKS)],
                "values": [10.0 + b / 7 for b in range(BLOCKS)],
                "provenance": {},
            },
            {
                "method": "magnitude",
                "kind": "kv_groups",
                "units": groups,
                "values": [1.0 + (i * 37 % 101) for i in range(len(groups))],
                "provenance": {},
            },
        ],
        "layout": "heterogeneous",
        "loads": {"transformers": f"AutoModelForCausalLM{hostile}", "vLLM": "no: blocks differ"},
        "before": {"params": 134_515_008, "file_bytes": 538_000_000, "flops_per_token": 269_000_000,
                   "kv_bytes_per_token": 46080, "perplexity": 30.2, "sample": f"there was a cat{hostile}"},
        "after": {"params": 113_276_160, "file_bytes": 453_000_000, "flops_per_token": 226_500_000,
                  "kv_bytes_per_token": 38912, "perplexity": 43.7, "sample": f"there was a dog{hostile}"},
        "expectations": [
            {"name": "perplexity_max", "limit": 40.0, "value": 43.7, "ok": False},
            {"name": "params_max", "limit": 120_000_000, "value": 113_276_160, "ok": True},
        ],
        "verified": {"ok": True, "checks": [{"name": "loads", "passed": True, "detail": f"fine{hostile}"}]},
        "seconds": {"plan": 12.5, "cut": 1.25},
        "layer_map": [_row(b, drop) for b in range(BLOCKS)],
        "notes": [f"Perplexity: 8 windows of 128 tokens{hostile}."],
    }  # fmt: skip


def _row(block: int, drop: list[str]) -> dict[str, Any]:
    cells = {kind: {"state": "kept", "widths": {}} for kind in ("attention", "ffn")}
    for kind, cell in cells.items():
        if f"blocks.{block}.{kind}" in drop:
            cell["state"] = "removed"
    if block == 1:
        cells["attention"] = {"state": "narrowed", "widths": {"kv_groups": [2, 3]}}
    if block == 2:
        cells["ffn"] = {"state": "narrowed", "widths": {"neurons": [768, 1536]}}
    return {"block": block, **cells}


def old_manifest() -> dict[str, Any]:
    """The same run as a version without notes, orders, checks, samples and block widths would have left it."""
    found = manifest()
    for key in ("notes", "orders", "verified", "seconds", "loads", "versions"):
        del found[key]
    found["plan"]["model"] = {}
    for side in ("before", "after"):
        del found[side]["sample"]
    return found


def write_run(folder: Path, data: dict[str, Any]) -> Path:
    """An output folder with this manifest and a configuration, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prunekit.json").write_text(json.dumps(data))
    (folder / "config.json").write_text(json.dumps({"architectures": ["PrunekitLlamaForCausalLM"]}))
    return folder
