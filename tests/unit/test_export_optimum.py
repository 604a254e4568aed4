"""`optimum-cli prune`: every argument reaches `prunekit prune`, options in front too."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "optimum" / "commands" / "register" / "register_prunekit.py"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plug-in's command, with a stand-in for optimum, which tests do not need."""
    for name in ("optimum", "optimum.commands", "optimum.commands.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    base: Any = sys.modules["optimum.commands.base"]
    base.BaseOptimumCLICommand = object
    base.CommandInfo = SimpleNamespace
    spec = importlib.util.spec_from_file_location("register_prunekit", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (found,) = module.REGISTER_COMMANDS
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["--recipe", "r.yaml", "--output", "out"],
        ["-o", "out", "--set", "a=b", "model"],
        ["a", "--", "b"],
    ],
    ids=["none", "help", "options", "short", "dashes"],
)
def test_arguments_reach_prunekit_unchanged(
    command: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    main: Any = ModuleType("prunekit.cli.main")
    main.main = lambda argv: seen.append(argv) or 3
    monkeypatch.setitem(sys.modules, "prunekit.cli.main", main)
    root = argparse.ArgumentParser("optimum-cli")
    commands = root.add_subparsers()
    command.parse_args(commands.add_parser(command.COMMAND.name))
    instance = command()
    instance.args = root.parse_args(["prune", *arguments])
    with pytest.raises(SystemExit) as caught:
        instance.run()
    assert seen == [["prune", *arguments]]
    assert caught.value.code == 3


def test_nothing_on_the_way_is_a_package() -> None:
    folders = [FILE.parent, FILE.parent.parent, FILE.parent.parent.parent]
    assert [folder.name for folder in folders] == ["register", "commands", "optimum"]
    assert not [folder for folder in folders if (folder / "__init__.py").exists()]
