"""What cheaper ways of antidiagonal scoring still find, on the queries and keys of a real model.

    python benchmarks/antidiagonal_recall.py --out rows.jsonl [--text-tokens 4096]

SmolLM2-135M-Instruct in float32 on a CPU, blocks of 128. Each way gives block lists, and two things are read off the
exact attention probabilities. On text: the share of a query's attention that lists of a fifth of the blocks hold, and
what lists by mass 0.9 hold at which density, over every second layer, the first quarter of the rows left out. On
prompts that ask for a pass key: of the heads whose last query spends more than 0.15 of its attention on the block of
the key, how many list that block among five. Prompts end 16 to 128 queries into their last block, since all queries
of a block are scored together. `cost` is the number of products beside that of stride 16.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prunekit.calibrate.batches import token_batch
from prunekit.evaluate.subject import open_subject
from prunekit.heal._attention import attending
from prunekit_kernels.block_scores import antidiagonal_scores
from prunekit_kernels.block_scores.reference import chosen_blocks

SOURCE, TEXT, BLOCK = "smollm2-135m-instruct", "wikitext2_eval", 128
KEYS = ("48213", "90374", "17562", "60951")
Ways = dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]]


def scored(stride: int, step: int = 1) -> Callable[[Tensor, Tensor], Tensor]:
    """Scores [H, R, C] of queries [H, S, D] and keys [G, S, D]."""
    return lambda q, k: antidiagonal_scores(q[None], k[None], stride=stride, step=step)[0]


def of_mean(stride: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Scores [G, R, C] of the mean query of the heads that share keys."""
    return lambda q, k: antidiagonal_scores(q.unflatten(0, (len(k), -1)).mean(1)[None], k[None], stride=stride)[0]


def ways(group: int) -> Ways:
    """Name, cost and scores."""
    found: Ways = {f"stride {s}": (16 / s, scored(s)) for s in (8, 16, 32, 64, 128)}
    found |= {
        f"stride {s}, one run in {n}": (16 / s / n, scored(s, n)) for s, n in ((16, 2), (16, 4), (8, 2), (8, 4), (8, 8))
    }
    found |= {f"mean query of a group, stride {s}": (16 / s / group, of_mean(s)) for s in (8, 16)}
    return found


def queries_and_keys(subject: object, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Queries [H, S, D] and keys [G, S, D] of each layer, positions included."""
    found: list[tuple[Tensor, Tensor]] = []

    def kept(module: object, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: object) -> object:
        found.append((q[0], k[0]))
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    model = subject.model
    with attending(model, kept), torch.no_grad():
        model(torch.tensor([ids]))
    return found


def listed(scores: Tensor, n: int, heads: int, keep: int, mass: float) -> Tensor:
    """Bool [H, R, C]."""
    chosen, _ = chosen_blocks(scores, BLOCK, BLOCK, n, n, 0, True, keep, mass, 1, 1)
    return chosen.repeat_interleave(heads // len(chosen), 0)


def captured(ids: list[int], subject: object) -> dict[str, list[list[float]]]:
    """By way: share held by a fifth of the blocks, share and density by mass, for every second layer."""
    n, rows = len(ids), -(-len(ids) // BLOCK)
    found: dict[str, list[list[float]]] = {}
    for q, k in queries_and_keys(subject, ids)[::2]:
        heads, group = len(q), len(q) // len(k)
        spent = []
        for head in range(heads):
            weights = (q[head] @ k[head // group].T * q.shape[-1] ** -0.5).masked_fill(
                torch.ones(n, n).triu(1).bool(), float("-inf")
            )
            spent.append(weights.softmax(-1).view(rows, BLOCK, rows, BLOCK).sum((1, 3)) / BLOCK)
        mass = torch.stack(spent)
        for name, (_, run) in ways(group).items():
            scores = run(q, k)
            few, by_mass = (listed(scores, n, heads, keep, m) for keep, m in ((rows // 5, 0.0), (0, 0.9)))
            held = [float((mass * chosen).sum(-1)[:, rows // 4 :].mean()) for chosen in (few, by_mass)]
            found.setdefault(name, []).append([*held, float(by_mass.sum()) / (heads * rows * (rows + 1) / 2)])
    return found


def keys_found(text: list[int], subject: object) -> tuple[dict[str, int], int]:
    """By way, the heads that list the block of the key they look at; and how many such heads there are."""
    found: dict[str, int] = {}
    looking = 0
    ask = subject.tokenizer(" What is the pass key? The pass key is").input_ids
    for number, key in enumerate(KEYS):
        said = subject.tokenizer(f" The pass key is {key}. Remember it. {key} is the pass key. ").input_ids
        at, n = 420 + 300 * number, 14 * BLOCK + (16, 48, 96, 128)[number]
        ids = text[:at] + said + text[at : n - len(said) - len(ask)] + ask
        rows = -(-n // BLOCK)
        for q, k in queries_and_keys(subject, ids):
            heads, group = len(q), len(q) // len(k)
            weights = ((q[:, -1:] @ k.repeat_interleave(group, 0).transpose(1, 2)) * q.shape[-1] ** -0.5).softmax(-1)
            spent = torch.nn.functional.pad(weights[:, 0], (0, rows * BLOCK - n)).view(heads, rows, BLOCK).sum(2)
            head, block = (spent > 0.15).nonzero(as_tuple=True)
            here = (block >= at // BLOCK) & (block <= (at + len(said)) // BLOCK)
            if not here.any():
                continue
            looking += int(here.sum())
            for name, (_, run) in ways(group).items():
                chosen = listed(run(q, k), n, heads, 5, 0.0)
                found[name] = found.get(name, 0) + int(chosen[head[here], -1, block[here]].sum())
    return found, looking


def main() -> None:
    """Measures every way and writes its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are written here")
    parser.add_argument("--text-tokens", type=int, default=4096, help="a multiple of 128")
    options = parser.parse_args()
    subject = open_subject(SOURCE, "cpu", None, 1)
    text = token_batch(subject.tokenizer, TEXT, 1, options.text_tokens)[0].tolist()
    found, looking = keys_found(text, subject)
    held = captured(text, subject)
    config = subject.model.config
    with options.out.open("w") as file:
        for name, (cost, _) in ways(config.num_attention_heads // config.num_key_value_heads).items():
            few, by_mass, density = torch.tensor(held[name]).mean(0).tolist()
            row = {
                "way": name, "cost": round(cost, 3), "held_by_a_fifth": few, "held_by_mass": by_mass,
                "density_by_mass": density, "keys_found": found[name], "heads_looking": looking,
                "text_tokens": options.text_tokens, "source": SOURCE, "text": TEXT, "torch": torch.__version__,
                "transformers": transformers.__version__, "machine": platform.machine(),
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
            print(
                f"{name:36s} {cost:5.2f} {few:.3f} {by_mass:.3f} at {density:.3f}  {found[name]} of {looking}",
                flush=True,
            )


if __name__ == "__main__":
    main()
