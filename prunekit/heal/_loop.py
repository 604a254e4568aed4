"""The one training loop: transformers' Trainer, quiet, with checkpoints that a killed run goes on from."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from prunekit.core.errors import HealError, UsageError
from prunekit.core.ranks import is_first_rank, started
from prunekit.heal import _shards
from prunekit.heal._checkpoints import best_of, drop_unfinished, ended_by, latest, seal, sealed
from prunekit.heal._data import Data
from prunekit.heal.scene import Objective, Scene

if TYPE_CHECKING:
    from prunekit.core.progress import Task

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def _at_no_step(step: int) -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Course:
    """How a training goes beside its loss.

    Args:
        work: what the bar calls it.
        groups: of the optimizer, as AdamW takes them; empty trains every parameter at the rate asked for.
        at_step: called with the number of steps done before each step.
        lower: what else to lower where numbers are none, in words.
    """

    work: str = "healing"
    groups: Sequence[dict[str, Any]] = field(default_factory=tuple)
    at_step: Callable[[int], None] = _at_no_step
    lower: str = ""


_HEALING = Course()


class _Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, inputs: Mapping[str, Tensor], rows: Tensor) -> None:
        self._inputs, self._rows = inputs, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = self._rows[i]
        return {"row": row, **{name: values[row] for name, values in self._inputs.items()}}


class _Trainer(Trainer):
    """The Trainer with an objective as its loss, in training and on the held-out part."""

    def __init__(self, objective: Objective, scene: Scene, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._objective = objective
        self._options = {"output_hidden_states": objective.hidden_states, **scene.no_cache}
        # The Trainer divides the loss by the passes of a step.
        self.model_accepts_loss_kwargs = False

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor | None]:
        """The passes of a step, and the tokens that all of them hold in a pass of one process on average."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches or "attention_mask" not in batches[0] or not self._objective.of_tokens:
            return batches, None
        each = torch.stack([batch["attention_mask"].sum() for batch in batches]).to(device, torch.float32)
        return batches, self.accelerator.gather(each).mean()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        given = {name: value for name, value in inputs.items() if name != "row"}
        outputs = model(**given, **self._options)
        loss = self._objective(outputs, given, inputs["row"])
        if num_items_in_batch is not None:
            # So that each token counts alike in all passes and processes, as it would in one pass.
            loss = loss * given["attention_mask"].sum() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> EvalLoopOutput:
        """The mean loss over the held-out part; the Trainer's own counts a short last batch as much as a whole one.

        Each process takes every so many-th batch; one that has none left passes the first again, which does not count.
        """
        rows, size, model = self.eval_dataset, self.args.per_device_eval_batch_size, self.model.eval()
        begins, sums = range(0, len(rows), size), torch.zeros(2, dtype=torch.float64)
        for first in range(0, len(begins), self.args.world_size):
            number = first + self.args.process_index
            begin = begins[number] if number < len(begins) else 0
            batch = self.data_collator([rows[i] for i in range(begin, min(begin + size, len(rows)))])
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = float(self.compute_loss(model, inputs))
            by_token = "attention_mask" in inputs and self._objective.of_tokens
            weight = float(inputs["attention_mask"].sum()) if by_token else float(len(inputs["row"]))
            if number < len(begins):
                sums += torch.tensor([weight * loss, weight], dtype=torch.float64)
        if torch.distributed.is_initialized():
            sums = sums.to(self.args.device)
            torch.distributed.all_reduce(sums)
        loss = float(sums[0] / sums[1])
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss}, len(rows))


class _Watch(TrainerCallback):
    """Progress, seals of checkpoints, the limits of time and patience, and a stop where numbers are none."""

    def __init__(self, scene: Scene, work: Path, task: Task, course: Course, stopped_by: str) -> None:
        self.scene, self.work, self.task, self.course, self.stopped_by = scene, work, task, course, stopped_by
        self.begun = self.step_begun = time.monotonic()
        self.step_seconds: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            # As this run calls the folder, not as the one before did.
            best = best_of(self.work / f"checkpoint-{state.global_step}")
            state.best_model_checkpoint = None if best is None else str(best)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.course.at_step(state.global_step)
        self.step_begun = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.task.advance(1)
        self.step_seconds.append(time.monotonic() - self.step_begun)
        minutes = self.scene.asked.minutes
        if minutes is not None and _any_rank(time.monotonic() - self.begun >= 60 * minutes, args.device):
            control.should_training_stop = True
            self.stopped_by = "minutes"
        if control.should_training_stop or state.global_step >= state.max_steps:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        for name in ("loss", "grad_norm"):
            self._require_number(name.replace("_", " "), (logs or {}).get(name), state.global_step)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        loss = (metrics or {}).get("eval_loss")
        self._require_number("held-out loss", loss, state.global_step)
        self.scene.talk(f"step {state.global_step} of {state.max_steps}: held-out loss {loss:.4f}")
        checks = [entry["eval_loss"] for entry in state.log_history if entry["step"] and "eval_loss" in entry]
        patience = self.scene.asked.patience
        # Counted from what checkpoints hold, so that a killed run goes on counting.
        if patience is not None and checks and len(checks) - 1 - checks.index(min(checks)) >= patience:
            control.should_training_stop = True
            self.stopped_by = "patience"

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        finite = all(bool(_local(value).isfinite().all()) for value in model.parameters() if value.requires_grad)
        if _any_rank(not finite, args.device):
            raise self.diverged("norm of the weights", state.global_step)
        # Learned masks choose here, and say so where finite weights leave them nothing to choose by.
        model.eval()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        # Trainer may look for the folder before the first process made it; under FSDP all must load the same one.
        best = self.work / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)
        if state.is_world_process_zero:
            ends = control.should_training_stop or state.global_step >= state.max_steps
            seal(self.work / f"checkpoint-{state.global_step}", self.stopped_by if ends else None)

    def _require_number(self, name: str, value: float | None, step: int) -> None:
        if value is not None and not math.isfinite(value):
            raise self.diverged(name, step)

    def diverged(self, name: str, step: int) -> HealError:
        """What is said where something is not a number."""
        good = sealed(self.work)
        kept = f"; the last good state is `{good[-1]}`" if good else ""
        return HealError(
            f"the {name} is not a number at step {step}", why=f"training diverged{kept}",
            hint=self._lower() + (f", and delete or rename `{self.work}`" if good else ""),
        )  # fmt: skip

    def _lower(self) -> str:
        section = self.scene.asked.section
        return f"lower {self.course.lower}`{section}.lr`, lengthen `{section}.warm_up`, or compute in float32"


def train(
    model: Any, objective: Objective, data: Data, scene: Scene, work: Path, course: Course = _HEALING
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """Trains a model in place, on from the last checkpoint where there is one.

    Args:
        model: weights in float32; afterwards the best state by held-out loss, or the last where nothing is held out.
        objective: the loss.
        data: rows.
        scene: settings, device, progress.
        work: folder for checkpoints; it stays.
        course: what is trained at which rate.
    Returns:
        `steps_done`, `stopped_by` (steps, minutes, patience), `loss` of the last step, and where something is held out
        its loss `held_out_before` and `held_out_after`, with `best_step`. Under FSDP, which leaves every process a part
        of the model, also its values by name, on the CPU of the first process.
    Raises:
        HealError: if the loss is not a number, or the checkpoint is damaged.
    """
    asked = scene.asked
    checkpoint = latest(work)
    if is_first_rank():
        drop_unfinished(work)
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    ended = ended_by(checkpoint)
    if checkpoint:
        scene.talk(f"going on from step {done} of {asked.steps}" if ended is None else f"trained up to step {done}")
    arguments = _arguments(scene, data, work, begins=checkpoint is None)
    rows = data.train
    if ended is not None:
        # Trainer goes on to the end of what it takes for an epoch; where that is one step there is none left.
        arguments.max_steps, rows = done, rows[: asked.batch]
    own = torch.optim.AdamW(list(course.groups), weight_decay=asked.weight_decay) if course.groups else None
    with ExitStack() as stack:
        task = stack.enter_context(scene.progress.task(course.work, total=arguments.max_steps - done, unit="steps"))
        watch = _Watch(scene, work, task, course, ended or "steps")
        trainer = _Trainer(
            objective,
            scene,
            model=model,
            args=arguments,
            train_dataset=_Rows(data.inputs, rows),
            eval_dataset=_Rows(data.inputs, data.held_out) if len(data.held_out) else None,
            callbacks=[watch],
            optimizers=(own, None),
        )
        trainer.remove_callback(PrinterCallback)
        _shards.check(trainer)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except FloatingPointError as error:
            raise watch.diverged(str(error), trainer.state.global_step) from error
        _tell_speed(watch, scene, data)
        state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
        # Mixed precision would stay with the model's forward.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    return _told(trainer.state, watch.stopped_by), state


def _arguments(scene: Scene, data: Data, work: Path, *, begins: bool) -> TrainingArguments:
    asked = scene.asked
    shares = asked.accumulate * started()
    at_once = asked.batch // shares
    if at_once * shares != asked.batch:
        parts = f"{started()} processes of {asked.accumulate} passes"
        raise UsageError(
            f"`{asked.section}.batch: {asked.batch}` cannot be split over {parts}",
            hint=f"use a multiple of {shares}",
        )
    watched = len(data.held_out) > 0
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=asked.steps,
        per_device_train_batch_size=at_once,
        per_device_eval_batch_size=at_once,
        gradient_accumulation_steps=asked.accumulate,
        learning_rate=asked.lr,
        lr_scheduler_type=_SCHEDULES[asked.schedule],
        warmup_steps=math.ceil(asked.warm_up * asked.steps),
        weight_decay=asked.weight_decay,
        max_grad_norm=asked.max_grad_norm,
        seed=asked.seed,
        data_seed=asked.seed,
        bf16=asked.dtype == "bfloat16",
        use_cpu=scene.device == "cpu",
        eval_strategy="steps" if watched else "no",
        eval_steps=asked.check_every if watched else None,
        eval_on_start=watched and begins,
        save_strategy="steps",
        save_steps=asked.check_every,
        save_total_limit=2,
        load_best_model_at_end=watched,
        metric_for_best_model="loss" if watched else None,
        greater_is_better=False if watched else None,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=scene.device == "cuda",
        # An encoder's pooler has no part in the loss.
        ddp_find_unused_parameters=not scene.decoder,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
    # One process trains on one device; without this the Trainer would spread over all that it sees.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _told(state: Any, stopped_by: str) -> dict[str, Any]:
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    watched = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    told: dict[str, Any] = {
        "steps_done": state.global_step,
        "stopped_by": stopped_by,
        "loss": losses[-1] if losses else None,
    }
    if watched:
        told |= {
            "held_out_before": watched[0],
            "held_out_after": state.best_metric,
            "best_step": state.best_global_step,
        }
    return told


def _tell_speed(watch: _Watch, scene: Scene, data: Data) -> None:
    """How long a step takes: the median, which one that compiled, and checks between them, leave alone."""
    if watch.step_seconds:
        a_step = statistics.median(watch.step_seconds)
        tokens = scene.asked.batch * next(iter(data.inputs.values())).shape[1]
        scene.talk(f"a step took {1000 * a_step:.0f} ms, {tokens / a_step:,.0f} tokens a second")


def _local(value: Any) -> Tensor:
    """What this process holds of a parameter, which FSDP spreads."""
    found: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return found


def _any_rank(flag: bool, device: Any) -> bool:
    """Whether it holds for any process, the same answer in all."""
    if not torch.distributed.is_initialized():
        return flag
    found = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found.item())
