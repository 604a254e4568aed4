"""Linear patch: one linear map makes up for a removed span, folded into the projection before it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.errors import PlanError
from prunekit.core.progress import NULL_PROGRESS, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.calibrate.stack import Stack
    from prunekit.repair._fit import Repaired
    from prunekit.structure.view import ModelView

_WHOLE = ("blocks", "sublayers", "attention", "ffn")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LinearPatch:
    """Makes up for each run of removed sub-layers by a linear map of what the sub-layer before it adds.

    With M what that sub-layer adds to the residual stream [tokens, hidden], Y the stream before it, and L the dense
    model's stream behind the removed run, T minimises the mean of |Y + M T - L|^2 + ridge mean(M^2) |T - I|^2, in
    closed form. The output projection W, b becomes T^T W, T^T b: then the sub-layer adds M T, and nothing else changes.
    Shapes stay, so that what was a stock model stays one. hidden^2 numbers are fitted for each run; least_squares fits
    all that follows too.

    Args:
        ridge: how strongly T is held to the identity, which leaves the projection as it was, in mean squares of M.
    """

    ridge: float = Field(default=0.1, gt=0)

    needs: ClassVar[tuple[str, ...]] = ("model",)
    paper: ClassVar[str] = (
        "ReplaceMe: Network Simplification via Depth Pruning and Linear Transformations, "
        "https://arxiv.org/abs/2505.02819"
    )
    evidence: ClassVar[str] = "text: the least-squares form with the residual written out"
    deviations: ClassVar[str] = (
        "the ridge holds T to the identity instead of zero; M and Y are those of the patched model so far, L is the "
        "dense model's; runs of sub-layers are patched like runs of blocks, in an attention's output projection where "
        "one stands before them; no cosine form"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"ridge": 0.1}

    @staticmethod
    def require(view: ModelView, kinds: Collection[str]) -> None:
        """Fails before any work where nothing can be patched; arguments as for `LeastSquares.require`.

        Raises:
            PlanError: where no whole sub-layers go, or the family's sub-layers end in a norm.
        """
        from prunekit.repair._require import require_pre_norm

        require_pre_norm(view, "linear_patch")
        if not set(kinds) & set(_WHOLE):
            raise PlanError(
                "`repair: linear_patch` has nothing to patch",
                why=f"the steps remove {', '.join(sorted(set(kinds)))}, and whole blocks or sub-layers are patched",
                hint="use `method: least_squares`",
            )

    def fit(
        self,
        stack: Stack,
        inputs: Mapping[str, Tensor],
        drop: frozenset[str],
        kept: Mapping[str, Tensor],
        progress: Progress = NULL_PROGRESS,
    ) -> Repaired:
        """New output projections for the sub-layers before removed ones; arguments as for `LeastSquares.fit`.

        Raises:
            PlanError: where nothing stands before a removed run, or a sub-layer adds something else than its
                projection's output.
        """
        from prunekit.repair._fit import Pairs, Projection, Solver, fit

        if stack.addresses[0] in drop:
            raise PlanError(
                "nothing stands before the removed sub-layers to patch",
                why=f"`{stack.addresses[0]}` is removed",
                hint="protect it: `budget: {protect: [blocks.0, 'blocks.0.*']}`",
            )

        def solve(pairs: Pairs, weight: Tensor, bias: Tensor | None) -> Projection:
            return _patched(pairs, weight, bias, self.ridge)

        return fit(stack, inputs, drop, kept, Solver("linear_patch", solve, everywhere=False), progress)


def _patched(pairs: Any, weight: Tensor, bias: Tensor | None, ridge: float) -> Any:
    """The projection with the map folded in."""
    import torch

    from prunekit.repair._fit import Projection, held_regression

    added = [(x @ weight.T if bias is None else x @ weight.T + bias, wanted) for x, wanted in pairs]
    identity = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
    # [hidden, hidden], such that what is added becomes M @ turned.T.
    turned = held_regression(added, identity, False, ridge).weight.double()
    new_bias = None if bias is None else (turned @ bias.double().cpu()).float()
    return Projection((turned @ weight.double().cpu()).float(), new_bias)
