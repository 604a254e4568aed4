"""The JSON Schema that editors use, and the cards it takes its words from."""

from __future__ import annotations

from prunekit.core.method_card import arguments, card, example_use, type_text
from prunekit.core.recipe import json_schema, parse_recipe
from prunekit.core.yaml_lines import read_yaml


def test_schema_offers_each_method_with_its_own_knobs() -> None:
    definitions = json_schema()["$defs"]
    assert definitions["Method"]["oneOf"] == [{"$ref": "#/$defs/score_norm"}, {"$ref": "#/$defs/search_greedy"}]
    greedy = definitions["search_greedy"]
    assert greedy["properties"]["search"] == {"const": "greedy"}
    assert greedy["properties"]["distance"]["enum"] == ["js", "kl"]
    assert greedy["properties"]["distance"]["description"] == "how outputs are compared."
    assert greedy["additionalProperties"] is False
    assert greedy["required"] == ["search"]


def test_schema_offers_repairs_with_their_knobs_and_data() -> None:
    definitions = json_schema()["$defs"]
    assert {"$ref": "#/$defs/repair_least_squares"} in definitions["Repair"]["oneOf"]
    entry = definitions["repair_least_squares"]
    assert entry["properties"]["method"] == {"const": "least_squares"}
    assert set(entry["properties"]) == {"method", "calibrate", "ridge"}
    assert entry["required"] == ["method"]


def test_schema_offers_healing_with_knobs_settings_and_texts() -> None:
    definitions = json_schema()["$defs"]
    entry = definitions["heal_distill"]["properties"]
    assert {"method", "data", "steps", "lr", "temperature", "top_k"} <= set(entry)
    assert "knobs" not in entry
    assert {"type": "string"} in definitions["HealText"]["anyOf"]


def test_heal_reads_short_forms_of_data_and_writes_what_reads_the_same() -> None:
    sound = {"schema": 1, "model": {"source": "x"}, "steps": [{"remove": "blocks", "by": {"score": "norm"},
                                                              "budget": {"units": 1}}]}  # fmt: skip
    forms = ["a.txt", {"data": "a.txt"}, ["a.txt"], [{"data": "a.txt", "weight": 1.0}]]
    read = [parse_recipe({**sound, "heal": {"method": "distill", "data": form, "top_k": 3}}) for form in forms]
    assert len({str(recipe.effective()) for recipe in read}) == 1
    effective = read[0].effective()
    assert effective["heal"]["temperature"] == 1.0
    assert parse_recipe(effective).effective() == effective


def test_schema_refers_only_to_what_it_defines() -> None:
    schema = json_schema()

    def references(node):
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    found = set(references(schema))
    assert found
    assert found <= {f"#/$defs/{name}" for name in schema["$defs"]}


def test_schema_takes_the_short_form_of_evaluations() -> None:
    assert {"type": "string"} in json_schema()["$defs"]["Perplexity"]["anyOf"]


def test_schema_calls_the_version_schema() -> None:
    schema = json_schema()
    assert schema["properties"]["schema"]["const"] == 1
    assert set(schema["required"]) == {"schema", "model"}
    assert schema["anyOf"] == [{"required": [name]} for name in ("steps", "learn", "vocab")]


def test_card_reads_everything_from_the_class() -> None:
    norm = card("score", "norm")
    assert norm.summary == "Size of the weights."
    assert norm.body == "A paragraph about it, over two lines."
    assert (norm.status, norm.evidence, norm.deviations) == ("stable", "text: section 2", "sums in float32")
    power, names = norm.knobs
    assert (power.name, power.type, power.default) == ("power", "whole number | auto", "auto")
    assert power.meaning == "which norm; `auto` takes the second."
    assert (names.type, names.default) == ("list of text", "[weight]")


def test_example_step_is_a_sound_step() -> None:
    step = read_yaml(example_use(card("score", "norm"))[1]).data["steps"]
    recipe = parse_recipe({"schema": 1, "model": {"source": "m"}, "steps": step})
    assert recipe.steps[0].by.knobs == {"power": 1}


def test_arguments_stop_at_the_next_section() -> None:
    text = "Does it.\n\nArgs:\n    a: first,\n        continued.\n    b (int): second.\n\nReturns:\n    c: not one.\n"
    assert arguments(text) == {"a": "first, continued.", "b": "second."}


def test_types_read_like_words() -> None:
    assert type_text(int | None) == "whole number | null"
    assert type_text(tuple[float, ...]) == "list of number"
