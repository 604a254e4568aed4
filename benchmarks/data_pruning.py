"""Accuracy after training on what each data-pruning metric keeps, against random: three data sets, two judges.

    python benchmarks/data_pruning.py prepare --data shared/data --vision path/to/dinov2 --language path/to/smollm2
    python benchmarks/data_pruning.py measure --device cuda --workers 16
    python benchmarks/data_pruning_plot.py

`prepare` embeds every example once and asks the language model once. `measure` needs only what it wrote: each metric
scores the training set; then models train on what it keeps, three seeds, and are judged on the dev set, `random` drawn
anew for each seed. A second run goes on where the first was stopped. All models make the same number of steps, so that
fewer examples do not also mean less training. Two judges: `head`, 64 hidden units on the embeddings that the metrics
saw too; `scratch`, a network that begins from random weights and sees what they did not: pixels, or hashed words.

`prepare` needs pyarrow and Pillow beside what the models need; `measure` torch, transformers, accelerate, numpy,
pydantic and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from data_pruning_judges import WORDS, accuracies, judge_of, tensors

SETS = {
    "sentence_polarity": ("cls/sentence_polarity_train.jsonl", "cls/sentence_polarity_dev.jsonl"),
    "sst2": ("restricted/sst2_train.jsonl", "restricted/sst2_dev.jsonl"),
    "cifar10": ("restricted/cifar10_probe_train.zip", "restricted/cifar10_dev.zip"),
}
KEEPS = (0.8, 0.6, 0.4, 0.2)
SEEDS = (0, 1, 2)
RULES = ("hard", "easy")
PARTS = ("train", "dev")
JUDGES = ("head", "scratch")
# Hashed words and pairs of words that are read of a text.
READ = 48
# Metric and knobs by the name in the table. Those in a tuple train the same models, and are scored in one process.
METRICS: dict[str, tuple[str, dict[str, Any]]] = {
    "el2n, 1 model": ("el2n", {"models": 1}),
    "el2n, 20 models": ("el2n", {"models": 20}),
    "grad_norm": ("grad_norm", {}),
    "forgetting": ("forgetting", {}),
    "memorization": ("memorization", {}),
    "influence_max": ("influence_max", {}),
    "influence_sum": ("influence_sum", {}),
    "ddd": ("ddd", {}),
    "ensemble_active": ("ensemble_active", {}),
    "supervised_prototypes": ("supervised_prototypes", {}),
    "ssl_prototypes": ("ssl_prototypes", {"engine": "scikit-learn"}),
    "loss": ("loss", {}),
    "perplexity": ("perplexity", {}),
    "length": ("length", {}),
}
TEXT_ONLY = ("perplexity", "length")
GROUPS = (
    ("memorization", "influence_max", "influence_sum"),
    ("ddd",),
    ("ensemble_active",),
    ("el2n, 1 model", "el2n, 20 models"),
    ("grad_norm",),
    ("forgetting",),
    ("loss", "supervised_prototypes", "ssl_prototypes"),
    ("perplexity", "length"),
    ("random",),
)


def prepare(options: argparse.Namespace) -> None:
    for name in options.sets:
        folder = options.work / name
        if (folder / "facts.json").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {}
        for part, path in zip(PARTS, SETS[name], strict=True):
            data = examples(options.data / path, options.vision if path.endswith(".zip") else None, options)
            np.save(folder / f"x_{part}.npy", np.load(data.embeddings_file))
            np.save(folder / f"y_{part}.npy", data.labels)
            np.save(folder / f"raw_{part}.npy", raw(data))
            facts[part] = {"examples": data.n, "digest": data.source.digest}
            if part == "train":
                facts |= {"classes": data.n_classes, "model": Path(data.model.source).name, "kind": data.source.kind}
            if part == "train" and data.source.kind == "text":
                np.save(folder / "lengths.npy", data.lengths())
                if options.language:
                    asked = examples(options.data / path, options.language, options)
                    np.save(folder / "surprises.npy", asked.surprises())
        (folder / "facts.json").write_text(json.dumps(facts))
        print(folder, facts, flush=True)


def examples(path: Path, model: str | None, options: argparse.Namespace) -> Any:
    from prunekit.datasets.encoder import encoder
    from prunekit.datasets.examples import Examples, Settings
    from prunekit.datasets.source import open_source

    source = open_source(path)
    settings = Settings(device=options.device, **({"cache": options.cache} if options.cache else {}))
    return Examples(source, encoder(model, source, options.device, 256), settings)


def raw(data: Any) -> np.ndarray:
    """What `scratch` reads: pixels uint8 [n, 3, 32, 32], or numbers of words int32 [n, READ], 0 for none."""
    values = [value for _, block in data.source.blocks(256) for value in block]
    if data.source.kind == "image":
        images = [np.asarray(image.resize((32, 32))) for image in data.source.decoded(values)]
        return np.stack(images).transpose(0, 3, 1, 2).copy()
    found = np.zeros((len(values), READ), np.int32)
    for line, text in zip(found, values, strict=True):
        words = text.lower().split()
        marks = [*words, *(f"{a} {b}" for a, b in pairwise(words))][:READ]
        line[: len(marks)] = [1 + zlib.crc32(mark.encode()) % (WORDS - 1) for mark in marks]
    return found


@dataclass(frozen=True)
class Prepared:
    """Answers metrics as `prunekit.datasets.examples.Examples` does, from what `prepare` wrote."""

    folder: Path
    settings: Any
    labelled: bool = True

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "facts.json").read_text())

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def n_classes(self) -> int:
        return int(self.facts["classes"])

    @cached_property
    def labels(self) -> np.ndarray:
        return np.load(self.folder / "y_train.npy")

    @property
    def embeddings_file(self) -> Path:
        return self.folder / "x_train.npy"

    @property
    def width(self) -> int:
        return int(np.load(self.embeddings_file, mmap_mode="r").shape[1])

    def embedding_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        from prunekit.datasets.arrays import read_rows

        return read_rows(self.embeddings_file)

    def surprises(self) -> np.ndarray:
        return np.load(self.folder / "surprises.npy")

    def lengths(self) -> np.ndarray:
        return np.load(self.folder / "lengths.npy")

    def train(self, run: Any, models: int) -> Any:
        from prunekit.core.ranks import Ranks
        from prunekit.datasets.learners import head_learner
        from prunekit.datasets.training import trained

        return trained(head_learner(self), run, models, self.settings.seed, self.folder / "runs", Ranks())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Item:
    """Work of one process: metrics of one data set, and the rows of each that are not there yet."""

    folder: Path
    labels: tuple[str, ...]
    judges: tuple[str, ...]
    device: str
    done: frozenset[tuple[str, str, str, float]]


def measured(item: Item) -> list[dict[str, Any]]:
    """One row a metric, judge, rule and fraction kept."""
    from prunekit.datasets.examples import Settings
    from prunekit.datasets.score import checked, made

    if item.device == "cuda":
        import torch

        torch.set_float32_matmul_precision("high")
    data, found = Prepared(item.folder, settings=Settings(cache=item.folder)), []
    for label in item.labels:
        scores, seconds = None, 0.0
        if label != "random":
            metric, knobs = METRICS[label]
            begin = time.perf_counter()
            scores = checked(metric, made(metric, knobs).score(data), data.n)
            seconds = time.perf_counter() - begin
        for judge in item.judges:
            found += judged(item, data, label, judge, scores, seconds)
    return found


def judged(
    item: Item, data: Prepared, label: str, judge: str, scores: np.ndarray | None, seconds: float
) -> Iterator[dict[str, Any]]:
    """Rows of one metric and judge; without scores those of `random` and of all examples."""
    import torch

    begin = time.perf_counter()
    choices = [choice for choice in chosen(data, label, scores) if (judge, *choice[0]) not in item.done]
    if not choices:
        return
    kind = judge_of(judge, data.facts["kind"], data.width, data.n_classes)
    kept, seeds = [one for _, parts in choices for one in parts], list(SEEDS) * len(choices)
    accuracy = accuracies(kind, tensors(item.folder, judge, item.device), kept, seeds)
    device = torch.cuda.get_device_name() if item.device == "cuda" else platform.machine()
    for place, ((name, rule, keep), _) in enumerate(choices):
        mine = accuracy[place * len(SEEDS) : (place + 1) * len(SEEDS)]
        yield {
            "data": item.folder.name, "judge": judge, "metric": name, "rule": rule, "keep": keep,
            "accuracy": [round(value, 4) for value in mine], "train": data.n, "dev": data.facts["dev"]["examples"],
            "classes": data.n_classes, "model": data.facts["model"], "score_s": round(seconds, 1),
            "judge_s": round(time.perf_counter() - begin, 1), "device": device, "torch": torch.__version__,
        }  # fmt: skip


def chosen(data: Prepared, label: str, scores: np.ndarray | None) -> Iterator[tuple[Any, list[np.ndarray]]]:
    """(metric, rule, keep), and the examples kept for each seed."""
    from prunekit.datasets.rules import Rule, choose, ranking

    def best(order: np.ndarray, keep: float) -> np.ndarray:
        return choose(order, Rule(keep=keep), data.n, data.labels)

    if scores is None:
        yield ("all", "", 1.0), [np.arange(data.n)] * len(SEEDS)
        orders = [np.random.default_rng(1000 + seed).permutation(data.n) for seed in SEEDS]
        for keep in KEEPS:
            yield (label, "", keep), [best(order, keep) for order in orders]
        return
    for rule in RULES:
        order = ranking(scores, rule == "hard", 0)
        for keep in KEEPS:
            yield (label, rule, keep), [best(order, keep)] * len(SEEDS)


def items(options: argparse.Namespace, held: Sequence[dict[str, Any]]) -> list[Item]:
    found = []
    for group in GROUPS:
        for name in options.sets:
            folder = options.work / name
            done = frozenset((r["judge"], r["metric"], r["rule"], r["keep"]) for r in held if r["data"] == name)
            there = {"perplexity": (folder / "surprises.npy").is_file(), "length": (folder / "lengths.npy").is_file()}
            labels = tuple(label for label in group if there.get(label, True) and label in options.metrics)
            left = tuple(label for label in labels if not all(complete(done, label, j) for j in options.judges))
            if left:
                found.append(Item(folder, left, tuple(options.judges), options.device, done))
    return found


def complete(done: frozenset[tuple[str, str, str, float]], label: str, judge: str) -> bool:
    if label == "random":
        return all((judge, *one) in done for one in (("all", "", 1.0), *(("random", "", keep) for keep in KEEPS)))
    return all((judge, label, rule, keep) in done for rule in RULES for keep in KEEPS)


def measure(options: argparse.Namespace) -> None:
    held = load(options.out) if options.out.is_file() else []
    work = items(options, held)
    # Read by the workers as they begin; many of them with all cores each would stand in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.workers)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with (
        options.out.open("a", encoding="utf-8") as out,
        ProcessPoolExecutor(options.workers, get_context("spawn")) as pool,
    ):
        for future in as_completed([pool.submit(measured, item) for item in work]):
            rows = future.result()
            out.writelines(json.dumps(row) + "\n" for row in rows)
            out.flush()
            names = ", ".join(dict.fromkeys(row["metric"] for row in rows))
            print(f"{time.perf_counter() - begin:6.0f} s  {rows[0]['data']}: {names}", flush=True)


def load(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "measure"))
    parser.add_argument("--data", type=Path, default=Path("shared/data"), help="folder with cls/ and restricted/")
    parser.add_argument("--vision", help="source of the model that embeds images")
    parser.add_argument("--language", help="source of the causal model; without one there is no perplexity")
    parser.add_argument("--cache", type=Path, help="of embeddings while they are prepared [prunekit's own]")
    parser.add_argument("--work", type=Path, default=Path("out/data_pruning"), help="what is prepared, finished seeds")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--metrics", nargs="+", choices=[*METRICS, "random"], default=[*METRICS, "random"])
    parser.add_argument("--judges", nargs="+", choices=JUDGES, default=list(JUDGES))
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of the judges; heads train on the CPU"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of `measure`")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data_pruning.jsonl"))
    options = parser.parse_args()
    {"prepare": prepare, "measure": measure}[options.step](options)


if __name__ == "__main__":
    main()
