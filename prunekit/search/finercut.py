"""FinerCut: greedy removal of the sub-layers whose loss changes the model's outputs least."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.errors import UsageError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.types import Order

if TYPE_CHECKING:
    from prunekit.search._evaluator import Evaluator

Enough = Callable[[frozenset[str]], bool]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FinerCut:
    """Removes sub-layers one by one, always the one without which the outputs stay closest to the dense model's.

    Distances are measured with everything removed so far, on every position of the calibration data. A candidate runs
    only from the first sub-layer on that it changes. Most candidates are not run at every step: what they added to the
    distance when they were last run tells that they are hardly the best now. That is measured on SmolLM2, not proven:
    on random models of a few thousand weights it often errs. `exact: true` runs them all.

    Args:
        distance: how outputs are compared. js: Jensen-Shannon divergence of the next-word probabilities; js_released:
            as the authors' code computes it, with the arguments of both divergences exchanged; kl: Kullback-Leibler
            divergence from the dense model; loss: what is lost in predicting the calibration text itself, so that
            perplexity is what the search lowers; angular: angle between logits; norm: length of their difference. A
            model without logits takes angular or norm, on its last hidden states.
        candidates: what goes in one step: sublayers, attention, ffn, blocks, pairs (two neighbours whose removal
            leaves attention and FFN taking turns, so that the result is a shorter stock model) or mixed (sub-layers,
            and an attention and an FFN that are neighbours among those left). null: the step's kind of unit.
        per: null takes the smallest distance, as the paper does; params, flops, kv_bytes or latency_ms takes the
            smallest distance added for what is saved. Latency is measured on the calibration data.
        protect_front: the paper's rate x. Of n sub-layers, those of the first floor(n x / 2) + 1 blocks stay until
            floor(n x) + 1 others are gone; 0 protects none.
        exact: runs every candidate at every step.
        swaps: exchanges of a removed unit for a kept one, tried after the last step, best first, while they lower the
            distance and the budget is kept.
    """

    distance: Literal["js", "js_released", "kl", "loss", "angular", "norm"] = "js"
    candidates: Literal["sublayers", "attention", "ffn", "blocks", "pairs", "mixed"] | None = None
    per: Literal["params", "flops", "kv_bytes", "latency_ms"] | None = None
    protect_front: float = Field(default=0.0, ge=0, lt=1)
    exact: bool = False
    swaps: int = Field(default=0, ge=0)

    kinds: ClassVar[tuple[str, ...]] = ("sublayers", "attention", "ffn", "blocks")
    needs: ClassVar[tuple[str, ...]] = ("model",)
    paper: ClassVar[str] = (
        "FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models, "
        "https://arxiv.org/abs/2405.18218"
    )
    evidence: ClassVar[str] = "code: the authors' released search, its four distances and its rule for the front"
    deviations: ClassVar[str] = (
        "js is the textbook divergence (js_released is theirs); distances are means over positions that are not "
        "padding; loss, pairs, mixed, per, swaps and skipping candidates are ours; no block is protected by default"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"distance": "js"}

    def propose(
        self, evaluator: Evaluator, enough: Enough, progress: Progress = NULL_PROGRESS, kind: str = "sublayers"
    ) -> Order:
        """Removes until there is enough; the step that reaches it is kept.

        Args:
            evaluator: runs the cut models.
            enough: whether this set of removed sub-layers reaches the budget.
            progress: shown as candidates evaluated on all data.
            kind: kind of unit that the recipe's step removes; `pairs` for sub-layers that must go on taking turns.
        Raises:
            UsageError: if the knobs do not go with the kind or the model.
            PlanError: if nothing more can go before the budget is reached.
            EvaluationError: if every candidate's outputs overflow.
        """
        from prunekit.search._greedy import Greedy
        from prunekit.search._memory import Trust

        chosen = self._kind(kind)
        with progress.task("searching", unit="candidates") as task:
            evaluator.begin(self.distance, task.advance)
            trust = Trust() if evaluator.telling and not self.exact else None
            greedy = Greedy(evaluator, chosen, self.per, self.protect_front, trust)
            while not enough(evaluator.removed):
                greedy.step()
            swaps = greedy.swap(self.swaps, enough)
        provenance = {
            "distance": self.distance,
            "candidates": chosen,
            "evaluations": round(evaluator.evaluations, 1),
            "sublayer_runs": round(evaluator.sublayer_runs()),
            "swaps": swaps,
        }
        return Order("finercut", tuple(greedy.steps), provenance)

    def _kind(self, kind: str) -> str:
        from prunekit.search._candidates import ALLOWED

        chosen = self.candidates or kind
        if chosen not in ALLOWED[kind]:
            step = "keep_alternating" if kind == "pairs" else f"remove: {kind}"
            raise UsageError(
                f"`candidates: {chosen}` does not go with `{step}`",
                why=f"then {', '.join(ALLOWED[kind])} may go in one step",
                hint="leave `candidates` out" if kind != "sublayers" else "",
            )
        if self.per == "kv_bytes" and chosen == "ffn":
            raise UsageError(
                "`per: kv_bytes` does not go with FFNs", why="removing them changes no byte of the KV cache"
            )
        return chosen
