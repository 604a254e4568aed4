"""Cost tables: milliseconds of sub-layers by width, measured by running small cut models of the same shapes."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import PlanError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.pipeline.inputs import dtype_of
from prunekit.plan.costs import AXES, VERSION, CostTable, model_of, read_costs
from prunekit.plan.layout import choose_layout
from prunekit.plan.plan import Plan
from prunekit.structure.parts import WIDTHS

if TYPE_CHECKING:
    from prunekit.core.recipe_model import Recipe
    from prunekit.plan.costs import Runtime
    from prunekit.structure.parts import SubLayer
    from prunekit.structure.view import ModelView

Talk = Callable[[str], None]
# Weights of the blocks that are run, so that they come from memory as a whole model's do.
_BLOCK_BYTES = 512 * 2**20
# Each model run in ONNX Runtime is exported first, which takes seconds a block.
_ONNX_BLOCKS = 4
_WIDTHS_MEASURED = 4
# Passes go on until their median is known this well, by its standard error, or took so long, or are so many.
_KNOWN = 0.004
_LEAST_SECONDS = 2.0
_MOST_SECONDS = 12.0
_MOST_PASSES = 200
# Tables measured in another way are not read back.
_WAY = 2


@dataclass(frozen=True)
class Pass:
    """What a cost table is about.

    Args:
        on: `torch` or `onnxruntime`.
        batch: sequences.
        tokens: in each; images have their own.
        device: where torch runs, such as `cuda`; ONNX Runtime too where it can.
        dtype: of the weights in torch.
        repeats: passes of each model at least.
        widths: width kinds that are measured besides whole sub-layers.
        blocks: that are run; None takes as many as hold 512 MiB of weights, four at most in ONNX Runtime.
    """

    on: Runtime = "torch"
    batch: int = 1
    tokens: int = 128
    device: str = "cpu"
    dtype: str = "float32"
    repeats: int = 10
    widths: tuple[str, ...] = ("kv_groups", "neurons")
    blocks: int | None = None


def costs_of(recipe: Recipe, view: ModelView, device: str, progress: Progress, talk: Talk) -> CostTable | None:
    """The cost table that a recipe's latency budgets are reckoned by; None where it has none.

    Raises:
        UsageError: if the table that it names is of another model or another pass.
    """
    budgets = [(step, step.budget) for step in recipe.steps if step.budget.latency_ms is not None]
    if not budgets:
        return None
    wanted = {step.remove for step, _ in budgets} & set(WIDTHS)
    budget = budgets[0][1]
    asked = Pass(
        on=budget.on or "torch",
        batch=budget.batch or 1,
        tokens=budget.tokens or 128,
        device=device,
        dtype=dtype_of(recipe, view, device),
        widths=tuple(sorted(wanted)),
    )
    if budget.costs is None:
        return cached_costs(view, asked, progress, talk)
    table = read_costs(Path(budget.costs).expanduser())
    table.require(view, asked.on, asked.batch, asked.tokens, budget.costs)
    here = environment(asked)
    other = [name for name, value in here.items() if table.environment.get(name) != value]
    if other:
        talk(f"the cost table `{budget.costs}` was measured with another {', '.join(other)}")
    return table


def cached_costs(
    view: ModelView,
    asked: Pass,
    progress: Progress = NULL_PROGRESS,
    talk: Talk = lambda text: None,
    fresh: bool = False,
) -> CostTable:
    """The cost table of a model, measured once for its shapes, the pass, the machine and the versions.

    Args:
        view: the model.
        asked: the pass.
        progress: bars.
        talk: told in a line what happens now.
        fresh: measure again.
    """
    from prunekit.checkpoint.cache import cache_folder
    from prunekit.core.files import write_json
    from prunekit.evaluate.task import digest

    key = [VERSION, _WAY, model_of(view), len(view.blocks), asked.__dict__, environment(asked)]
    file = cache_folder() / "costs" / f"{view.model_type}-{asked.on}-{digest(key)[:32]}.json"
    if not fresh:
        with suppress(OSError, ValueError):
            table = CostTable.from_json(json.loads(file.read_text("utf-8")))
            talk(f"costs of sub-layers were measured before: {file}")
            return table
    talk(f"measuring what sub-layers cost in {asked.on}, {asked.batch} x {asked.tokens} tokens")
    table = measure_costs(view, asked, progress)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, table.to_json())
    return table


def measure_costs(view: ModelView, asked: Pass, progress: Progress = NULL_PROGRESS) -> CostTable:
    """Runs a few of the model's blocks whole, without their attentions, without their FFNs, and with narrower ones.

    A sub-layer costs what the pass takes less without it, divided by how many went. Each cut model takes turns with the
    whole one, and what counts is the median over the turns of its share of the whole one's time: a machine that slows
    down slows both, and a pass that something else interrupted is one of many.

    Args:
        view: the model.
        asked: the pass.
        progress: shown as models.
    Raises:
        PlanError: if fewer than two blocks are alike.
        ExportError: if ONNX Runtime is asked for and cannot run the model.
    """
    model, chosen = model_of(view), _chosen(view, asked)
    tables: dict[str, dict[int, float]] = {kind: {} for kind in AXES}
    probes = _probes(view, chosen, asked.widths)
    with (
        tempfile.TemporaryDirectory(prefix="prunekit-costs-") as folder,
        progress.task("measuring costs", total=len(probes) + 1, unit="models") as task,
    ):
        whole = _runner(view, _drop_others(view, chosen), Path(folder) / "whole", asked)
        task.advance(1)
        fastest: list[float] = []
        shares: list[float] = []
        for number, (_, _, plan) in enumerate(probes):
            cut = _runner(view, plan, Path(folder) / str(number), asked)
            took = _in_turn(cut, whole, repeats=asked.repeats)
            fastest.append(1e3 * min(took[1]))
            shares.append(_share(took))
            task.advance(1)
    # Not the least of them: what is predicted is compared with the fastest pass of one measurement.
    whole_ms = statistics.median(fastest)
    for (kind, width, _), share in zip(probes, shares, strict=True):
        saved, full = whole_ms * (1 - share), model[kind][AXES[kind]]
        if width == 0:
            tables[kind][full] = max(0.0, saved / (len(chosen) - 1))
        else:
            tables[kind][width] = max(0.0, tables[kind][full] - saved / len(chosen))
    parts = sum(tables[kind][model[kind][axis]] for kind, axis in AXES.items())
    return CostTable(
        on=asked.on,
        batch=asked.batch,
        tokens=asked.tokens,
        model=model,
        overhead_ms=max(0.0, whole_ms - len(chosen) * parts),
        attention=tables["attention"],
        ffn=tables["ffn"],
        environment=environment(asked),
        measured={"blocks": len(chosen), "repeats": asked.repeats, "whole_ms": whole_ms},
    )


def pass_times(latency: Mapping[str, Any], model: Any, dense: Any = None, repeats: int = 10) -> dict[str, float]:
    """What one pass of a written result takes, and how the prediction compares.

    Args:
        latency: `batch`, `tokens`, `predicted_ms` and `dense_predicted_ms` of a plan.
        model: the result, in eval mode, or its ONNX graph called as one.
        dense: the model before the cut, run in the same way, which then takes turns with the result, so that a machine
            that slows down slows both; None where it is not at hand.
        repeats: passes of each at least; one that does not count comes first.
    Returns:
        `measured_ms` (the fastest pass), `measured_p50_ms` and `predicted_to_measured`. With a dense model also
        `dense_measured_ms`; `predicted_share` and `measured_share`, the times as shares of the dense model's, the
        latter the median over the turns; and `share_predicted_to_measured`.
    """
    from prunekit.evaluate.latency import one_pass

    models = [model] if dense is None else [model, dense]
    took = _in_turn(*[one_pass(one, latency["batch"], latency["tokens"])[0] for one in models], repeats=repeats)
    fastest = 1e3 * min(took[0])
    found = {
        "measured_ms": fastest,
        "measured_p50_ms": 1e3 * statistics.median(took[0]),
        "predicted_to_measured": latency["predicted_ms"] / fastest,
    }
    if dense is None:
        return found
    predicted, measured = latency["predicted_ms"] / latency["dense_predicted_ms"], _share(took)
    return {
        **found,
        "dense_measured_ms": 1e3 * min(took[1]),
        "predicted_share": predicted,
        "measured_share": measured,
        "share_predicted_to_measured": predicted / measured,
    }


def environment(asked: Pass) -> dict[str, Any]:
    """What else a time depends on: machine, device, type of the weights, versions."""
    from prunekit.evaluate.results import machine

    packages = ["torch", "transformers"] if asked.on == "torch" else ["onnxruntime", "transformers"]
    versions = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    device, dtype = asked.device, asked.dtype
    if asked.on == "onnxruntime":
        device, dtype = onnx_device(device), "float32"
    return {"machine": machine(), "device": device, "dtype": dtype, "versions": versions}


def onnx_device(device: str) -> str:
    """Where ONNX Runtime runs: the same device where it can, else the CPU."""
    from prunekit.export.onnx import require_packages
    from prunekit.export.ort import providers

    require_packages()
    return "cpu" if len(providers()) == 1 else device


def _chosen(view: ModelView, asked: Pass) -> list[int]:
    """Blocks that are run: the first that hold both sub-layers at the widths that the table is about."""
    model = model_of(view)
    alike = [
        block
        for block in view.blocks
        if block.attention and block.ffn
        and block.attention.widths == model["attention"] and block.ffn.widths == model["ffn"]
    ]  # fmt: skip
    if len(alike) < 2:
        why = f"{len(alike)} of {len(view.blocks)} blocks have both sub-layers at full width"
        raise PlanError("what sub-layers cost cannot be measured", why=why, hint="use a budget of flops or params")
    if asked.blocks is not None:
        most = asked.blocks
    else:
        weights = sum(_weights(sublayer) for sublayer in alike[0].sublayers) * 4
        most = max(2, -(-_BLOCK_BYTES // weights))
        most = min(most, _ONNX_BLOCKS) if asked.on == "onnxruntime" else most
    return [block.index for block in alike[: max(2, most)]]


def _weights(sublayer: SubLayer) -> int:
    return sum(math.prod(ref.shape) for ref in sublayer.tensors)


def _drop_others(view: ModelView, chosen: Sequence[int], more: Sequence[str] = ()) -> Plan:
    """The plan that leaves the chosen blocks, less the addresses in `more`."""
    gone = [s.address for s in view.sublayers if s.block not in chosen]
    return Plan.make(view, drop=[*gone, *more])


def _probes(view: ModelView, chosen: Sequence[int], widths: Sequence[str]) -> list[tuple[str, int, Plan]]:
    """Kind, width (0 for none) and plan of every cut model; the first block keeps both, so that it stays a model."""
    model, found = model_of(view), []
    for kind in AXES:
        gone = [f"blocks.{i}.{kind}" for i in chosen[1:]]
        found.append((kind, 0, _drop_others(view, chosen, gone)))
    for name in widths:
        kind, axis = WIDTHS[name]
        full, whole = model[kind][axis], _drop_others(view, chosen)
        for width in _grid(full):
            keep = {f"blocks.{i}.{kind}.{name}": range(width) for i in chosen}
            found.append((kind, width, Plan.make(view, whole.drop, keep)))
    return found


def _grid(full: int) -> list[int]:
    """Widths below the full one that are measured, widest first: 1,536 gives 1,152, 768 and 384; 3 gives 2 and 1."""
    found = {max(1, round(full * part / _WIDTHS_MEASURED)) for part in range(1, _WIDTHS_MEASURED)}
    return sorted(found - {full}, reverse=True)


def _runner(view: ModelView, plan: Plan, folder: Path, asked: Pass) -> Callable[[], tuple[Any, float]]:
    """One pass of what a plan leaves of a model, written and loaded as every result is."""
    from prunekit.evaluate.latency import one_pass
    from prunekit.modeling.load import load_model
    from prunekit.surgery import engine

    folder.mkdir()
    engine.apply(view, plan, folder, layout=choose_layout(view, plan))
    model: Any
    if asked.on == "onnxruntime":
        from prunekit.evaluate.onnx import OnnxModel
        from prunekit.export.onnx import export_onnx

        export_onnx(folder, folder / "onnx")
        model = OnnxModel(folder / "onnx", onnx_device(asked.device))
    else:
        model = load_model(folder, asked.dtype, asked.device)
    return one_pass(model, asked.batch, asked.tokens)[0]


def _in_turn(*runners: Callable[[], tuple[Any, float]], repeats: int) -> list[list[float]]:
    """Seconds of every pass of one runner, or of two that take turns; the first round does not count.

    The more the passes scatter, the more there are, until the median of what is asked of them is known.
    """
    import torch

    took: list[list[float]] = [[] for _ in runners]
    with torch.no_grad():
        for run in runners:
            run()
        while not _enough(took, repeats):
            for run, found in zip(runners, took, strict=True):
                found.append(run()[1])
    return took


def _enough(took: Sequence[Sequence[float]], repeats: int) -> bool:
    passes, seconds = len(took[0]), sum(map(sum, took))
    if passes < max(2, repeats) or (seconds < _LEAST_SECONDS and passes < _MOST_PASSES):
        return False
    values = _shares(took) if len(took) == 2 else took[0]
    low, middle, high = statistics.quantiles(values, n=4)
    # Of the median of normally distributed values with this distance between their quartiles.
    error = 0.93 * (high - low) / math.sqrt(passes)
    return error <= _KNOWN * middle or seconds > _MOST_SECONDS or passes >= _MOST_PASSES


def _shares(took: Sequence[Sequence[float]]) -> list[float]:
    """Of each turn, the first one's time as a share of the second one's."""
    return [one / other for one, other in zip(*took, strict=True)]


def _share(took: Sequence[Sequence[float]]) -> float:
    return statistics.median(_shares(took))
