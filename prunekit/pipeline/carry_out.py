"""The main job: plan, cut, heal, measure, export, verify, report; the output folder appears whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import ExportError
from prunekit.core.files import atomic_folder, require_free_folder
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.ranks import is_first_rank, require_one_process
from prunekit.pipeline import learning
from prunekit.pipeline.choose import Made, Talk, make_plan, silent
from prunekit.pipeline.costs import onnx_device, pass_times
from prunekit.pipeline.healing import (
    REFERENCE_PARAMS,
    check_healing,
    healed_in_place,
    scene_of,
    work_folder,
)
from prunekit.pipeline.inputs import check_evaluation, device_of, tokenizer_for
from prunekit.pipeline.measure import Measurer, kl_windows, sections_of, subject_of, tasks_of
from prunekit.pipeline.pattern import check_pattern, under_pattern, write_pattern
from prunekit.pipeline.repair import as_stored, put_into, repair_inputs, with_repair
from prunekit.pipeline.story import ONNX, write_story
from prunekit.plan.loads import loads
from prunekit.plan.plan import VOCAB

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.core.recipe_model import Recipe
    from prunekit.export.verify import Reference, VerifyReport
    from prunekit.plan.plan import Plan
    from prunekit.structure.view import ModelView


# Said beside where the result loads.
DYNAMIC = {
    "chosen units": "yes: dynamic: shapes unchanged, no parameter saved; `prunekit.modeling.dynamic` computes the "
    "chosen units of one sequence at a time, every other loader the dense model"
}


@dataclass(frozen=True)
class Result:
    """What a run did.

    Args:
        output: the folder written.
        made: the plan and what it was made from.
        before: measurements of the model before the cut.
        after: the same for the result.
        cut: the same between cut and healing; empty where nothing was healed.
        latency: a latency budget's target, what was predicted and what the written result took; empty without one.
        heal: what the healing says about itself; empty without one.
        expectations: each limit of `expect` with its value and whether it holds; where one does not, the manifest and
            the model card say so.
        verified: the checks in fresh processes.
        seconds: of the parts of the run.
        exports: what each format besides safetensors says of itself, by its name.
    """

    output: Path
    made: Made
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    expectations: list[dict[str, Any]]
    verified: VerifyReport
    seconds: Mapping[str, float] = field(default_factory=dict)
    cut: Mapping[str, Any] = field(default_factory=dict)
    heal: Mapping[str, Any] = field(default_factory=dict)
    latency: Mapping[str, Any] = field(default_factory=dict)
    exports: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        from prunekit.report.layer_map import layer_map

        made = self.made
        return {
            "output": str(self.output),
            "layout": made.layout.kind,
            "loads": {**loads(made.view, made.plan, made.layout), **(DYNAMIC if made.predictors else {})},
            "before": dict(self.before),
            **({"cut": dict(self.cut), "heal": dict(self.heal)} if self.heal else {}),
            "after": dict(self.after),
            **({"latency": dict(self.latency)} if self.latency else {}),
            **({"exports": dict(self.exports)} if self.exports else {}),
            "expectations": self.expectations,
            "verified": self.verified.to_json(),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "layer_map": [row.to_json() for row in layer_map(made.view, made.plan)],
        }


def run(
    recipe: Recipe, output: Path, overwrite: bool = False, progress: Progress = NULL_PROGRESS, talk: Talk = silent
) -> Result | None:
    """Carries out a recipe.

    Args:
        recipe: all of it.
        output: folder to write: the checkpoint at its top, `onnx/`, `prunekit.json`, the model card, the
            layer map, `report.html`.
        overwrite: replace a model folder that is there.
        progress: bars.
        talk: told in a line what happens now.
    Returns:
        None in all processes of a group but the first: they choose with it, and it does the rest.
    Raises:
        PrunekitError: of the kind that fits; nothing is left behind then. A missed expectation is no exception.
    """
    clock = Clock()
    _check_first(recipe, output, overwrite)
    made = make_plan(recipe, progress, talk, learning.work_folder(output))
    clock.lap("plan")
    if not is_first_rank():
        return None
    _require_formats(recipe, made.view, made.plan)
    check_evaluation(made.view, recipe)
    if recipe.repair is not None:
        talk(f"repairing by {recipe.repair.method}")
        made = with_repair(recipe, made, progress)
        clock.lap("repair")
    with atomic_folder(output, overwrite) as folder:
        result = _finish(recipe, made, output, folder, progress, talk, clock)
    for folder in (work_folder(output), learning.work_folder(output)):
        shutil.rmtree(folder, ignore_errors=True)
    return result


class Clock:
    """Seconds of the stages of a run, by name, in `seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends a stage: its time goes from the end of the one before."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def _check_first(recipe: Recipe, output: Path, overwrite: bool) -> None:
    """Everything that would end the run later and can be known now."""
    from prunekit.checkpoint.sources import resolve
    from prunekit.evaluate.run import check
    from prunekit.structure.view import ModelView

    if recipe.heal is not None:
        require_one_process("heal")
    require_free_folder(output, overwrite)
    device_of(recipe)
    view = ModelView.open(resolve(recipe.model.source, recipe.model.revision).folder)
    if output.exists() and output.resolve() == view.checkpoint.folder.resolve():
        raise ExportError(f"`{output}` is the model itself", hint="give another folder")
    _require_formats(recipe, view, None)
    check_evaluation(view, recipe)
    check_pattern(view, recipe)
    check_healing(view, recipe)
    learning.check_learning(view, recipe)
    tokenizer = tokenizer_for(view, recipe) if _needs_tokenizer(recipe) else None
    repair_inputs(recipe, view)
    subject = subject_of(recipe, view, tokenizer)
    check([(subject, sections_of(recipe)), (subject, tasks_of(recipe))])
    if recipe.evaluate.kl is not None:
        kl_windows(subject, recipe.evaluate.kl)


def _require_formats(recipe: Recipe, view: ModelView, plan: Plan | None) -> None:
    from prunekit.export.targets import TARGETS

    for name in recipe.export.formats:
        if name in TARGETS:
            TARGETS[name].require(view, plan)


def _needs_tokenizer(recipe: Recipe) -> bool:
    asked = recipe.evaluate
    parts = (asked.perplexity, asked.kl, asked.embedding, asked.sample, asked.tasks, recipe.learn, recipe.heal)
    return any(part is not None for part in parts)


def _finish(
    recipe: Recipe, made: Made, output: Path, folder: Path, progress: Progress, talk: Talk, clock: Clock
) -> Result:
    """Cuts into `folder`, then measures, exports, verifies and reports."""
    from prunekit.surgery import engine

    talk(f"writing a {made.layout.kind} checkpoint")
    engine.apply(made.view, made.plan, folder, recipe.export.max_shard_bytes, progress, made.layout, replaced_of(made))
    write_pattern(recipe, made, folder)
    if made.predictors:
        from prunekit.modeling.dynamic import write_predictors

        write_predictors(
            folder, made.predictors, {"method": made.learn["method"], "tokens": made.learn["tokens_first"]}
        )
    clock.lap("cut")
    talk("measuring before and after")
    tokenizer = tokenizer_for(made.view, recipe) if _needs_tokenizer(recipe) else None
    measurer = Measurer(recipe, made.view, tokenizer, progress)
    dense = measurer.load(made.view.checkpoint.folder)
    before, after = _measured(measurer, made, dense, folder)
    latency = dict(made.latency)
    if latency.get("on") == "torch":
        # Healing changes no shape, and the dense model is at hand now.
        latency |= pass_times(latency, measurer.load(folder), dense)
    clock.lap("measure")
    cut: dict[str, Any] = {}
    about: Mapping[str, Any] = {}
    if recipe.heal is not None:
        talk(f"healing by {recipe.heal.method}")
        scene = scene_of(recipe, made.view, folder, made.layout.pairs, dense, made_from(recipe, made), progress, talk)
        reference, about = healed_in_place(scene, work_folder(output), recipe.export.max_shard_bytes)
        clock.lap("heal")
        cut, after = after, {**after, **_again(measurer, dense, folder)}
        clock.lap("measure again")
    else:
        reference = _masked_reference(made, dense, folder)
    exports = {}
    for name, export in write_exports(recipe, made, folder, progress, talk):
        exports[name] = export
        clock.lap(name)
    if ONNX in exports:
        after |= {"onnx_bytes": exports[ONNX]["file_bytes"], "onnx_max_abs_diff": exports[ONNX]["max_abs_diff"]}
    if latency.get("on") == "onnxruntime":
        latency |= _onnx_times(recipe, made, latency, folder / ONNX, progress, talk)
        clock.lap("latency")
    if latency:
        before["latency_ms"], after["latency_ms"] = latency.get("dense_measured_ms"), latency["measured_ms"]
    talk("loading the result in fresh processes")
    verified = _verified(folder, reference, progress)
    clock.lap("verify")
    after["loads_stock"] = made.layout.kind != "heterogeneous"
    result = Result(
        output,
        made,
        before,
        after,
        recipe.expect.judge(after),
        verified,
        clock.seconds,
        cut=cut,
        heal=about,
        latency=latency,
        exports=exports,
    )
    write_story(recipe, folder, result, progress)
    return result


def replaced_of(made: Made) -> Mapping[str, Tensor]:
    """Tensors that a repair or learned masks put in the place of the source's, by name."""
    # A repair fits the matrices anew that factors were folded into.
    return as_stored(made.view, made.repaired) if made.repair else made.learned


def write_exports(
    recipe: Recipe, made: Made, folder: Path, progress: Progress, talk: Talk
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Writes every format besides safetensors, each into a folder of its name: the name, and what it says of itself."""
    from prunekit.export.masked import Cut
    from prunekit.export.targets import TARGETS, Options

    for name in (name for name in recipe.export.formats if name in TARGETS):
        talk(f"exporting to {name}")
        cut = Cut(made.view, made.plan, made.layout, folder)
        options = Options(recipe.export.gguf_type, None, cut, recipe.export.max_shard_bytes)
        yield name, TARGETS[name].write(folder, folder / name, options, progress).to_json()


def _onnx_times(
    recipe: Recipe, made: Made, latency: Mapping[str, Any], graph: Path, progress: Progress, talk: Talk
) -> dict[str, float]:
    """What one pass of the exported result takes, beside the dense model's where that is small enough to export."""
    from prunekit.evaluate.onnx import OnnxModel
    from prunekit.export.onnx import export_onnx

    device = onnx_device(device_of(recipe))
    with tempfile.TemporaryDirectory(prefix="prunekit-dense-") as folder:
        dense = None
        if made.before.params <= REFERENCE_PARAMS:
            talk("exporting the dense model, to be measured beside the result")
            export_onnx(made.view.checkpoint.folder, Path(folder) / ONNX, progress)
            dense = OnnxModel(Path(folder) / ONNX, device)
        talk("measuring one pass in ONNX Runtime")
        return pass_times(latency, OnnxModel(graph, device), dense)


def _measured(measurer: Measurer, made: Made, dense: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measurements of the dense model and of the cut one."""
    from prunekit.modeling.load import load_tokenizer

    before = {**asdict(made.before), "file_bytes": made.view.checkpoint.file_bytes, **measurer.measure(dense, dense)}
    if VOCAB in made.plan.keep and measurer.tokenizer is not None:
        # The result numbers its tokens anew.
        measurer = replace(measurer, tokenizer=load_tokenizer(folder, measurer.recipe.model.trust_remote_code))
    return before, {**asdict(made.after), **_again(measurer, dense, folder)}


def made_from(recipe: Recipe, made: Made) -> str:
    """What the cut model was made from, besides the source."""
    effective = recipe.effective()
    parts = [effective.get(part) for part in ("repair", "learn")]
    return json.dumps([made.plan.to_json(), made.layout.kind, *(part for part in parts if part)], sort_keys=True)


def _again(measurer: Measurer, dense: Any, folder: Path) -> dict[str, Any]:
    """What can only be known of the folder as it is."""
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    from prunekit.modeling.dynamic import dynamic

    loaded = measurer.load(folder)
    if measurer.recipe.runtime is not None:
        under_pattern(loaded)
    with dynamic(loaded, folder) as model:
        return {"file_bytes": file_bytes, **measurer.measure(model, dense)}


def _masked_reference(made: Made, dense: Any, folder: Path) -> Reference | None:
    """Outputs of the dense model with the removed sub-layers passed over, repaired; None if it narrows or is too large.

    Args:
        dense: changed on the way; not to be used afterwards.
    """
    from prunekit.export.verify import make_reference
    from prunekit.modeling.load import load_tokenizer, to_float64
    from prunekit.modeling.modeling_prunekit import block_at, skip

    if made.plan.keep or made.learned or made.before.params > REFERENCE_PARAMS:
        return None
    dense = to_float64(dense)
    put_into(dense, made.view, made.repaired)
    for address in made.plan.drop:
        block, _, kind = address.rpartition(".")
        skip(block_at(dense, block), kind)
    name = "the dense model without what was removed" + ", repaired" * bool(made.repaired)
    return make_reference(dense, load_tokenizer(folder), name)


def _verified(folder: Path, reference: Reference | None, progress: Progress) -> VerifyReport:
    """The checks in fresh processes.

    Raises:
        ExportError: if one fails.
    """
    from prunekit.export.verify import verify

    report = verify(folder, reference, progress=progress)
    if not report.ok:
        raise ExportError(
            "the result does not compute what it should",
            why="; ".join(report.problems),
            hint="report this with the recipe and the versions of torch and transformers",
        )
    return report
