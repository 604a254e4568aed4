"""`yaml_lines`: YAML 1.2 values, their lines, and texts that are refused."""

from __future__ import annotations

import pytest

from prunekit.core.yaml_lines import MAX_BYTES, read_value, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e8", 1e8),
        ("1.10e8", 1.1e8),
        (".5", 0.5),
        ("-3", -3),
        ("012", 12),
        ("5_000_000", 5_000_000),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("~", None),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("'1'", "1"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_values_follow_yaml_1_2(text: str, value: object) -> None:
    found = read_value(text)
    assert found == value
    assert type(found) is type(value)


def test_every_key_and_item_has_its_line() -> None:
    document = read_yaml("a: 1\nb:\n  - x: 2\n    y: 3\n  - 4\n")
    assert document.data == {"a": 1, "b": [{"x": 2, "y": 3}, 4]}
    assert [document.line(p) for p in (("a",), ("b", 0, "x"), ("b", 0, "y"), ("b", 1))] == [1, 3, 4, 5]


def test_missing_place_has_the_line_of_what_holds_it() -> None:
    assert read_yaml("a:\n  b:\n    c: 1\n").line(("a", "b", "d", "e")) == 2


def test_aliases_give_separate_values() -> None:
    data = read_yaml("a: &x {n: 1}\nb: *x\n").data
    data["a"]["n"] = 2
    assert data["b"] == {"n": 1}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "`a` appears twice"),
        ("a: !!python/object/apply:os.system [true]\n", 1, "tag `!!python/object/apply:os.system`"),
        ("a: 1\nb: !own x\n", 2, "tag `!own`"),
        ("a: [1\nb: 2\n", 2, "not YAML"),
        ("a:\n\t- 1\n", 2, "not YAML"),
        ("a: b: c\n", 1, "not YAML"),
        ("a: *nope\n", 1, "undefined alias"),
        ("a: 1\n---\nb: 1\n", 2, "another document"),
        ("a: &x [*x]\n", 1, "inside the value that it repeats"),
        ("a: " + "[" * 40, 1, "nest deeper"),
        ("? [a]\n: b\n", 1, "key must be plain text"),
        ("a: !!int x\n", 1, "`x` cannot be read as int"),
        ("a: " + "9" * 5000, 1, "cannot be read as int"),
        ("a: \0\n", 1, "not YAML"),
        ("#" * (MAX_BYTES + 1), 1, "larger than"),
    ],
)
def test_bad_text_is_named_with_its_line(text: str, line: int, words: str) -> None:
    document = read_yaml(text)
    assert len(document.problems) == 1
    assert words in document.problems[0].what
    assert document.problems[0].line == line


def test_alias_bomb_is_refused() -> None:
    levels = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 10)]
    document = read_yaml("\n".join(levels))
    assert "more than" in document.problems[0].what
    assert document.data is None


def test_sound_rest_of_a_text_with_a_double_key_is_read() -> None:
    document = read_yaml("a: 1\na: 2\nb: 3\n")
    assert document.data == {"a": 1, "b": 3}


def test_bad_short_value_raises_with_one_sentence() -> None:
    with pytest.raises(ValueError, match="not YAML"):
        read_value("[1")
