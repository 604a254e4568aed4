"""Each kind of mistake in a recipe: what the error says, where it points, what it suggests."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunekit.core.errors import RecipeError
from prunekit.core.recipe import InvalidRecipeError, load_recipe, parse_recipe

GOOD = """\
schema: 1
model: {source: some-model}
steps:
  - remove: blocks
    by: {search: greedy}
    budget: {remove: 0.2, of: params}
"""


def step(remove: str = "blocks", by: str = "{search: greedy}", budget: str = "{remove: 0.2}", rest: str = "") -> str:
    head = "schema: 1\nmodel: {source: m}\nsteps:\n"
    return head + f"  - remove: {remove}\n    by: {by}\n    budget: {budget}\n" + rest


# text, line, place, part of the message, part of why or hint


def learn(method="vib", remove="[neurons]", budget="{remove: 0.2}", more="") -> str:
    return f"learn: {{method: {method}, remove: {remove}, budget: {budget}{more}}}\n"


ONE = {
    "unknown key": (GOOD + "modle: {}\n", 7, "modle", "unknown key `modle`", "did you mean `model`"),
    "unknown nested key": (step(budget="{remove: 0.2, off: params}"), 6, "steps.0.budget.off", "`off`", "`of`"),
    "missing source": (GOOD.replace("{source: some-model}", "{}"), 2, "model.source", "`source` is missing", "hub id"),
    "missing budget": (GOOD.rpartition("    budget")[0], 4, "steps.0.budget", "`budget` is missing", "budget: {"),
    "newer schema": (GOOD.replace("schema: 1", "schema: 2"), 1, "schema", "not a version", "allowed: 1"),
    "text for number": (
        GOOD + "calibrate: {sequences: ten}\n",
        7,
        "calibrate.sequences",
        "must be a whole number",
        "",
    ),
    "quoted number": (GOOD + "calibrate: {sequences: '10'}\n", 7, "calibrate.sequences", "a whole number", ""),
    "fraction for count": (GOOD + "calibrate: {seed: 1.5}\n", 7, "calibrate.seed", "must be a whole number", ""),
    "text for bool": (GOOD.replace("m}", "m}").replace("some-model}", "m, trust_remote_code: yes}"), 2,
                      "model.trust_remote_code", "`trust_remote_code: yes` must be true or false", ""),
    "number for text": (GOOD + "name: 3\n", 7, "name", "`name: 3` must be text", ""),
    "scalar for mapping": (GOOD + "calibrate: wikitext2\n", 7, "calibrate", "must be a mapping", ""),
    "mapping for list": (GOOD + "export: {formats: onnx}\n", 7, "export.formats", "must be a list", ""),
    "too small": (GOOD + "calibrate: {length_tokens: 1}\n", 7, "calibrate.length_tokens", "at least 2", ""),
    "empty text": (GOOD.replace("some-model", "''"), 2, "model.source", "must not be empty", ""),
    "no steps": ("schema: 1\nmodel: {source: m}\nsteps: []\n", 3, "steps", "the recipe removes nothing", ""),
    "device": (GOOD.replace("some-model", "m, device: gpu"), 2, "model.device", "`device: gpu`", "cuda:1"),
    "misspelt kind": (step(remove="blcoks"), 4, "steps.0.remove", "`remove: blcoks` is not allowed", "`blocks`"),
    "infinite": (step(budget="{remove: .inf}"), 6, "steps.0.budget.remove", "must be a finite number", ""),
    "leaves nothing": (step(budget="{remove: 1.0}"), 6, "steps.0.budget.remove", "must be below 1", "written 0.2"),
    "per cent": (step(budget="{remove: 20}"), 6, "steps.0.budget.remove", "must be below 1", "20 % is written 0.2"),
    "negative": (step(budget="{remove: -0.1}"), 6, "steps.0.budget.remove", "must be at least 0", ""),
    "no amount": (step(budget="{of: params}"), 6, "steps.0.budget", "does not say how much", "`units`"),
    "two amounts": (step(budget="{remove: 0.2, units: 3}"), 6, "steps.0.budget.units", "both given", "keep one"),
    "count of params": (step(budget="{units: 3, of: params}"), 6, "steps.0.budget.of", "mixes two measures", "`of`"),
    "multiple of blocks": (step(budget="{remove: 0.2, multiple_of: 8}"), 6, "steps.0.budget.multiple_of",
                           "does not go with `remove: blocks`", "go whole"),
    "kv of neurons": (step("neurons", "{score: norm}", "{remove: 0.2, of: kv_bytes}"), 6, "steps.0.budget.of",
                      "does not go with `remove: neurons`", "no byte of the KV cache"),
    "latency with a score": (step(by="{score: norm}", budget="{remove: 0.2, of: latency_ms}"), 6, "steps.0.budget.of",
                             "`of: latency_ms` is not possible", "only a search"),
    "search within groups": (step(budget="{remove: 0.2, within: kind}"), 6, "steps.0.budget.within",
                             "does not go with a search", "whole model"),
    "no method": (step(by="{}"), 5, "steps.0.by", "names no method", "methods list"),
    "two methods": (step(by="{score: norm, search: greedy}"), 5, "steps.0.by", "both given", "score: NAME"),
    "misspelt method": (step(by="{search: gredy}"), 5, "steps.0.by.search", "no search named `gredy`", "`greedy`"),
    "unlike any method": (step(by="{search: zzz}"), 5, "steps.0.by.search", "no search named", "there are: greedy"),
    "score as search": (step(by="{search: norm}"), 5, "steps.0.by.search", "no search", "write `score: norm`"),
    "kind of another method": (step("neurons"), 4, "steps.0.remove", "`greedy` cannot choose neurons", "`norm`"),
    "kind of no method": (step("query_heads", "{score: norm}"), 4, "steps.0.remove", "cannot choose", "no method"),
    "misspelt knob": (step(by="{search: greedy, frnt: 0.1}"), 5, "steps.0.by.frnt", "unknown key `frnt`", "`front`"),
    "knob of wrong type": (step(by="{search: greedy, front: a}"), 5, "steps.0.by.front", "must be a number", ""),
    "knob as quoted number": (step(by="{search: greedy, front: '0.1'}"), 5, "steps.0.by.front", "a number", ""),
    "knob out of range": (step(by="{search: greedy, front: 2}"), 5, "steps.0.by.front", "must be at most 1", ""),
    "infinite knob": (step(by="{search: greedy, front: .inf}"), 5, "steps.0.by.front", "must be a finite", ""),
    "knob choice": (step(by="{search: greedy, distance: jsd}"), 5, "steps.0.by.distance", "`distance: jsd`", "`js`"),
    "knob of no type": (step(by="{score: norm, power: x}"), 5, "steps.0.by.power", "fits none", ""),
    "knobs together": (step(by="{search: greedy, distance: kl, front: 1}"), 5, "steps.0.by", "kl needs more", ""),
    "onnx alone": (GOOD + "export: {formats: [onnx]}\n", 7, "export.formats", "lacks safetensors", "are made from"),
    "format twice": (GOOD + "export: {formats: [safetensors, safetensors]}\n", 7, "export.formats", "twice", ""),
    "expect without evaluation": (GOOD + "expect: {perplexity_max: 9}\n", 7, "expect.perplexity_max",
                                  "needs `evaluate.perplexity`", "nothing measures it"),
    "expect without onnx": (GOOD + "expect: {onnx_max_abs_diff: 1e-3}\n", 7, "expect.onnx_max_abs_diff",
                            "needs the format onnx", "add it"),
    "expect not stock": (GOOD + "expect: {loads_stock: false}\n", 7, "expect.loads_stock", "not allowed", "true"),
    "stock and heterogeneous": (GOOD + "export: {layout: heterogeneous}\nexpect: {loads_stock: true}\n", 8,
                                "expect.loads_stock", "contradicts", "classes of its own"),
    "unknown runtime": (GOOD + "require: [vlm]\n", 7, "require.0", "`require: vlm` is not allowed", "`vllm`"),
    "runtime twice": (GOOD + "require: [vllm, vllm]\n", 7, "require", "names vllm twice", "keep one"),
    "stock and its own classes": (GOOD + "export: {layout: heterogeneous}\nrequire: [transformers]\n", 8, "require",
                                  "contradicts", "classes of its own"),
    "alternating blocks": (step(budget="{remove: 0.2, keep_alternating: true}"), 6, "steps.0.budget.keep_alternating",
                           "does not go with `remove: blocks`", "taking turns"),
    "alternating attention": (step("attention", budget="{remove: 0.2, keep_alternating: true}"), 6,
                              "steps.0.budget.keep_alternating", "does not go with", "remove: sublayers"),
    "misspelt repair": (GOOD + "repair: {method: least_square}\n", 7, "repair.method", "no repair named",
                        "`least_squares`"),
    "repair without a method": (GOOD + "repair: {ridge: 0.1}\n", 7, "repair.method", "`method` is missing", ""),
    "knob of a repair": (GOOD + "repair: {method: least_squares, rigde: 1}\n", 7, "repair.rigde", "unknown key",
                         "`ridge`"),
    "repair out of range": (GOOD + "repair: {method: least_squares, ridge: 0.0}\n", 7, "repair.ridge", "above 0", ""),
    "data of a repair": (GOOD + "repair: {method: least_squares, calibrate: {sequences: 0}}\n", 7,
                         "repair.calibrate.sequences", "at least 1", ""),
    "misspelt heal": (GOOD + "heal: {method: distil}\n", 7, "heal.method", "no heal named", "`distill`"),
    "heal without a method": (GOOD + "heal: {steps: 9}\n", 7, "heal.method", "`method` is missing", ""),
    "misspelt key of heal": (GOOD + "heal: {method: distill, stps: 9}\n", 7, "heal.stps", "unknown key", "`steps`"),
    "misspelt knob of heal": (GOOD + "heal: {method: distill, top: 9}\n", 7, "heal.top", "unknown key", "`top_k`"),
    "heal out of range": (GOOD + "heal: {method: distill, lr: 0.0}\n", 7, "heal.lr", "must be above 0", ""),
    "knob of heal out of range": (GOOD + "heal: {method: distill, temperature: 0}\n", 7, "heal.temperature",
                                  "must be above 0", ""),
    "knobs of heal together": (GOOD + "heal: {method: distill, hidden: 1, top_k: 4}\n", 7, "heal",
                               "`hidden` and `top_k` exclude", ""),
    "passes of heal": (GOOD + "heal: {method: distill, batch: 6, accumulate: 4}\n", 7, "heal.accumulate",
                       "cannot be split into 4", "same number"),
    "patience without a held-out part": (GOOD + "heal: {method: distill, held_out: 0, patience: 2}\n", 7,
                                         "heal.patience", "needs a held-out part", "`held_out`"),
    "text of heal": (GOOD + "heal: {method: distill, data: [{data: a.txt, weight: 0}]}\n", 7, "heal.data.0.weight",
                     "must be above 0", ""),
    "prompts without a teacher": (GOOD + "heal: {method: distill, data: [{data: a.txt, prompts: b.txt}]}\n", 7,
                                  "heal.data.0.prompts", "the teacher writes", "data: teacher"),
    "misspelt gate": (GOOD + learn(method="vob"), 7, "learn.method", "no gate named `vob`", "`vib`"),
    "kind that no gate learns": (GOOD + learn(remove="[experts]"), 7, "learn.remove.0", "`remove: experts`", "neurons"),
    "kind twice": (GOOD + learn(remove="[ffn, ffn]"), 7, "learn.remove", "names ffn twice", "keep one"),
    "kinds inside each other": (GOOD + learn(remove="[sublayers, ffn]"), 7, "learn.remove", "takes attention and FFN",
                                "keep `sublayers`"),
    "nothing to learn": (GOOD + learn(remove="[]"), 7, "learn.remove", "must not be empty", ""),
    "budget of a gate": (GOOD + learn(budget="{of: params}"), 7, "learn.budget.remove", "`remove` is missing", ""),
    "measure of a gate": (GOOD + learn(budget="{remove: 0.2, of: kv_bytes}"), 7, "learn.budget.of", "`of: kv_bytes`",
                          "flops"),
    "knob of a gate": (GOOD + learn(more=", gate_lt: 1"), 7, "learn.gate_lt", "unknown key `gate_lt`", "`gate_lr`"),
    "kind that another gate learns": (GOOD + learn(method="shrp"), 7, "learn.remove.0", "`shrp` does not learn neurons",
                                      "`vib`"),
    "passes of a gate": (GOOD + learn(more=", batch: 6, accumulate: 4"), 7, "learn.accumulate",
                         "cannot be split into 4", "same number"),
    "empty runtime": (GOOD + "runtime: {}\n", 7, "runtime.attention", "`attention` is missing", ""),
    "misspelt pattern": (GOOD + "runtime: {pattern: powr}\n", 7, "runtime.pattern", "no pattern named `powr`",
                         "`power`"),
    "option of a pattern": (GOOD + "runtime: {attention: {pattern: power, blok_tokens: 2}}\n", 7,
                            "runtime.attention.blok_tokens", "`blok_tokens` is no option", "`block_tokens`"),
    "type of an option": (GOOD + "runtime: {pattern: dense, causal: 1}\n", 7, "runtime.causal", "`causal: 1`", ""),
    "range of an option": (GOOD + "runtime: {pattern: power, window_blocks: 0}\n", 7, "runtime", "`window_blocks: 0`",
                           "at least 1"),
    "layers of a pattern": (GOOD + "runtime: {pattern: power, layers: first}\n", 7, "runtime.attention.layers",
                            "`layers: first` must be a list", ""),
    "scored pattern in a graph": (GOOD + "runtime: {pattern: quest}\nexport: {formats: [safetensors, onnx]}\n", 7,
                                  "runtime.pattern", "`onnx` cannot hold the pattern `quest`", "by score"),
    "rewire": (GOOD + "  - rewire: kv_heads\n    to: {groups: 1}\n", 7, "steps.1.rewire", "not built yet", "remove"),
    "vocab": (step("vocab"), 4, "steps.0.remove", "the vocabulary is a section of its own", "beside `steps`"),
    "unwritten layout": (GOOD + "export: {layout: masked}\n", 7, "export.layout", "not built yet", "stock"),
    "unknown format": (GOOD + "export: {formats: [safetensors, onxn]}\n", 7, "export.formats.1", "onxn", "`onnx`"),
    "double key": (GOOD + "model: {source: x}\n", 7, "model", "`model` appears twice", "line 2"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line", "place", "what", "more"), ONE.values(), ids=[k.replace(" ", "-") for k in ONE]
)
def test_one_mistake_gives_one_problem_with_its_place(problems, text, line, place, what, more) -> None:
    (found,) = problems(text)
    assert what in found.what
    assert more in found.why + found.hint
    assert found.line == line
    assert found.at.endswith(f"recipe.yaml:{line}, {place}")
    assert not found.what.endswith(".")


def test_all_mistakes_of_a_file_come_at_once_in_its_order(problems) -> None:
    text = (
        "schema: 3\n"
        "modle: {}\n"
        "model: {source: 1}\n"
        "calibrate: {sequences: 0}\n"
        "steps:\n"
        "  - remove: neurons\n"
        "    by: {search: greedy, distanc: js}\n"
        "    budget: {remove: 2, of: kv_bytes}\n"
        "expect: {perplexity_max: 3}\n"
        "schema: 1\n"
    )
    found = problems(text)
    assert [problem.line for problem in found] == [1, 2, 3, 4, 6, 7, 8, 8, 9, 10]


def test_error_of_one_problem_reads_as_the_problem(write) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(GOOD + "modle: {}\n"))
    assert caught.value.what == "unknown key `modle`"
    assert caught.value.hint == "did you mean `model`?"
    assert caught.value.at.endswith("recipe.yaml:7, modle")
    assert caught.value.exit_code == 2


def test_error_of_many_problems_counts_them_and_names_three(write) -> None:
    with pytest.raises(InvalidRecipeError) as caught:
        load_recipe(write(GOOD + "a1: 1\nb2: 1\nc3: 1\nd4: 1\n"))
    assert caught.value.what.startswith("4 problems in ")
    assert "`c3`" in caught.value.why
    assert caught.value.why.endswith("and 1 more")


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("steps.0.budget.remove=2", "must be below 1"),
        ("modle.source=x", "unknown key `modle`"),
        ("steps.0.by.distanc=js", "unknown key `distanc`"),
        ("steps.0.by.distance=zz", "`distance: zz`"),
        ("evaluate.sample.new_tokens=3", "`prompt` is missing"),
    ],
)
def test_mistake_in_an_override_points_to_the_override(problems, expression, words) -> None:
    (found,) = problems(GOOD, [expression])
    assert words in found.what
    assert found.at == f"--set {expression}"


def test_data_in_memory_has_key_paths_without_lines() -> None:
    with pytest.raises(InvalidRecipeError) as caught:
        parse_recipe({"schema": 1, "model": {"source": "m"}, "steps": [{"remove": "blocks"}]}, source="short form")
    assert {p.at for p in caught.value.problems} == {"short form, steps.0.by", "short form, steps.0.budget"}


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "empty"), ("- 1\n", "mapping of keys"), ("just text\n", "mapping of keys"), ("a: [\n", "not YAML")],
)
def test_file_that_is_no_recipe_is_one_problem(problems, text, words) -> None:
    (found,) = problems(text)
    assert words in found.what


def test_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"schema: 1\n\xff\xfe")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "x.yaml")
    assert "not UTF-8" in caught.value.why


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe"):
        load_recipe(tmp_path / "nope.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
