"""Code blocks of the README, the quickstart and the guides, and how one is run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "quickstart.md", *sorted((ROOT / "docs" / "guides").glob("*.md")))
TOOLS = {
    "prunekit": "-m prunekit.cli.main",
    "python": "",
    "torchrun": "-m torch.distributed.run",
    "accelerate": "-m accelerate.commands.accelerate_cli",
}
QUICK = ("inspect", "recipes", "methods", "explain")


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        lines = [shlex.split(line, comments=True) for line in self.text.replace("\\\n", " ").splitlines()]
        return [words for words in lines if words]

    @property
    def quick(self) -> bool:
        """Whether it takes seconds: help, headers, lists, or the plan of a score that reads no data."""
        return all(
            words[0] == "prunekit" and (words[1] in QUICK or {"--help", "--dry-run"} & set(words))
            for words in self.commands
        )


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL):
            found.append(Block(page.name, language, text))
    return found


def recipes() -> dict[str, str]:
    """YAML blocks by the file name in their first line."""
    named = [(re.match(r"# ([\w.-]+\.yaml)\n", b.text), b.text) for b in blocks() if b.language == "yaml"]
    return {match[1]: text for match, text in named if match}


RUNNABLE = [block for block in blocks() if block.language == "bash"]


def run(block: Block, folder: Path) -> None:
    """Runs a block in a folder.

    Args:
        block: of shell commands.
        folder: to work in; the YAML files of all pages are written there.
    """
    tools = folder / ".bin"
    tools.mkdir(exist_ok=True)
    for name, words in TOOLS.items():
        tool = tools / name
        tool.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        tool.chmod(0o755)
    for name, text in recipes().items():
        (folder / name).write_text(text)
    package = with_files(block.page, folder)
    paths = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{package}{os.pathsep}{ROOT / 'kernels'}",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env={**os.environ, **paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{block.page}:\n{block.text}\n{done.stderr[-2000:]}"


def with_files(page: str, folder: Path) -> Path:
    """Where the package of a page's commands lies: a copy where the page adds files to it."""
    added = {
        match[1]: block.text
        for block in blocks()
        if block.page == page and block.language == "python"
        for match in [re.match(r"# (prunekit/[\w/]+\.py)\n", block.text)]
        if match
    }
    if not added:
        return ROOT
    copy = folder / ".package"
    if not copy.exists():
        shutil.copytree(ROOT / "prunekit", copy / "prunekit", ignore=shutil.ignore_patterns("__pycache__"))
        for name, text in added.items():
            (copy / name).write_text(text)
    return copy
