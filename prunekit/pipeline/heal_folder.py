"""Healing of a folder that was cut earlier, into a new folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prunekit.modeling
from prunekit.checkpoint.sources import resolve
from prunekit.core.errors import ExportError, PrunekitError, UsageError
from prunekit.core.files import atomic_folder, require_free_folder, write_json
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.ranks import is_first_rank
from prunekit.core.recipe import Recipe, parse_recipe
from prunekit.heal.run import Healed, heal
from prunekit.heal.scene import Scene, require_same_vocabulary
from prunekit.modeling.load import load_tokenizer
from prunekit.pipeline.choose import Talk, silent
from prunekit.pipeline.healing import check_healing, notes_of, reference_of, scene_of, work_folder
from prunekit.pipeline.inputs import check_evaluation, tokenizer_for
from prunekit.pipeline.measure import Measurer, sections_of, subject_of, tasks_of
from prunekit.pipeline.origins import data_digests
from prunekit.pipeline.story import MANIFEST, write_recipe
from prunekit.plan.layout import Pair, choose_layout
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery.config import without_predictors
from prunekit.surgery.engine import MODELING_FILE
from prunekit.surgery.sidecar import model_files, write_model_files

ABOUT = "heal.json"
# A recipe needs a step; a folder without a manifest does not say which there were.
_SOME_STEP = {"remove": "blocks", "by": {"score": "last_k"}, "budget": {"units": 1}}
_ONNX = ("onnx_max_abs_diff", "onnx_bytes_max")


@dataclass(frozen=True)
class HealedFolder:
    """What a healing did.

    Args:
        output: the folder written.
        before: measurements of the dense model.
        cut: of the folder as it was.
        after: of the folder written.
        heal: what the healing says about itself.
        verified: the checks in fresh processes, plain values.
    """

    output: Path
    before: Mapping[str, Any]
    cut: Mapping[str, Any]
    after: Mapping[str, Any]
    heal: Mapping[str, Any]
    verified: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        sides = {"before": dict(self.before), "cut": dict(self.cut), "after": dict(self.after)}
        return {"output": str(self.output), **sides, "heal": dict(self.heal), "verified": dict(self.verified)}


def heal_recipe(folder: Path, teacher: str | None, asked: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a folder's manifest with healing added; what can be known without one where it has none.

    Args:
        folder: was cut earlier.
        teacher: the dense model; None takes the manifest's source.
        asked: the mapping below `heal`.
        overrides: `--set` expressions.
    Raises:
        RecipeError: with all problems.
        UsageError: if nobody knows the dense model.
    """
    data: dict[str, Any] = dict((_manifest(folder) or {}).get("recipe") or {})
    if not data:
        source = str(folder) if teacher is None and asked.get("method") == "finetune" else teacher
        if source is None:
            why = f"`{folder}` holds no `{MANIFEST}` that names it"
            raise UsageError("which model was cut is not known", why=why, hint="give --teacher MODEL")
        data = {"schema": 1, "model": {"source": source}, "steps": [_SOME_STEP]}
    elif teacher is not None:
        data["model"] = {**data["model"], "source": teacher}
        data["model"].pop("revision", None)
    data["heal"] = dict(asked)
    # The ONNX files of the cut model are not those of the healed one.
    data["export"] = {**(data.get("export") or {}), "formats": ["safetensors"]}
    data["expect"] = {key: value for key, value in (data.get("expect") or {}).items() if key not in _ONNX}
    return parse_recipe(data, overrides, str(folder))


def heal_folder(
    folder: Path,
    recipe: Recipe,
    output: Path,
    overwrite: bool = False,
    progress: Progress = NULL_PROGRESS,
    talk: Talk = silent,
) -> HealedFolder | None:
    """Trains the model of a folder and writes another folder; the first is only read.

    Args:
        folder: was cut earlier.
        recipe: as from `heal_recipe`; its model is the teacher.
        output: folder to write; appears whole or not at all.
        overwrite: replace a model folder that is there.
        progress: bars.
        talk: told in a line what happens now.
    Returns:
        None in all processes of a group but the first, which writes.
    Raises:
        PrunekitError: of the kind that fits; a training that was stopped lies in a folder beside the output.
    """
    from prunekit.evaluate.run import check

    require_free_folder(output, overwrite)
    if output.exists() and output.resolve() == folder.resolve():
        raise UsageError(f"`{output}` is the folder itself", hint="give another folder")
    student = ModelView.open(folder)
    dense = ModelView.open(resolve(recipe.model.source, recipe.model.revision, progress=progress).folder)
    check_healing(student, recipe)
    check_evaluation(student, recipe)
    tokenizer = tokenizer_for(dense, recipe)
    subject = subject_of(recipe, dense, tokenizer)
    check([(subject, sections_of(recipe)), (subject, tasks_of(recipe))])
    require_same_vocabulary(student.config, dense.config, load_tokenizer(folder), tokenizer)
    pairs = _pairs(folder, dense)
    if not is_first_rank():
        heal(scene_of(recipe, dense, folder, pairs), work_folder(output))
        return None
    scene = scene_of(recipe, dense, folder, pairs, progress=progress, talk=talk)
    healed = heal(scene, work_folder(output))
    with atomic_folder(output, overwrite) as fresh:
        result = _finish(recipe, dense, scene, healed, output, fresh)
    shutil.rmtree(work_folder(output), ignore_errors=True)
    return result


def _finish(recipe: Recipe, dense: ModelView, scene: Scene, healed: Healed, output: Path, fresh: Path) -> HealedFolder:
    """Writes, measures and verifies the folder."""
    from prunekit.export.verify import verify

    folder = scene.student
    changed = healed.write(fresh, recipe.export.max_shard_bytes, scene.progress)
    write_model_files(folder, model_files(folder), fresh)
    shutil.copyfile(folder / "config.json", fresh / "config.json")
    config = json.loads((fresh / "config.json").read_text("utf-8"))
    if without_predictors(config) != config:
        write_json(fresh / "config.json", without_predictors(config))
    if (folder / MODELING_FILE).is_file():
        shutil.copyfile(Path(prunekit.modeling.__path__[0]) / MODELING_FILE, fresh / MODELING_FILE)
    reference = reference_of(healed, fresh)
    scene.talk("measuring")
    before, cut, after = _measured(recipe, dense, scene, fresh)
    scene.talk("loading the result in fresh processes")
    verified = verify(fresh, reference, progress=scene.progress)
    if not verified.ok:
        raise ExportError("the result does not compute what it should", why="; ".join(verified.problems))
    about = {**healed.about, "changed_tensors": changed}
    result = HealedFolder(output, before, cut, after, about, verified.to_json())
    _write_story(recipe, folder, fresh, result)
    return result


def _measured(
    recipe: Recipe, dense: ModelView, scene: Scene, fresh: Path
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Dense, cut and healed; the first two from the manifest where the folder has one."""
    measurer = Measurer(recipe, dense, scene.tokenizer, scene.progress)
    model = measurer.load(dense.checkpoint.folder)
    manifest = _manifest(scene.student)
    if manifest is not None:
        before, cut = manifest["before"], manifest.get("cut") or manifest["after"]
    else:
        before = measurer.measure(model, model)
        cut = measurer.measure(measurer.load(scene.student), model)
    after = {key: value for key, value in (manifest or {}).get("after", {}).items() if not key.startswith("onnx_")}
    return dict(before), dict(cut), {**after, **measurer.measure(measurer.load(fresh), model)}


def _write_story(recipe: Recipe, folder: Path, fresh: Path, result: HealedFolder) -> None:
    """The folder's manifest, recipe, card and report brought up to date; without a manifest one file of figures."""
    from torch import get_num_threads

    from prunekit.report.folder import versions, write_report

    manifest, found = _manifest(folder), result.to_json()
    if manifest is None:
        write_json(fresh / ABOUT, {key: value for key, value in found.items() if key != "output"})
        return
    effective = recipe.effective()
    write_recipe(recipe, fresh)
    manifest |= {key: found[key] for key in ("before", "cut", "after", "verified")}
    earlier = {"earlier": manifest["heal"]} if "heal" in manifest else {}
    manifest |= {
        "versions": versions(),
        "recipe": effective,
        "inputs": data_digests(recipe),
        "threads": get_num_threads(),
        "heal": {**result.heal, **earlier},
        "expectations": recipe.expect.judge(result.after),
        "notes": [*manifest.get("notes", ()), *notes_of(result.heal)],
    }
    write_json(fresh / MANIFEST, manifest)
    write_report(fresh)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `prunekit prune`, None where there is none.

    Raises:
        UsageError: if it is none.
    """
    from prunekit.report.run import read_run

    if not (folder / MANIFEST).is_file():
        return None
    read_run(folder)
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
    return found


def _pairs(folder: Path, dense: ModelView) -> tuple[Pair, ...] | None:
    """Source blocks of the folder's blocks, None where its plan is not known or is not of this dense model."""
    manifest = _manifest(folder)
    if manifest is None:
        return None
    try:
        plan = Plan.from_json(manifest["plan"])
        plan.check(dense)
        wanted = "heterogeneous" if manifest["layout"] == "heterogeneous" else "auto"
        return choose_layout(dense, plan, wanted).pairs
    except (PrunekitError, ValueError, KeyError, TypeError):
        return None
