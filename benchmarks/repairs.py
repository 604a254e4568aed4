"""What the repairs are worth on one plan: raw, and by each method, as JSON lines.

    python benchmarks/repairs.py --out benchmarks/results/repairs.jsonl
    python benchmarks/repairs.py --score angular
    python benchmarks/repairs.py --source all-minilm-l6-v2 --kind neurons --score wanda --repairs mean_bias

Decoders are measured by perplexity, encoders by the mean cosine of their sentence vectors with the dense model's, both
on text that nothing was fitted on.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any


def base(given: argparse.Namespace) -> dict[str, Any]:
    """The recipe without a repair."""
    budget = {"remove": given.remove, "of": "params"}
    return {
        "schema": 1,
        "model": {"source": given.source, "device": given.device},
        "calibrate": {"sequences": given.calibrate, "length_tokens": 256},
        "steps": [{"remove": given.kind, "by": {"score": given.score}, "budget": budget}],
    }


def wanted(given: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Rows by name, with the recipe's `repair`."""
    yield "raw", None
    for name in given.repairs.split(","):
        method, _, ridge = name.partition(":")
        knobs = {"ridge": float(ridge)} if ridge else {}
        yield name, {"method": method, **knobs, "calibrate": {"sequences": given.fit, "length_tokens": 256}}


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a repair, all of one plan; first the dense model."""
    import torch

    from prunekit import pipeline
    from prunekit.core.recipe import parse_recipe
    from prunekit.modeling.load import load_model
    from prunekit.pipeline.repair import as_stored, repair_inputs, with_repair
    from prunekit.surgery import engine

    made = pipeline.make_plan(parse_recipe(base(given)), talk=print)
    dense = load_model(made.view.checkpoint.folder, "float32", given.device)
    measure = measured(given, made, dense)
    yield {"row": "dense", **measure(dense)}
    for name, repair in wanted(given):
        recipe = parse_recipe(base(given) if repair is None else {**base(given), "repair": repair})
        repair_inputs(recipe, made.view)
        begin = time.perf_counter()
        mended = with_repair(recipe, replace(made), lines())
        with tempfile.TemporaryDirectory(prefix="prunekit-repairs-") as folder:
            engine.apply(made.view, made.plan, Path(folder), replaced=as_stored(made.view, mended.repaired))
            found = measure(load_model(Path(folder), "float32", given.device))
        yield {
            "row": name,
            "params_removed": round(1 - made.after.block_params / made.before.block_params, 4),
            **found,
            "error": mended.repair.get("error"),
            "projections": len(mended.repaired),
            "seconds": round(time.perf_counter() - begin, 1),
            "threads": torch.get_num_threads(),
        }


def lines() -> Any:
    """Progress as lines."""
    from prunekit.cli._progress import LineProgress

    return LineProgress(print)


def measured(given: argparse.Namespace, made: Any, dense: Any) -> Any:
    """Model -> figures."""
    from prunekit.calibrate.batches import sentence_batch, token_batch
    from prunekit.evaluate.embedding import embedding_cosine
    from prunekit.evaluate.perplexity import perplexity
    from prunekit.modeling.load import load_tokenizer

    tokenizer = load_tokenizer(made.view.checkpoint.folder)
    if not made.view.arch.decoder:
        sentences = sentence_batch(tokenizer, given.text, given.sequences, given.length)
        return lambda model: {"cosine": round(embedding_cosine(dense, model, sentences).mean, 4)}
    ids = token_batch(tokenizer, given.text, given.sequences, given.length)
    return lambda model: {"perplexity": round(perplexity(model, ids).perplexity, 2)}


def facts(given: argparse.Namespace) -> dict[str, Any]:
    """Where and with what the rows were made."""
    from prunekit.report.folder import versions

    names = ("source", "kind", "score", "remove", "calibrate", "fit", "text", "sequences", "length")
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
    machine = {"device": given.device, "machine": platform.machine(), "versions": versions(), "commit": commit}
    return {name: getattr(given, name) for name in names} | machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", default="smollm2-135m-instruct")
    parser.add_argument("--kind", default="blocks")
    parser.add_argument("--score", default="block_influence")
    parser.add_argument("--remove", type=float, default=0.2)
    parser.add_argument("--repairs", default="linear_patch:0.01,linear_patch,linear_patch:1,least_squares")
    parser.add_argument("--calibrate", type=int, default=10, help="sequences of 256 tokens that units are scored on")
    parser.add_argument("--fit", type=int, default=64, help="sequences of 256 tokens that repairs are fitted on")
    parser.add_argument("--text", default="wikitext2_eval")
    parser.add_argument("--sequences", type=int, default=20)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    about = facts(given)
    for row in rows(given):
        print(json.dumps(row), flush=True)
        if given.out is not None:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, **about}) + "\n")


if __name__ == "__main__":
    main()
