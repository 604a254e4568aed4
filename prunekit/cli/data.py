"""`prunekit data`: which training examples stay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output
from prunekit.core.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from prunekit.datasets.rules import Rule

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

_RULES = ("hard", "easy", "auto")
# Unreadable images that are named; the manifest names all.
_LISTED = 10
Scores = Annotated[Path, typer.Argument(help="Parquet file that `prunekit data score` wrote.", metavar="SCORES")]
OneMetric = Annotated[str | None, typer.Option("--metric", help="Whose scores, where the file holds several.")]
Keep = Annotated[float | None, typer.Option(help="Fraction of the examples that stays.")]
RuleOption = Annotated[
    str, typer.Option(help="hard keeps the highest scores, easy the lowest, auto decides and says why.")
]
ClassFloor = Annotated[float, typer.Option(help="Share of its proportional part that each class keeps at least.")]
Seed = Annotated[int, typer.Option(help="Of random numbers, the first trained model and k-means.", min=0)]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where models run.")]


@app.callback()
def data() -> None:
    """Score training examples, select which stay, report on them."""


@app.command()
def score(
    dataset: Annotated[
        Path,
        typer.Argument(
            help="save_to_disk folder, Parquet, .jsonl, .csv, image folder or zip of one, .txt.", metavar="DATASET"
        ),
    ],
    metric: Annotated[list[str], typer.Option(help="`prunekit methods list` shows them; may be repeated.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder, hub id, GGUF file or packaged model's name [all-minilm-l6-v2; dinov2-small-focus for images]."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Parquet file to write [NAME.scores.parquet].")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the text [text, sentence or content].")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the class [label or labels].")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the image [image or img].")] = None,
    pieces: Annotated[
        Literal["paragraphs", "lines", "windows"], typer.Option(help="What an example of a .txt file is.")
    ] = "paragraphs",
    window_words: Annotated[int, typer.Option(help="Words of a window.", min=1)] = 200,
    max_tokens: Annotated[int, typer.Option(help="Longer texts are cut before a model reads them.", min=2)] = 256,
    train: Annotated[
        Literal["head", "model"],
        typer.Option(help="What trained metrics train: a head on embeddings, or the whole model."),
    ] = "head",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Knob as name=value, or metric.name=value with several metrics; may be repeated."),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    memory_mib: Annotated[int, typer.Option(help="Bound on embeddings held in memory at once.", min=1)] = 1024,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave images out that cannot be read.")] = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Score the examples of a data set; higher means keep (hard). Under torchrun the ranks share the work."""
    from prunekit.cli._files import require_free
    from prunekit.datasets.examples import Settings
    from prunekit.datasets.score import Request, manifest_file, write_scores
    from prunekit.datasets.source import Reading

    target = output or Path(f"{dataset.name.split('.')[0]}.scores.parquet")
    if target.suffix != ".parquet":
        raise UsageError(f"`{target}` must end in .parquet")
    for file in (target, manifest_file(target)):
        require_free(file, overwrite)
    reading = Reading(text_column, label_column, image_column, pieces, window_words, skip_bad)
    settings = Settings(seed, train, device, memory_mib)
    request = Request(dataset, knobs_of(metric, set_ or []), model, max_tokens, reading, settings)
    out = Output(json=json, quiet=quiet or not _first_rank())
    with out.progress() as progress:
        manifest = write_scores(request, target, progress)
    if _first_rank():
        if skipped := manifest["data"]["skipped"]:
            n = len(skipped) + manifest["data"]["examples"]
            head = f"left out, since they cannot be read: {len(skipped)} of {n} images"
            out.talk("\n  ".join([head, *skipped[:_LISTED]]))
        out.result(_score_table(manifest), {**manifest, "output": str(target)})
        out.written(target)


def _first_rank() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def knobs_of(metrics: list[str], expressions: list[str]) -> dict[str, dict[str, Any]]:
    """Knobs of each metric from `name=value`, which all take, and `metric.name=value`."""
    from prunekit.cli.score import knobs

    found: dict[str, dict[str, Any]] = {name: {} for name in metrics}
    for key, value in knobs(expressions).items():
        owner, dot, name = key.partition(".")
        if dot and owner not in found:
            raise UsageError(
                f"`--set {key}` is of a metric that is not asked for", hint=f"asked for: {', '.join(metrics)}"
            )
        for target in [owner] if dot else metrics:
            found[target][name if dot else key] = value
    return found


def _score_table(manifest: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("metric (higher = keep)")
    for head in ("examples", "lowest", "highest"):
        table.add_column(head, justify="right")
    for name, (low, high) in manifest["ranges"].items():
        table.add_row(name, f"{manifest['data']['examples']:,}", f"{low:.4g}", f"{high:.4g}")
    return table


@app.command()
def select(
    scores: Scores,
    keep: Keep = None,
    examples: Annotated[int | None, typer.Option(help="How many examples stay, instead of a fraction.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that stay; needs scores of `length` too.")] = None,
    rule: RuleOption = "auto",
    class_floor: ClassFloor = 0.5,
    near_duplicates: Annotated[
        float | None, typer.Option(help="Cosine above which, of two examples, only the better one stays.")
    ] = None,
    metric: OneMetric = None,
    of: Annotated[Path | None, typer.Option("--data", help="Data set that the scores must be of.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File or folder to write [NAME-selected, in the input's format]."),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Keep a part of a scored data set, and write it in the format that the data set came in."""
    from prunekit.cli._files import require_free
    from prunekit.core.files import require_free_folder
    from prunekit.datasets import select as work
    from prunekit.datasets.examples import Settings
    from prunekit.datasets.writers import ENDINGS, FOLDERS, format_of

    wanted = _rule(keep, examples, tokens, rule, class_floor, seed)
    file = work.open_scores(scores, metric, of)
    facts = file.manifest["data"]
    target = output or Path(f"{Path(facts['path']).name.split('.')[0]}-selected{ENDINGS[facts['format']]}")
    form = format_of(target, facts)
    if not dry_run:
        require_free_folder(target, overwrite=False) if form in FOLDERS else require_free(target, overwrite)
    out = Output(json=json, quiet=quiet)
    with out.progress() as progress:
        settings = Settings(seed=seed, device=device)
        chosen = work.select(file, wanted, near_duplicates, settings, progress)
    data: dict[str, Any] = {**chosen.to_json(), "output": None if dry_run else str(target)}
    if not dry_run:
        work.write_selected(file, chosen, wanted, target)
    out.result(_selection_table(chosen.to_json(), facts["examples"]), data)
    if not dry_run:
        out.written(target)


def _rule(
    keep: float | None, examples: int | None, tokens: int | None, rule: str, class_floor: float, seed: int
) -> Rule:
    from prunekit.core.recipe_problems import near
    from prunekit.datasets.rules import Rule

    if rule not in _RULES:
        raise UsageError(f"no rule `{rule}`", hint=near(rule, _RULES) or f"rules: {', '.join(_RULES)}")
    return Rule(keep, examples, tokens, rule, class_floor, seed)  # type: ignore[arg-type]


def _selection_table(data: dict[str, Any], examples: int) -> Table:
    from rich.table import Table

    table = Table("", "", box=None, pad_edge=False, show_header=False)
    table.add_row("kept", f"{data['kept']:,} of {examples:,}")
    table.add_row("rule", f"{data['rule']} ({data['why']})")
    if data["duplicates"]:
        table.add_row("near duplicates", f"{data['duplicates']:,} went")
    if data["tokens"] is not None:
        table.add_row("tokens", f"{data['tokens']:,}")
    for name, n in data["before"].items():
        table.add_row(f"class {name}", f"{data['after'][name]:,} of {n:,}")
    return table


@app.command()
def report(
    scores: Scores,
    keep: Keep = 0.5,
    rule: RuleOption = "auto",
    class_floor: ClassFloor = 0.5,
    metric: OneMetric = None,
    shown: Annotated[int, typer.Option(help="Examples from each end.", min=1, max=500)] = 12,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file to write [SCORES.html].")] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write one HTML page: hardest and easiest examples, histogram of scores, classes before and after."""
    from prunekit.cli._files import require_free
    from prunekit.core.files import write_text
    from prunekit.datasets.report import html_report
    from prunekit.datasets.select import open_scores

    wanted = _rule(keep, None, None, rule, class_floor, 0)
    file = open_scores(scores, metric)
    target = output or scores.with_suffix(".html")
    require_free(target, overwrite)
    out = Output(json=json, quiet=quiet)
    with out.progress() as progress:
        page, chosen = html_report(file, wanted, shown, progress)
    write_text(target, page)
    data = {**chosen.to_json(), "output": str(target)}
    out.result(_selection_table(data, file.manifest["data"]["examples"]), data)
    out.written(target)
