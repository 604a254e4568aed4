"""What the README, the quickstart and the guides tell people to type is typed here.

A block fenced as `bash` is run; one without a language (placeholders, many processes) is run with stand-ins in
`test_docs_stand_ins.py`.
A `yaml` block whose first line is a comment with a file name is that file; a `python` block whose first line names a
file of prunekit is added to a copy of the package for the commands of its page.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from prunekit.cli.main import verbs
from tests.pages import RUNNABLE, Block, blocks, run


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
