"""The training loop that all metrics share: one small model a seed, on everything or on a random part of it.

Sources: per-example records as in data_diet (https://github.com/mansheej/data_diet); subset models as in Feldman and
Zhang, What Neural Networks Memorize and Why (https://arxiv.org/abs/2008.03703).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.ranks import Ranks, alone
from prunekit.modeling.quiet import quiet

_EVAL = 512
# Per-example gradients held at once: 64 of a head with 100,000 weights are 26 MB.
_GRADIENTS = 64


@dataclass(frozen=True)
class Run:
    """What is trained; metrics that ask for the same share it.

    Args:
        epochs: passes over the examples; 0 leaves the model as it begins.
        subset: share of the examples that each model trains on, drawn from its seed.
        widths: hidden units of the head, by turns over the seeds; 0 is a linear head.
        lr: learning rate of AdamW.
        batch: examples a step.
        records: what costs extra: `gradients`, `probabilities`.
    """

    epochs: int = 10
    subset: float = 1.0
    widths: tuple[int, ...] = (0,)
    lr: float = 3e-3
    batch: int = 128
    records: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What one trained model says about every example.

    Args:
        members: whether it trained on the example, bool [n].
        correct: whether it ends up right on it, bool [n].
        error: ||softmax - onehot||_2 at the end, float32 [n].
        loss: cross-entropy at the end, float32 [n].
        forgotten: times the example, when its turn came, was wrong after it had been right, int32 [n].
        learned: whether it was ever right when its turn came, bool [n].
        gradient: ||d loss / d weights||_2 at the end, float32 [n]; empty where not asked for.
        probabilities: file of the softmax at the end, float16 [n, classes]; None where not asked for.
    """

    members: np.ndarray
    correct: np.ndarray
    error: np.ndarray
    loss: np.ndarray
    forgotten: np.ndarray
    learned: np.ndarray
    gradient: np.ndarray
    probabilities: Path | None = None


@dataclass(frozen=True)
class Learner:
    """A kind of model and the inputs it reads.

    Args:
        make: a fresh model of a hidden width; random numbers come from torch's global generator.
        arrays: inputs of all examples by name, [n, ...], most likely memory maps.
        labels: class numbers [n].
        n_classes: of the labels.
        device: where it trains.
    """

    make: Callable[[int], nn.Module]
    arrays: Mapping[str, np.ndarray]
    labels: np.ndarray
    n_classes: int
    device: str = "cpu"


class Head(nn.Module):
    """A linear classifier, or one with a hidden layer, on standardised embeddings.

    Args:
        mean: of the embeddings [d].
        deviation: of the embeddings [d].
        n_classes: outputs.
        width: hidden units; 0 for none.
    """

    def __init__(self, mean: Tensor, deviation: Tensor, n_classes: int, width: int = 0) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        d = mean.numel()
        hidden = [nn.Linear(d, width), nn.ReLU()] if width else []
        self.layers = nn.Sequential(*hidden, nn.Linear(width or d, n_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, classes] of embeddings [batch, d]."""
        logits: Tensor = self.layers((x - self.mean) / self.deviation)
        return logits


def trained(
    learner: Learner, run: Run, models: int, seed: int, folder: Path, ranks: Ranks, progress: Progress = NULL_PROGRESS
) -> tuple[Outcome, ...]:
    """Outcomes of seeds `seed` to `seed + models - 1`; rank r trains every N-th, and all ranks get all of them.

    Args:
        folder: keeps finished seeds; what is there is not trained again. Its name must say which data it is about.
    """
    key = hashlib.sha256(json.dumps(asdict(run), sort_keys=True).encode()).hexdigest()[:16]
    folder = folder / key
    folder.mkdir(parents=True, exist_ok=True)
    mine = [seed + number for number in range(models) if ranks.mine(number)]
    with progress.task("training", total=len(mine), unit="models") as task:
        for one in mine:
            if not _file(folder, one).is_file():
                _write(train_one(learner, run, one, folder), folder, one)
            task.advance()
    ranks.wait()
    return tuple(_read(folder, seed + number, run) for number in range(models))


def _file(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}.npz"


def _write(outcome: Outcome, folder: Path, seed: int) -> None:
    arrays = {name: value for name, value in vars(outcome).items() if isinstance(value, np.ndarray)}
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as part:
        np.savez(part, **arrays)  # type: ignore[arg-type]
    Path(part.name).replace(_file(folder, seed))


def _read(folder: Path, seed: int, run: Run) -> Outcome:
    with np.load(_file(folder, seed), allow_pickle=False) as arrays:
        held = {name: arrays[name] for name in arrays.files}
    kept = "probabilities" in run.records
    return Outcome(**held, probabilities=folder / f"seed-{seed}.probabilities.npy" if kept else None)


def train_one(learner: Learner, run: Run, seed: int, folder: Path) -> Outcome:
    """Trains the model of one seed and looks at every example; torch's random state stays as it was.

    Args:
        folder: where probabilities are written, if asked for.
    """
    n = len(learner.labels)
    members = np.ones(n, bool)
    if run.subset < 1:
        members[:] = False
        members[np.random.default_rng(seed).permutation(n)[: max(1, round(run.subset * n))]] = True
    tally = Tally(n)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = learner.make(run.widths[seed % len(run.widths)]).to(learner.device)
        if run.epochs:
            _fit(model, learner, run, seed, np.flatnonzero(members), tally)
    return _looked_at(model.eval(), learner, run, seed, members, tally, folder)


class Tally:
    """Counts, over the course of training, when an example is right as its turn comes.

    Args:
        n: examples.
    """

    def __init__(self, n: int) -> None:
        self.right = np.zeros(n, bool)
        self.learned = np.zeros(n, bool)
        self.forgotten = np.zeros(n, np.int32)

    def seen(self, index: np.ndarray, right: np.ndarray) -> None:
        """Examples `index` were looked at, and `right` says of each whether the model was."""
        self.forgotten[index] += self.right[index] & ~right
        self.learned[index] |= right
        self.right[index] = right


class _Rows(torch.utils.data.Dataset):
    """Rows of arrays, fetched a batch at a time."""

    def __init__(self, learner: Learner, rows: np.ndarray) -> None:
        self.learner, self.rows = learner, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: Sequence[int]) -> dict[str, Tensor]:
        index = self.rows[np.asarray(places)]
        return {**batch_of(self.learner, index), "index": torch.from_numpy(index)}


def batch_of(learner: Learner, index: np.ndarray) -> dict[str, Tensor]:
    """Inputs and labels of the examples `index`."""
    inputs = {name: torch.from_numpy(np.array(array[index])) for name, array in learner.arrays.items()}
    inputs = {name: value.float() if value.dtype == torch.float16 else value for name, value in inputs.items()}
    return {**inputs, "labels": torch.from_numpy(learner.labels[index].astype(np.int64))}


class _Loop(Trainer):
    """Trainer that tells a tally what came out for each example."""

    tally: Tally

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **unused: Any) -> Any:
        inputs = dict(inputs)
        index, labels = inputs.pop("index"), inputs.pop("labels")
        logits = logits_of(model(**inputs))
        self.tally.seen(index.cpu().numpy(), (logits.detach().argmax(-1) == labels).cpu().numpy())
        loss = cross_entropy(logits.float(), labels)
        return (loss, logits) if return_outputs else loss


def logits_of(output: Any) -> Tensor:
    """Logits of a head or of a transformers model."""
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def _fit(model: nn.Module, learner: Learner, run: Run, seed: int, rows: np.ndarray, tally: Tally) -> None:
    with alone(), tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=run.epochs,
            learning_rate=run.lr,
            per_device_train_batch_size=run.batch,
            lr_scheduler_type="linear",
            seed=seed,
            use_cpu=learner.device == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        loop = _Loop(model, arguments, train_dataset=_Rows(learner, rows), data_collator=lambda batch: batch)
        loop.tally = tally
        for talker in (PrinterCallback, ProgressCallback):
            loop.remove_callback(talker)
        loop.train()


def _looked_at(
    model: nn.Module, learner: Learner, run: Run, seed: int, members: np.ndarray, tally: Tally, folder: Path
) -> Outcome:
    n = len(members)
    correct, error, loss = np.zeros(n, bool), np.zeros(n, np.float32), np.zeros(n, np.float32)
    asked = "gradients" in run.records
    gradient = np.zeros(n if asked else 0, np.float32)
    kept = _open_probabilities(folder, seed, n, learner.n_classes) if "probabilities" in run.records else None
    for first in range(0, n, _EVAL):
        index = np.arange(first, min(first + _EVAL, n))
        batch = {name: value.to(learner.device) for name, value in batch_of(learner, index).items()}
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = logits_of(model(**batch)).float()
        probabilities = logits.softmax(-1)
        correct[index] = (logits.argmax(-1) == labels).cpu().numpy()
        loss[index] = cross_entropy(logits, labels, reduction="none").cpu().numpy()
        error[index] = (probabilities - one_hot(labels, learner.n_classes)).norm(dim=-1).cpu().numpy()
        if kept is not None:
            kept[index] = probabilities.cpu().numpy()
        if asked:
            gradient[index] = gradient_norms(model, batch, labels)
    if kept is not None:
        kept.flush()
    return Outcome(members, correct, error, loss, tally.forgotten, tally.learned, gradient)


def _open_probabilities(folder: Path, seed: int, n: int, n_classes: int) -> np.memmap:
    file = folder / f"seed-{seed}.probabilities.npy"
    return np.lib.format.open_memmap(file, "w+", "float16", (n, n_classes))


def gradient_norms(model: nn.Module, batch: Mapping[str, Tensor], labels: Tensor) -> np.ndarray:
    """||d cross-entropy / d weights||_2 of each example alone, float32 [n]."""
    if isinstance(model, Head):
        return np.concatenate(
            [
                _head_norms(model, x, y)
                for x, y in zip(batch["x"].split(_GRADIENTS), labels.split(_GRADIENTS), strict=True)
            ]
        )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = []
    for place in range(len(labels)):
        one = {name: value[place : place + 1] for name, value in batch.items()}
        loss = cross_entropy(logits_of(model(**one)).float(), labels[place : place + 1])
        parts = torch.autograd.grad(loss, weights, allow_unused=True)
        found.append(sum(float(part.square().sum()) for part in parts if part is not None) ** 0.5)
    return np.array(found, np.float32)


def _head_norms(model: Head, x: Tensor, labels: Tensor) -> np.ndarray:
    from torch.func import functional_call, grad, vmap

    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        logits: Tensor = functional_call(model, weights, (x[None],))
        return cross_entropy(logits, label[None])

    parts = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, labels)
    total = sum(part.flatten(1).square().sum(1) for part in parts.values())
    norms: np.ndarray = total.sqrt().cpu().numpy()
    return norms
