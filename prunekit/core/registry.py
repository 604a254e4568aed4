"""Methods by name: a folder is the list, a file is a method, its class has the file's name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prunekit.core.errors import PrunekitError, UsageError


class Registry:
    """The methods of one folder. Names are read from the files; a file is imported when its method is asked for.

    Args:
        role: what a method of it is called in messages: `score`, `search`.
        package: dotted name of the folder.
    """

    def __init__(self, role: str, package: str) -> None:
        self.role = role
        self.package = package

    def names(self) -> tuple[str, ...]:
        """Names of all methods, by alphabet; files that begin with an underscore are none."""
        spec = importlib.util.find_spec(self.package)
        folders = spec.submodule_search_locations if spec else ()
        files = {file.stem for folder in folders or () for file in Path(folder).glob("*.py")}
        return tuple(sorted(name for name in files if not name.startswith("_")))

    def get(self, name: str) -> Any:
        """Class of a method: `last_k` gives `LastK` of `last_k.py`, `finercut` gives `FinerCut`.

        Raises:
            UsageError: if there is no such method.
            PrunekitError: if its file cannot be imported, or holds no class of its name.
        """
        known = self.names()
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(known)}"
            raise UsageError(f"no {self.role} named `{name}`", hint=hint)
        try:
            module = importlib.import_module(f"{self.package}.{name}")
        except ImportError as error:
            raise PrunekitError(f"the {self.role} `{name}` cannot be imported", why=str(error)) from error
        wanted = name.replace("_", "")
        for label, found in inspect.getmembers(module, inspect.isclass):
            if label.lower() == wanted and found.__module__ == module.__name__:
                return found
        raise PrunekitError(f"`{module.__name__}` has no class named like its file")


SCORES = Registry("score", "prunekit.scores")
SEARCHES = Registry("search", "prunekit.search")
TASKS = Registry("task", "prunekit.evaluate.tasks")
REPAIRS = Registry("repair", "prunekit.repair")
HEALS = Registry("heal", "prunekit.heal.methods")
ATTENTIONS = Registry("attention", "prunekit.heal.attentions")
GATES = Registry("gate", "prunekit.gates")
METRICS = Registry("metric", "prunekit.datasets.metrics")
PATTERNS = Registry("pattern", "prunekit.runtime.attention.patterns")
