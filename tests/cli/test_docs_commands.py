"""What the README, the quickstart and the guides tell people to type is typed here.

A block fenced as `bash` is run; one without a language (placeholders, installation) only has its verbs checked.
A `yaml` block whose first line is a comment with a file name is that file; a `python` block whose first line names a
file of prunekit is added to a copy of the package for the commands of its page.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from prunekit.cli.main import verbs

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "quickstart.md", *sorted((ROOT / "docs" / "guides").glob("*.md")))
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


RUNNABLE = [block for block in blocks() if block.language == "bash"]


def run(block: Block, folder: Path) -> None:
    tools = folder / ".bin"
    tools.mkdir(exist_ok=True)
    for name, words in (("prunekit", " -m prunekit.cli.main"), ("python", "")):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{words} "$@"\n')
        tool.chmod(0o755)
    for other in blocks():
        name = re.match(r"# ([\w.-]+\.yaml)\n", other.text)
        if other.language == "yaml" and name:
            (folder / name[1]).write_text(other.text)
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


def test_pages_hold_both_kinds_of_blocks() -> None:
    assert sum(block.quick for block in RUNNABLE) >= 5
    assert sum(not block.quick for block in RUNNABLE) >= 3


def test_every_verb_that_is_shown_exists() -> None:
    shown = {
        words[i + 1]
        for block in blocks()
        if block.language in ("", "bash")
        for line in block.text.splitlines()
        if line.startswith("prunekit ")
        for words in [shlex.split(line, comments=True)]
        for i, word in enumerate(words)
        if word == "prunekit"
    }
    assert shown
    assert shown - {"--help"} <= set(verbs())


@pytest.mark.parametrize("block", [b for b in RUNNABLE if b.quick], ids=lambda b: f"{b.page}-{b.commands[0][1]}")
def test_quick_block_runs(block: Block, tmp_path: Path) -> None:
    run(block, tmp_path)


@pytest.mark.slow
def test_slow_blocks_run_in_the_order_of_the_pages(tmp_path: Path) -> None:
    for block in RUNNABLE:
        if not block.quick:
            run(block, tmp_path)
