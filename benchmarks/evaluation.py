"""What evaluation costs beside the model, whether it agrees with lm-evaluation-harness, and how speed repeats.

    python benchmarks/evaluation.py agreement --out benchmarks/results/evaluation.jsonl       # needs the extra `eval`
    python benchmarks/evaluation.py overhead --out benchmarks/results/evaluation.jsonl
    python benchmarks/evaluation.py repeatability --out benchmarks/results/evaluation.jsonl   # on a quiet machine
    python benchmarks/evaluation.py prediction --out benchmarks/results/evaluation.jsonl      # on a quiet machine
    python benchmarks/evaluation.py quiet --out benchmarks/results/evaluation.jsonl           # all but agreement, short

agreement: perplexity by windows that each see one token before those they score, as the harness rolls over a text, and
multiple choice and last words, on the same rows; seconds of both sides, theirs with what the harness sets up.
overhead: seconds outside the model's own forward passes, as a share of the task; processor time beside wall time, since
other work does not lengthen it.
repeatability: the median of a latency task, in as many fresh processes as --rounds says.
prediction: one pass of cut models beside what a cost table says, the dense model taking turns with each: as a share of
its time, which holds whatever the machine does beside, and in milliseconds.
quiet: overhead, repeatability, and prediction for both models in torch and ONNX Runtime, at sizes that take minutes.
Each line of it also runs by itself: `quiet --dry-run` prints them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from prunekit.evaluate.run import check, measure
from prunekit.evaluate.specs import parse_task
from prunekit.evaluate.subject import Subject, open_subject

CHOICES = """\
output_type: multiple_choice
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
LAST_WORD = """\
output_type: loglikelihood
doc_to_target: "{{target}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""


def facts() -> dict[str, Any]:
    """Machine and versions."""
    versions = {}
    for name in ("torch", "transformers", "onnxruntime", "lm_eval"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": gpu}
    return {**machine, "threads": torch.get_num_threads(), "load_1_min": load, **versions}


class Timed:
    """Wall and processor seconds of the outermost forward passes of a model and its parts."""

    def __init__(self, model: Any) -> None:
        self.wall = self.cpu = 0.0
        self._depth = 0
        for module in {model, model.base_model, model.get_output_embeddings()} - {None}:
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: Any) -> None:
        if self._depth == 0:
            self._begin = time.perf_counter(), time.process_time()
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.wall += time.perf_counter() - self._begin[0]
            self.cpu += time.process_time() - self._begin[1]


@contextmanager
def clock() -> Iterator[dict[str, float]]:
    """Wall and processor seconds of a block."""
    found: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield found
    found |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def run(subject: Subject, text: str) -> Any:
    """Figures of one task; nothing is reused."""
    (work,) = check([(subject, [parse_task(text)])])
    ((asked, _, prepared),) = work.tasks
    return measure(asked, prepared, subject)


def harness_task(folder: Path, rows: str, limit: int, rest: str) -> str:
    """A local task of the harness over the packaged rows."""
    from prunekit.evaluate.rows import read_rows

    lines = []
    for row in read_rows(rows, limit):
        fields = dict(row.fields)
        if "choices" in fields:
            fields["choices"] = [choice.removeprefix(" ") for choice in fields["choices"]]
        lines.append(json.dumps(fields))
    data, task = folder / f"{rows}.jsonl", folder / f"{rows}.yaml"
    data.write_text("\n".join(lines), encoding="utf-8")
    task.write_text(
        f"task: bench_{rows}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        f'test_split: test\ndoc_to_text: "{{{{context}}}}"\n{rest}',
        encoding="utf-8",
    )
    return f"lm_eval:{task}"


def agreement(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Ours and the harness's figures on the same tokens and rows."""
    subject = open_subject(arguments.model, arguments.device, "float32", 8)
    yield rolling(subject, arguments.windows, arguments.length)
    with tempfile.TemporaryDirectory() as folder:
        for rows, task, rest in (("arc_easy", "multiple_choice", CHOICES), ("lambada", "cloze", LAST_WORD)):
            ours = run(subject, f"{task}:{rows},limit={arguments.rows}")
            theirs = run(subject, harness_task(Path(folder), rows, arguments.rows, rest))
            for name, figure in theirs.figures.items():
                mine = ours.figures[name]
                yield {
                    "what": f"{rows} {name}",
                    "rows": arguments.rows,
                    "ours": mine.value,
                    "lm_eval": figure.value,
                    "difference": mine.value - figure.value,
                    "rows_that_differ": None
                    if name == "perplexity"
                    else sum(a != b for a, b in zip(mine.examples[0], figure.examples[0], strict=True)),
                    "ours_s": ours.seconds,
                    "lm_eval_s": theirs.seconds,
                }


def rolling(subject: Subject, windows: int, length: int) -> dict[str, Any]:
    """Perplexity of the packaged text by both, the first token being the context of the second."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from prunekit.calibrate.texts import load_text
    from prunekit.evaluate.perplexity import exp, perplexity, sliding_windows

    tokenizer = subject.tokenizer
    ids = subject.encode(load_text("wikitext2_eval"), special=False)[: 1 + windows * length]
    # The harness takes text, and must read it as the same tokens.
    start = next(i for i in range(len(ids)) if subject.encode(tokenizer.decode(ids[i + 1 :]), False) == ids[i + 1 :])
    ids = ids[start:]
    cut, scored = sliding_windows(torch.tensor(ids), length + 1, length)
    with clock() as ours:
        mine = perplexity(subject.model, cut, 1, scored=scored)
    model = HFLM(pretrained=subject.model, tokenizer=tokenizer, batch_size=1, max_length=length, prefix_token_id=ids[0])
    asked = [Instance("loglikelihood_rolling", {}, (tokenizer.decode(ids[1:]),), 0)]
    with clock() as theirs:
        (total,) = model.loglikelihood_rolling(asked, disable_tqdm=True)
    nll = -total / (len(ids) - 1)
    return {
        "what": "perplexity",
        "tokens": mine.tokens,
        "window_tokens": length,
        "ours": mine.perplexity,
        "lm_eval": exp(nll),
        "difference": mine.perplexity - exp(nll),
        "nll_difference": mine.nll - nll,
        "ours_s": ours["wall_s"],
        "lm_eval_s": theirs["wall_s"],
    }


def overhead(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of each task, and those inside the model's forward passes."""
    subject = open_subject(arguments.model, arguments.device, "float32", 8)
    timed = Timed(subject.model)
    n = arguments.rows
    for text in (
        f"perplexity,sequences={arguments.windows},length_tokens={arguments.length}",
        f"multiple_choice:arc_easy,limit={n}",
        f"cloze:lambada,limit={n}",
        f"counting,limit={n}",
        f"repetition,limit={min(n, 8)},new_tokens=32",
    ):
        timed.wall = timed.cpu = 0.0
        with clock() as whole:
            run(subject, text)
        yield {
            "what": text,
            **whole,
            "forward_wall_s": timed.wall,
            "forward_cpu_s": timed.cpu,
            "overhead_share_cpu": 1 - timed.cpu / whole["cpu_s"],
            "overhead_share_wall": 1 - timed.wall / whole["wall_s"],
        }


def repeatability(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Spread of the medians that fresh processes find."""
    options = f"prompt_tokens={arguments.length},new_tokens={arguments.new_tokens},repeats={arguments.repeats}"
    found: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        words = [sys.executable, "-m", "prunekit.cli.main", "evaluate", arguments.model, "--task", f"latency,{options}"]
        words += ["--fresh", "--json", "--quiet", "--device", arguments.device]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        (task,) = json.loads(done.stdout)["models"][0]["tasks"]
        for name, figure in task["figures"].items():
            found.setdefault(name, []).append(figure["value"])
    for name, values in found.items():
        middle = statistics.median(values)
        spread = (max(values) - min(values)) / middle
        yield {"what": name, "rounds": values, "median": middle, "spread_share": spread, "options": options}


def prediction(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Predicted and measured time of one pass after several cuts."""
    from prunekit.checkpoint.sources import resolve
    from prunekit.export.onnx import export_onnx
    from prunekit.modeling.load import load_model
    from prunekit.pipeline.costs import Pass, cached_costs, onnx_device, pass_times
    from prunekit.plan.layout import choose_layout
    from prunekit.plan.plan import Plan
    from prunekit.structure.parts import SubLayer
    from prunekit.structure.view import ModelView
    from prunekit.surgery import engine

    shortened = tempfile.TemporaryDirectory()
    view = ModelView.open(resolve(arguments.model).folder)
    if arguments.blocks is not None:
        fewer = Plan.make(view, [s.address for s in view.sublayers if s.block >= arguments.blocks])
        engine.apply(view, fewer, Path(shortened.name), layout=choose_layout(view, fewer))
        view = ModelView.open(Path(shortened.name))
    asked = Pass(arguments.on, tokens=arguments.length, device=arguments.device, repeats=arguments.repeats)
    table = cached_costs(view, asked, fresh=True)

    def opened(folder: Path) -> Any:
        if arguments.on == "torch":
            return load_model(folder, "float32", arguments.device)
        from prunekit.evaluate.onnx import OnnxModel

        with tempfile.TemporaryDirectory() as place:
            export_onnx(folder, Path(place) / "onnx")
            return OnnxModel(Path(place) / "onnx", onnx_device(arguments.device))

    def narrowed(kind: str, name: str, share: float) -> Plan:
        left = [s for s in view.sublayers if s.kind == kind]

        def width(sublayer: SubLayer) -> int:
            return max(1, round(sublayer.widths[table_axis[kind]] * share))

        return Plan.make(view, keep={f"{s.address}.{name}": range(width(s)) for s in left})

    table_axis = {"attention": "kv", "ffn": "ffn"}
    every = [s.address for s in view.sublayers]
    plans: dict[str, Plan] = {
        "every third sub-layer": Plan.make(view, every[2::3]),
        "FFNs at 0.7 of their width": narrowed("ffn", "neurons", 0.7),
        "a third of the KV groups gone": narrowed("attention", "kv_groups", 2 / 3),
        "every fourth attention": Plan.make(view, [a for a in every if a.endswith("attention")][1::4]),
        "every fourth FFN": Plan.make(view, [a for a in every if a.endswith("ffn")][1::4]),
    }
    dense = opened(view.checkpoint.folder)
    for name, plan in list(plans.items())[: arguments.cuts]:
        with tempfile.TemporaryDirectory() as folder:
            engine.apply(view, plan, Path(folder), layout=choose_layout(view, plan))
            cut = opened(Path(folder))
        given = {
            "batch": asked.batch,
            "tokens": asked.tokens,
            "predicted_ms": table.predict(view, plan),
            "dense_predicted_ms": table.predict(view),
        }
        times = pass_times(given, cut, dense, arguments.repeats)
        within = abs(times["share_predicted_to_measured"] - 1) <= 0.1
        yield {"what": name, "on": arguments.on, "blocks": len(view.blocks), **given, **times, "within_a_tenth": within}


# Of one model after the other, so that they fit into minutes; ONNX Runtime needs an export for every cut.
QUIET = (
    "overhead --rows 8 --windows 4 --length 128",
    "repeatability --length 128 --new-tokens 16 --repeats 10 --rounds 4",
    "repeatability --model all-minilm-l6-v2 --length 128 --repeats 50 --rounds 4",
    "prediction --model all-minilm-l6-v2 --length 128",
    "prediction --model smollm2-135m-instruct --length 64 --blocks 12 --cuts 3",
    "prediction --model all-minilm-l6-v2 --length 128 --on onnxruntime --cuts 3",
    "prediction --model smollm2-135m-instruct --length 64 --blocks 6 --cuts 2 --on onnxruntime",
)


def quiet(arguments: argparse.Namespace) -> None:
    """Runs the lines of `QUIET` in processes of their own."""
    more = [] if arguments.out is None else ["--out", str(arguments.out)]
    for line in QUIET:
        print(f"python benchmarks/evaluation.py {line}", flush=True)
        if not arguments.dry_run:
            subprocess.run([sys.executable, __file__, *line.split(), *more], check=True)


def main() -> None:
    """Runs one part and appends its rows."""
    parts: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
        part.__name__: part for part in (agreement, overhead, repeatability, prediction)
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*parts, "quiet"])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--on", default="torch", choices=("torch", "onnxruntime"), help="of prediction")
    parser.add_argument("--blocks", type=int, help="of prediction: the model is cut to its first ones before [all]")
    parser.add_argument("--cuts", type=int, default=5, help="of prediction: how many")
    parser.add_argument("--dry-run", action="store_true", help="of quiet: only print")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens in a window or a prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.part == "quiet":
        quiet(arguments)
        return
    known = facts()
    for row in parts[arguments.part](arguments):
        line = json.dumps({"part": arguments.part, "model": arguments.model, **row, "facts": known})
        print(line, flush=True)
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as handle:
                handle.write(line + "\n")


if __name__ == "__main__":
    main()
