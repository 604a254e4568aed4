"""Runs the command line again and again and kills it, each time one step of writing later; run as a script.

python tests/cli/killed.py FOLDER COMMAND...

A step is anything the interpreter does to a file or folder in FOLDER: making, opening for writing, copying, renaming,
removing; and half of the first copy into each file. After each kill one JSON line says what FOLDER holds; the last
line is that of the run that no kill met.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

# Imported and read once, for all runs.
import prunekit.cli.apply
import prunekit.report.outcome
import prunekit.surgery.engine  # noqa: F401
from prunekit.cli.main import main
from prunekit.plan.loads import runtimes
from prunekit.structure.architecture import architectures

CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
)


class Steps:
    """Kills this process at its `last`-th step."""

    def __init__(self, root: str, last: int) -> None:
        self.root, self.left = root, last
        self.begun: set[int] = set()

    def watch(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit hook."""
        if event == "open" and (not isinstance(args[2], int) or not args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if event == "open" or event in CHANGES:
            self.step(event, str(args[0]))

    def copy(self, source: int, target: int, count: int, *rest: Any) -> int:
        """What `os.copy_file_range` was asked for, at first in each file half of it, then a step."""
        if os.fstat(target).st_ino in self.begun:
            return real_copy(source, target, count, *rest)
        self.begun.add(os.fstat(target).st_ino)
        done = real_copy(source, target, max(1, count // 2), *rest)
        self.step("half a copy", self.root)
        return done

    def step(self, event: str, path: str) -> None:
        """Counts a step."""
        if not os.path.abspath(path).startswith(self.root):
            return
        self.left -= 1
        if self.left == 0:
            os.write(1, json.dumps({"step": f"{event} {os.path.relpath(path, self.root)}"}).encode() + b"\n")
            os.kill(os.getpid(), signal.SIGKILL)


real_copy = os.copy_file_range


def found(root: Path) -> dict[str, str]:
    """Content of every file that lies in a folder one would take for a result."""
    shown = [path for path in root.iterdir() if not path.name.startswith(".")]
    files = sorted(file for path in shown for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): file.read_bytes().hex() for file in files}


def run(root: Path, command: list[str], last: int) -> int:
    """Signal or exit code of one run."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        steps = Steps(str(root), last)
        os.copy_file_range = steps.copy
        sys.addaudithook(steps.watch)
        os._exit(main(command))
    return os.waitpid(child, 0)[1]


def loop(root: Path, command: list[str]) -> None:
    """All runs, one step later each, until one is not killed."""
    architectures()
    runtimes()
    for last in range(1, 1000):
        status = run(root, command, last)
        print(json.dumps({"killed": os.WIFSIGNALED(status), "status": status, "found": found(root)}), flush=True)
        if not os.WIFSIGNALED(status):
            return


if __name__ == "__main__":
    loop(Path(sys.argv[1]), sys.argv[2:])
