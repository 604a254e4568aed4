"""What benchmarks of whole models write: a JSON line a row, and what it was made with."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def git(*words: str) -> str | None:
    """What git says; None where the code is no checkout."""
    here = Path(__file__).parent
    done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def made_with(device: str) -> dict[str, Any]:
    """Device, versions, the commit, and whether files were changed since.

    Args:
        device: that models were asked to run on.
    """
    import torch

    from prunekit.report.folder import versions

    cuda = torch.cuda.is_available() and device != "cpu"
    changed = git("status", "--porcelain")
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "versions": versions(),
        "commit": git("rev-parse", "HEAD"),
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
        line = json.dumps({**about, **row})
        print(line, flush=True)
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
