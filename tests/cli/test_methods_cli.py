"""`prunekit methods` and `prunekit explain`: each method says everything about itself."""

from __future__ import annotations

import json

import pytest

from prunekit.cli.main import main
from prunekit.core.method_card import card, method_names


@pytest.mark.parametrize("arguments", [["methods"], ["methods", "list"]])
def test_list_shows_every_method_with_its_status(arguments, capsys) -> None:
    assert main(arguments) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    listed = {tuple(row[:2]) for row in rows if len(row) > 2}
    assert set(method_names()) <= listed
    assert ("search", "finercut") in listed


def test_list_by_kind_shows_only_methods_that_choose_it(capsys) -> None:
    assert main(["methods", "list", "--remove", "neurons", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found
    assert all("neurons" in entry["kinds"] for entry in found)
    assert "finercut" not in [entry["name"] for entry in found]


def test_list_by_unknown_kind_names_the_kinds(capsys) -> None:
    assert main(["methods", "list", "--remove", "neuron"]) == 2
    assert "kv_groups" in capsys.readouterr().err


@pytest.mark.parametrize(("role", "name"), method_names(), ids=[name for _, name in method_names()])
def test_explain_shows_the_whole_card(role: str, name: str, capsys) -> None:
    assert main(["explain", name]) == 0
    text = capsys.readouterr().out
    entry = card(role, name)
    assert f"{name}  {role}, {entry.status}\n" in text
    for knob in entry.knobs:
        assert knob.name in text
    sections = {"repair": "repair", "heal": "heal", "gate": "learn"}
    uses = {role: f"{section}: {{method: {name}" for role, section in sections.items()}
    uses["metric"] = f"--metric {name}"
    uses["attention"] = f"attention: {{method: {name}"
    assert uses.get(role, f"by: {{{role}: {name}") in " ".join(text.split())


@pytest.mark.parametrize(("role", "name"), method_names(), ids=[name for _, name in method_names()])
def test_each_method_explains_each_knob(role: str, name: str) -> None:
    entry = card(role, name)
    assert entry.summary
    assert bool(entry.kinds) == (role not in ("repair", "heal", "attention"))
    assert entry.evidence
    assert [knob.name for knob in entry.knobs if not knob.meaning] == []


def test_explain_as_json_has_types_and_defaults(capsys) -> None:
    assert main(["explain", "finercut", "--json"]) == 0
    knobs = {knob["name"]: knob for knob in json.loads(capsys.readouterr().out)["knobs"]}
    assert "js" in knobs["distance"]["type"]
    assert knobs["distance"]["default"]


def test_explain_unknown_method_suggests_the_near_one(capsys) -> None:
    assert main(["explain", "finecut"]) == 2
    assert "did you mean `finercut`?" in capsys.readouterr().err
