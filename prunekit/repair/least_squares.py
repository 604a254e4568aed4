"""Least squares: output projections fitted anew, so that the residual stream follows the dense model's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.progress import NULL_PROGRESS, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.calibrate.stack import Stack
    from prunekit.repair._fit import Repaired
    from prunekit.structure.view import ModelView


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LeastSquares:
    """Fits the output projection of every sub-layer from the first cut on, in execution order.

    The dense model and the cut one run side by side on calibration data. With x what enters a projection of the cut
    model, r the cut model's residual stream before its sub-layer, and t the dense model's after it and after the
    removed sub-layers that follow, the new weights W minimise the mean of |t - r - W x|^2 + ridge mean(x^2)
    |W - W_dense|^2. So what is left makes up for what was removed beside it and for the error that came in before it.
    Shapes stay; a projection with a bias gets a new one. It is strongest on text like the calibration data; fitted on
    few tokens it does little for other text, so fit it on much of what the model will read.

    Args:
        ridge: how strongly weights are held to the dense ones, in mean squares of the projection's inputs. Small values
            follow the calibration data, large ones the dense model.
    """

    ridge: float = Field(default=0.3, gt=0)

    needs: ClassVar[tuple[str, ...]] = ("model",)
    paper: ClassVar[str] = (
        "ReplaceMe: Network Simplification via Depth Pruning and Linear Transformations, "
        "https://arxiv.org/abs/2505.02819"
    )
    evidence: ClassVar[str] = "inferred: least squares on calibration activations, as ReplaceMe and FLAP fit them"
    deviations: ClassVar[str] = (
        "every output projection behind the first cut is fitted, with inputs of the repaired model so far, instead of "
        "one linear map before a removed span; widths and sub-layers are treated alike"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"ridge": 0.3}

    @staticmethod
    def require(view: ModelView, kinds: Collection[str]) -> None:
        """Fails before any work where the family cannot be repaired so.

        Args:
            view: the dense model.
            kinds: kinds of unit that the recipe removes.
        Raises:
            PlanError: where the family's sub-layers end in a norm.
        """
        from prunekit.repair._require import require_pre_norm

        require_pre_norm(view, "least_squares")

    def fit(
        self,
        stack: Stack,
        inputs: Mapping[str, Tensor],
        drop: frozenset[str],
        kept: Mapping[str, Tensor],
        progress: Progress = NULL_PROGRESS,
    ) -> Repaired:
        """New output projections for the sub-layers that stay.

        Args:
            stack: the dense model.
            inputs: its inputs by name, sequences first.
            drop: addresses of the sub-layers that go.
            kept: for narrowed sub-layers the channels of the output projection's input that stay, int64.
            progress: shown as sub-layers.
        Raises:
            PlanError: where a sub-layer adds something else to the residual stream than its projection's output.
        """
        from prunekit.repair._fit import Pairs, Projection, Solver, fit, held_regression

        def solve(pairs: Pairs, weight: Tensor, bias: Tensor | None) -> Projection:
            return held_regression(pairs, weight, bias is not None, self.ridge)

        return fit(stack, inputs, drop, kept, Solver("least_squares", solve), progress)
