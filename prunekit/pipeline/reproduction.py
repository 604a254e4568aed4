"""Makes an output folder again from its manifest, in a temporary place, and compares the two byte for byte."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prunekit.checkpoint.sources import ResolvedSource, resolve
from prunekit.core.errors import CheckpointError, PrunekitError, UsageError
from prunekit.core.files import write_json
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.recipe import parse_recipe
from prunekit.pipeline.carry_out import made_from, replaced_of, write_exports
from prunekit.pipeline.choose import Made, Talk, make_plan, silent
from prunekit.pipeline.healing import healed_in_place, scene_of, work_folder
from prunekit.pipeline.origins import data_digests, derived, source_digests
from prunekit.pipeline.pattern import write_pattern
from prunekit.pipeline.repair import with_repair
from prunekit.pipeline.story import MANIFEST, ONNX, write_recipe
from prunekit.structure.view import ModelView

if TYPE_CHECKING:
    from prunekit.core.recipe_model import Recipe

State = Literal["same", "differs", "missing", "extra"]
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Compared:
    """One file.

    Args:
        name: relative to the folder.
        state: `same`; `differs`; `missing` from the folder; `extra`: in the folder, and the run does not make it.
        detail: where a file differs.
    """

    name: str
    state: State
    detail: str = ""


@dataclass(frozen=True)
class Reproduction:
    """What became of a folder that was made again.

    Args:
        folder: the one looked at.
        files: every file of both, by name.
        versions: packages whose version is another than then: that in the manifest, and that of now.
    """

    folder: Path
    files: tuple[Compared, ...]
    versions: Mapping[str, tuple[str, str]]

    @property
    def same(self) -> bool:
        """Whether every file is the same byte for byte, and none is missing or extra."""
        return all(file.state == "same" for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        versions = {name: {"then": then, "now": now} for name, (then, now) in self.versions.items()}
        files = [asdict(file) for file in self.files]
        return {"folder": str(self.folder), "same": self.same, "files": files, "versions": versions}


def reproduce(
    folder: Path, source: str | None = None, progress: Progress = NULL_PROGRESS, talk: Talk = silent
) -> Reproduction:
    """Rebuilds the output folder of a run from its manifest and compares every file.

    What a run measures (quality, speed, checks in fresh processes, its own duration) is taken from the manifest, not
    measured anew; what the recipe decides (plan, scores, costs, weights, ONNX files, tokenizer) is made again, and
    card, layer map and report are written from both.

    Args:
        folder: output of `prunekit prune`, or of `prunekit heal` on one; only read.
        source: where the model before the cut lies now; None takes the place in the recipe.
        progress: bars.
        talk: told in a line what happens now.
    Raises:
        UsageError: if the folder holds no manifest of a run.
        CheckpointError: if an input is missing or has another digest.
    """
    import torch

    from prunekit.report.folder import versions
    from prunekit.report.run import read_run

    read_run(folder)
    recorded: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
    recipe = parse_recipe(recorded["recipe"], source=str(folder / MANIFEST))
    moved = recipe
    if source is not None:
        model = recipe.model.model_copy(update={"source": source, "revision": None})
        moved = recipe.model_copy(update={"model": model})
    _require_once_healed(recorded)
    _require_inputs(recorded, moved, progress)
    threads = torch.get_num_threads()
    # Sums are split by the number of threads, so that their last bits depend on it.
    torch.set_num_threads(recorded.get("threads") or threads)
    try:
        with tempfile.TemporaryDirectory(prefix="prunekit-reproduce-") as place:
            # Its name is the same, since titles may take it.
            fresh = Path(place) / folder.resolve().name
            fresh.mkdir()
            _rebuild(recorded, recipe, moved, fresh, progress, talk)
            talk("comparing")
            files = tuple(_compared(folder, fresh))
    finally:
        torch.set_num_threads(threads)
    then, now = dict(recorded.get("versions") or {}), versions()
    other = {name: (str(then[name]), now.get(name, "none")) for name in then if now.get(name) != then[name]}
    return Reproduction(folder, files, other)


def _require_once_healed(recorded: Mapping[str, Any]) -> None:
    if (recorded.get("heal") or {}).get("earlier"):
        why = "the manifest holds the recipe of the last healing alone"
        raise UsageError("the folder was healed more than once", why=why, hint="reproduce the folder before it")


def _require_inputs(recorded: Mapping[str, Any], recipe: Recipe, progress: Progress) -> None:
    """Fails where an input is not what it was, naming all of them.

    Raises:
        CheckpointError: with what is missing or has another digest.
    """
    problems: list[str] = []
    try:
        found = resolve(recipe.model.source, recipe.model.revision, progress=progress)
        problems += _source_problems(recorded["source"].get("sha256") or {}, found, progress)
    except PrunekitError as error:
        problems.append(f"`model.source`: {error.what}")
    now = data_digests(recipe)
    for place, then in (recorded.get("inputs") or {}).items():
        digest = (now.get(place) or {}).get("sha256")
        if then["sha256"] is not None and digest is None:
            problems.append(f"`{place}`: `{then['name']}` is missing")
        elif digest != then["sha256"]:
            problems.append(f"`{place}`: `{then['name']}` has {_other(digest, then['sha256'])}")
    if problems:
        raise CheckpointError(
            f"{len(problems)} of the inputs are not what the folder was made from",
            why="\n".join(problems),
            hint="put them back; a model that was moved is given with --model",
        )


def _source_problems(then: Mapping[str, str], found: ResolvedSource, progress: Progress) -> Iterator[str]:
    now = source_digests(ModelView.open(found.folder), progress)
    for name, digest in then.items():
        if name not in now:
            yield f"`model.source`: `{found.folder / name}` is missing"
        elif now[name] != digest:
            yield f"`model.source`: `{found.folder / name}` has {_other(now[name], digest)}"


def _other(now: str | None, then: str | None) -> str:
    return f"the SHA-256 {(now or 'none')[:16]}..., recorded is {(then or 'none')[:16]}..."


def _rebuild(
    recorded: dict[str, Any], recipe: Recipe, moved: Recipe, fresh: Path, progress: Progress, talk: Talk
) -> None:
    """Writes into `fresh` what a run of the recipe writes, figures apart.

    Args:
        recipe: the recorded one.
        moved: the same with the place where its model lies now.
    """
    from prunekit.report.folder import write_report
    from prunekit.surgery import engine

    with tempfile.NamedTemporaryFile("w", suffix=".json") as costs:
        json.dump((recorded.get("latency") or {}).get("costs"), costs)
        costs.flush()
        made = make_plan(_with_costs(moved, costs.name), progress, talk)
    if recipe.repair is not None:
        talk(f"repairing by {recipe.repair.method}")
        made = with_repair(moved, made, progress)
    talk(f"writing a {made.layout.kind} checkpoint")
    engine.apply(made.view, made.plan, fresh, recipe.export.max_shard_bytes, progress, made.layout, replaced_of(made))
    write_pattern(recipe, made, fresh)
    if recipe.heal is not None:
        talk(f"healing by {recipe.heal.method}")
        pairs, origin = made.layout.pairs, made_from(moved, made)
        scene = scene_of(moved, made.view, fresh, pairs, made_from=origin, progress=progress, talk=talk)
        healed_in_place(scene, work_folder(fresh), recipe.export.max_shard_bytes)
    exports = {name: export["file_bytes"] for name, export in write_exports(recipe, made, fresh, progress, talk)}
    write_recipe(recipe, fresh)
    write_json(fresh / MANIFEST, _manifest(recorded, recipe, made, fresh, exports, progress))
    write_report(fresh)


def _with_costs(recipe: Recipe, file: str) -> Recipe:
    """The recipe with latency budgets reckoned by a table instead of by new measurements."""
    steps = [
        step
        if step.budget.latency_ms is None
        else step.model_copy(update={"budget": step.budget.model_copy(update={"costs": file})})
        for step in recipe.steps
    ]
    return recipe.model_copy(update={"steps": tuple(steps)})


def _manifest(
    recorded: dict[str, Any], recipe: Recipe, made: Made, fresh: Path, exports: Mapping[str, int], progress: Progress
) -> dict[str, Any]:
    """The recorded manifest with everything made again that is not measured."""
    source = {**recorded["source"], "sha256": source_digests(made.view, progress)}
    file_bytes = sum(file.stat().st_size for file in fresh.glob("*.safetensors"))
    after = {**recorded["after"], **asdict(made.after), "file_bytes": file_bytes}
    if ONNX in exports:
        after["onnx_bytes"] = exports[ONNX]
    before = {**recorded["before"], **asdict(made.before), "file_bytes": made.view.checkpoint.file_bytes}
    again = {name: {**said, "file_bytes": exports[name]} for name, said in recorded.get("exports", {}).items()}
    known = {key: value for key, value in derived(recipe, made).items() if key in recorded}
    return {**recorded, "source": source, **known, "before": before, "after": after} | (
        {"exports": again} if again else {}
    )


def _compared(folder: Path, fresh: Path) -> Iterator[Compared]:
    there, made = (
        {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir() or path.is_symlink()}
        for root in (folder, fresh)
    )
    for name in sorted(there | made):
        if name not in there:
            yield Compared(name, "missing")
        elif name not in made:
            yield Compared(name, "extra")
        elif (folder / name).is_symlink() or not (folder / name).is_file():
            yield Compared(name, "differs", "it is no plain file")
        else:
            detail = _difference(folder / name, fresh / name)
            yield Compared(name, "differs" if detail else "same", detail)


def _difference(there: Path, made: Path) -> str:
    """Where two files part, "" where they do not."""
    sizes = there.stat().st_size, made.stat().st_size
    place = 0
    with there.open("rb") as left, made.open("rb") as right:
        while True:
            a, b = left.read(_CHUNK), right.read(_CHUNK)
            if a != b:
                place += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                break
            if not a:
                return ""
            place += len(a)
    lengths = f"{sizes[0]:,} bytes" if sizes[0] == sizes[1] else f"{sizes[0]:,} bytes instead of {sizes[1]:,}"
    return f"from byte {place:,} on; {lengths}"
