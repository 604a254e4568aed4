"""Gates with random values in tiny models, and the cut that they lead to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunekit.checkpoint.reader import Checkpoint
from prunekit.core.recipe_learn import Learn
from prunekit.gates._fold import folded, plan_of
from prunekit.gates._learn import Task
from prunekit.gates.vib import Vib
from prunekit.heal._weights import names_of
from prunekit.modeling.load import load_model
from prunekit.plan.cost import sublayer_cost
from prunekit.structure.view import ModelView


def task_of(view: ModelView, kinds: Sequence[str], **budget: Any) -> Task:
    """A task for some kinds of units."""
    asked = Learn.model_validate({"method": "vib", "remove": list(kinds), "budget": {"remove": 0.3, **budget}})
    return Task(asked, view, sum(sublayer_cost(view, part, asked.budget.of) for part in view.sublayers))


def gated(folder: Path, task: Task, seed: int = 0) -> tuple[Any, Any, dict[str, str]]:
    """Model in evaluation with gates far from their initial values, the gates, and names of its tensors."""
    model = load_model(folder, "float32")
    names = names_of(model, Checkpoint.open(folder))
    gates = Vib().gates(task)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gates.mu.uniform_(0.5, 1.5, generator=draw)
        gates.log_variance.uniform_(-3, 3, generator=draw)
    gates.attach(model, task.view)
    return model.eval(), gates, names


def cut_by(folder: Path, task: Task, model: Any, gates: Any, names: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    """Plan and new tensors."""
    plan = plan_of(task, gates.chosen.keep)
    return plan, folded(model, names, task, gates.fixed(), plan, Checkpoint.open(folder), False)
