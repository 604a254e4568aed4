"""What benchmarks write: a JSON line a row, and what it was made with."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def asked(*command: str) -> str | None:
    """What a command says, asked in the folder of the benchmarks; None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def made_with(device: str) -> dict[str, Any]:
    """Device, versions, the commit, and whether files were changed since.

    Args:
        device: that models were asked to run on.
    """
    import torch

    from prunekit.report.folder import versions

    cuda = torch.cuda.is_available() and device != "cpu"
    changed = asked("git", "status", "--porcelain")
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "versions": versions(),
        "commit": asked("git", "rev-parse", "HEAD"),
        "dirty": changed is None or bool(changed),
    }


def record(rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any], out: Path | None) -> None:
    """Prints rows as they come, and adds them to a file.

    Args:
        rows: one measurement each.
        about: what all of them share.
        out: JSON lines are added to it; None prints alone.
    """
    for row in rows:
        whole = {**about, **row}
        print(json.dumps(whole), flush=True)
        if out is not None:
            append(out, whole)


def append(out: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to a file of JSON lines."""
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
