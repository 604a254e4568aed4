"""The model card: README.md of an output folder, with the metadata block the Hugging Face hub reads."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prunekit.report.layer_map import details, summary
from prunekit.report.run import Run, part
from prunekit.report.table import Line, lines, markdown

# Packaged models are copies of hub models; the hub links a card to its base model by this id.
PACKAGED: dict[str, dict[str, Any]] = {
    "smollm2-135m-instruct": {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"},
    "all-minilm-l6-v2": {
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "license": "apache-2.0",
        "pipeline_tag": "sentence-similarity",
    },
}
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
# Tasks of the hub by the auto class that loads a model.
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModel": "feature-extraction",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FORMATS = {
    "gguf": "a file for llama.cpp",
    "genai": "a folder for onnxruntime-genai",
    "deci": "DeciLM `block_configs`, for vLLM with `--trust-remote-code`",
    "masked": "original shapes with zeros; saves nothing, for A/B checks only",
}


@dataclass(frozen=True)
class Score:
    """One measurement of the result for the card's `model-index`.

    Args:
        metric: type of the metric as the hub names it.
        name: the metric with how it was measured.
        value: finite.
        data: name of the text it was measured on.
    """

    metric: str
    name: str
    value: float
    data: str


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Args:
        title: heading of the card.
        source: the model as the recipe names it.
        source_card: metadata of the source's own card (`read_metadata`), {} where it has none.
        auto_class: transformers auto class that loads the folder, e.g. `AutoModelForCausalLM`.
        layout: `stock`, `repacked` or `heterogeneous`.
        loads: where the folder loads: target and how.
        removed: lines that say what went.
        measured: the before/after lines.
        notes: plain sentences below the table, e.g. how perplexity was measured.
        samples: continuation of the same prompt, by model name.
        recipe: the effective recipe as YAML.
        versions: package versions.
        layer_map: file name of the map, "" for none.
        onnx: sub-folder of the ONNX files, "" for none.
        formats: sub-folders of further formats.
        missed: limits of the recipe that the model does not keep, as sentences.
        report: file name of the HTML report, "" for none.
        results: measurements for the card's `model-index`.
        pattern: name of the pattern that the result reads by, "" for none.
    """

    title: str
    source: str
    auto_class: str
    layout: str
    removed: Sequence[str]
    measured: Sequence[Line]
    recipe: str
    versions: Mapping[str, str]
    source_card: Mapping[str, Any] = field(default_factory=dict)
    loads: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    prompt: str = ""
    samples: Mapping[str, str] = field(default_factory=dict)
    layer_map: str = ""
    onnx: str = ""
    formats: Sequence[str] = ()
    missed: Sequence[str] = ()
    report: str = ""
    results: Sequence[Score] = ()
    pattern: str = ""


def card_facts(run: Run, auto_class: str, layer_map: str = "", report: str = "") -> CardFacts:
    """What the card of a run says.

    Args:
        run: the folder's manifest.
        auto_class: transformers auto class that loads the folder.
        layer_map: file name of the map, "" for none.
        report: file name of the HTML report, "" for none.
    """
    rows = run.rows
    missed = [f"`{e.name}: {_short(e.limit)}` got {_short(e.value)}" for e in run.expectations if not e.ok]
    return CardFacts(
        title=run.title,
        source=str(part(run.recipe, "model").get("source") or run.source.name),
        source_card=run.source.card,
        auto_class=auto_class,
        layout=run.layout,
        loads=run.loads,
        removed=[summary(rows), *details(rows)],
        measured=lines(run.before, run.after, run.cut),
        notes=run.notes,
        prompt=run.prompt,
        samples=run.samples,
        recipe=run.recipe_text(),
        versions=run.versions,
        layer_map=layer_map,
        onnx="onnx" if run.onnx else "",
        formats=tuple(name for name in run.exports if name != "onnx"),
        report=report,
        results=_results(run),
        pattern=str(part(run.recipe, "runtime", "attention").get("pattern", "")),
        missed=missed,
    )


def _short(value: Any) -> str:
    return "nothing" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _results(run: Run) -> list[Score]:
    value = run.after.get("perplexity")
    asked = part(run.recipe, "evaluate", "perplexity")
    if value is None or not math.isfinite(value) or not asked:
        return []
    data = Path(str(asked.get("data", ""))).name
    windows = f"{asked.get('sequences')} windows of {asked.get('length_tokens')} tokens"
    return [Score("perplexity", f"Perplexity, {windows}", float(value), data)]


def read_metadata(folder: Path) -> dict[str, Any]:
    """Metadata block of a folder's README.md; {} where there is no card or its block cannot be read."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    if match is None:
        return {}
    try:
        found = yaml.safe_load(match.group(1))
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def read_inherited(folder: Path) -> dict[str, Any]:
    """What a pruned model takes over from its source's card: licence, languages and task, as JSON values."""
    found = read_metadata(folder)
    kept = {key: found[key] for key in _INHERITED if key in found}
    return {k: [str(x) for x in v] if isinstance(v, list) else str(v) for k, v in kept.items()}


def metadata(facts: CardFacts) -> dict[str, Any]:
    """Metadata of the new card; the base model only where it is a hub id, the licence only where the source says it."""
    known = PACKAGED.get(facts.source, {})
    inherited = {key: facts.source_card[key] for key in _INHERITED if key in facts.source_card}
    task = {"pipeline_tag": _TASKS[facts.auto_class]} if facts.auto_class in _TASKS else {}
    block: dict[str, Any] = {"library_name": "transformers", **task, **known, **inherited}
    if "base_model" not in block and _HUB_ID.fullmatch(facts.source) and not Path(facts.source).exists():
        block["base_model"] = facts.source
    tags = ["prunekit", "pruning", "pruned"]
    if facts.layout == "heterogeneous":
        tags.append("custom_code")
    if facts.onnx:
        tags.append("onnx")
    if facts.missed:
        tags.append("not-accepted")
    return {**block, "tags": tags, **_model_index(facts, str(block.get("pipeline_tag", "")))}


def _model_index(facts: CardFacts, task: str) -> dict[str, Any]:
    """The results in the form the hub reads, {} without any or without a task."""
    if not facts.results or not task:
        return {}
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    results = [
        EvalResult(
            task_type=task,
            dataset_type=score.data,
            dataset_name=score.data,
            metric_type=score.metric,
            metric_name=score.name,
            metric_value=score.value,
        )
        for score in facts.results
    ]
    return {"model-index": eval_results_to_model_index(facts.title, results)}


def model_card(facts: CardFacts) -> str:
    """Text of README.md."""
    block = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True).strip()
    base = metadata(facts).get("base_model")
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"`{facts.source}`"
    parts = [f"---\n{block}\n---", f"# {facts.title}", f"{origin}, made smaller by prunekit. {_LAYOUTS[facts.layout]}"]
    if facts.missed:
        parts += ["## Not accepted", "The recipe's limits do not hold for this model:", _bullets(facts.missed)]
    parts += ["## What was removed", _bullets(facts.removed) or "Nothing."]
    if facts.layer_map:
        parts.append(f"![which sub-layers were kept, narrowed or removed]({facts.layer_map})")
    if facts.report:
        parts.append(f"Scores, removal order, samples, checks and provenance: [{facts.report}]({facts.report}).")
    if facts.measured:
        parts += ["## Before and after", markdown(facts.measured)]
        parts += [_bullets(facts.notes)] if facts.notes else []
    if facts.samples:
        parts += ["## Sample", *_samples(facts)]
    parts += ["## Load it", *_loading(facts)]
    parts += ["## How it was made", "Recipe:", _fence("yaml", facts.recipe)]
    parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in facts.versions.items()) + ".")
    return "\n\n".join(parts) + "\n"


_LAYOUTS = {
    "stock": "Every block left is alike, so the stock class loads it: no custom code.",
    "repacked": (
        "The sub-layers left were re-paired into a shorter stack of alike blocks, so the stock class loads it: "
        "no custom code."
    ),
    "heterogeneous": "Its blocks differ from each other, so it needs `import prunekit` or the code in this folder.",
}


def _bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _fence(language: str, text: str) -> str:
    # A fence longer than any run of backticks inside keeps generated text from closing it.
    runs = [len(run) for run in re.findall(r"`{3,}", text)]
    fence = "`" * (max(runs, default=2) + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _samples(facts: CardFacts) -> list[str]:
    parts = [f"Greedy continuation of: {_inline(facts.prompt)}"] if facts.prompt else []
    for name, text in facts.samples.items():
        parts += [f"{name}:", _fence("text", text)]
    return parts


def _inline(text: str) -> str:
    return "`` " + " ".join(text.split()).replace("``", "` `") + " ``"


def _loading(facts: CardFacts) -> list[str]:
    plain = f'from transformers import {facts.auto_class}\n\nmodel = {facts.auto_class}.from_pretrained("PATH")'
    if facts.layout == "heterogeneous":
        shipped = plain.replace('("PATH")', '("PATH", trust_remote_code=True)')
        parts = ["With prunekit installed:", _fence("python", f"import prunekit\n{plain}")]
        parts += ["Without it, through the code in this folder:", _fence("python", shipped)]
    else:
        parts = [_fence("python", plain)]
    if facts.pattern:
        sparse = plain.replace('("PATH")', '("PATH", attn_implementation="prunekit")')
        parts += [f"Reading by the pattern `{facts.pattern}`, with prunekit installed; all else above reads every key:"]
        parts += [_fence("python", f"import prunekit\n{sparse}")]
    if facts.onnx:
        parts.append(f"ONNX files are in `{facts.onnx}/`.")
    parts += [f"`{name}/`: {_FORMATS[name]}." for name in facts.formats if name in _FORMATS]
    if facts.loads:
        parts.append(
            "\n".join(["| loads in | how |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.loads.items())])
        )
    return parts
