"""Safe YAML with the line of every key, and every problem of the text found in one go.

Reads the YAML 1.2 core types (`yes` is text, `1e8` a number, `12:30` text), aliases included, and nothing that could
run code. Size, depth and the number of values after aliases are bounded, so that no small file expands without end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

MAX_BYTES = 262_144
MAX_DEPTH = 24
MAX_VALUES = 20_000

KeyPath = tuple[str | int, ...]

_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")
_TAGS = {f"tag:yaml.org,2002:{name}" for name in _TYPES}


class _Loader(yaml.SafeLoader):
    """SafeLoader whose plain scalars follow YAML 1.2, with `_` allowed inside whole numbers."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}  # type: ignore[misc]


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass(frozen=True)
class YamlProblem:
    """Something wrong with the text itself.

    Args:
        what: one sentence.
        line: first line is 1.
        path: keys from the top to the place; empty where the text could not be read that far.
        why: more about it, if there is more.
        hint: the way out.
    """

    what: str
    line: int
    path: KeyPath = ()
    why: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Document:
    """The values of a YAML text, with their places.

    Args:
        data: mappings, lists and scalars; None for an empty text.
        lines: line of the key (in a list: of the item) at each path.
        problems: what is wrong with the text; `data` holds what could be read in spite of it.
    """

    data: Any
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    problems: tuple[YamlProblem, ...] = ()

    def line(self, path: KeyPath) -> int:
        """Line of the place, or of the nearest place above it that the text has."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return 1


def read_yaml(text: str) -> Document:
    r"""Values and lines of a YAML text.

    Args:
        text: one YAML document.
    Returns:
        The document; its `problems` are empty where the text is sound. `a: 1\na: 2` gives one problem, on line 2.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return Document(None, problems=(YamlProblem(f"the file is larger than {MAX_BYTES:,} bytes", 1),))
    try:
        deep = _too_deep(text)
        node = None if deep else yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        return Document(None, problems=(_syntax(error),))
    if deep:
        return Document(None, problems=(YamlProblem(f"values nest deeper than {MAX_DEPTH} levels", deep),))
    if node is None:
        return Document(None)
    reader = _Reader()
    try:
        data = reader.value(node, ())
    except _TooMuchError as error:
        return Document(None, problems=(error.problem,))
    return Document(data, reader.lines, tuple(reader.problems))


def read_value(text: str) -> Any:
    """Value of a short YAML text, as behind `--set name=`.

    Raises:
        ValueError: with one sentence, where the text is not sound.
    """
    document = read_yaml(text)
    if document.problems:
        raise ValueError(document.problems[0].what)
    return document.data


class _TooMuchError(Exception):
    def __init__(self, problem: YamlProblem) -> None:
        super().__init__(problem.what)
        self.problem = problem


def _too_deep(text: str) -> int:
    """Line where nesting passes the bound, 0 if nowhere. Events stream, so a hostile text stops early."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                return _line(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    return 0


def _line(item: Any) -> int:
    return int(item.start_mark.line) + 1


def _syntax(error: yaml.YAMLError) -> YamlProblem:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or " ".join(str(error).split())
    context = getattr(error, "context", None) or ""
    hint = ""
    if "\\t" in what:
        hint = "indent with spaces"
    elif "mapping values are not allowed" in what:
        hint = "check the indentation, and put quotes round text with `: ` inside"
    elif "single document" in (context + what):
        hint = "keep one document; remove the `---` between"
    return YamlProblem(
        f"this is not YAML: {what.removeprefix('but ')}", mark.line + 1 if mark else 1, why=context, hint=hint
    )


class _Reader:
    """Turns nodes into values and collects lines and problems on the way."""

    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[YamlProblem] = []
        self._left = MAX_VALUES

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._left -= 1
        if self._left < 0:
            what, why = f"the file holds more than {MAX_VALUES:,} values", "an alias counts each time it is used"
            raise _TooMuchError(YamlProblem(what, _line(node), why=why))
        # The text itself is not as deep as this: an alias stands inside what it names.
        if len(path) > 2 * MAX_DEPTH:
            raise _TooMuchError(YamlProblem("an alias stands inside the value that it repeats", _line(node)))
        if node.tag not in _TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            hint = "write plain text, numbers, lists and mappings"
            self.problems.append(YamlProblem(f"the YAML tag `{tag}` is not allowed", _line(node), path, hint=hint))
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._item(child, (*path, index)) for index, child in enumerate(node.value)]
        return self._scalar(node, path)

    def _item(self, node: yaml.Node, path: KeyPath) -> Any:
        self.lines[path] = _line(node)
        return self.value(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(YamlProblem("a key must be plain text", _line(key_node), path))
                continue
            key, line = key_node.value, _line(key_node)
            if key in first:
                what, why = f"`{key}` appears twice", f"the first is on line {first[key]}"
                self.problems.append(YamlProblem(what, line, (*path, key), why=why, hint="keep one of them"))
                continue
            first[key] = line
            inner: KeyPath = (*path, key)
            self.lines[inner] = line
            found[key] = self.value(value_node, inner)
        return found

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        kind = node.tag.rpartition(":")[2]
        try:
            return _SCALARS[kind](node.value)
        except (ValueError, KeyError):
            self.problems.append(YamlProblem(f"`{node.value[:40]}` cannot be read as {kind}", _line(node), path))
            return None


def _float(text: str) -> float:
    # Python wants `inf` and `nan` without the dot that YAML puts in front.
    return float(re.sub(r"\.(?=[iInN])", "", text))


_SCALARS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": int,
    "float": _float,
    "str": str,
}
