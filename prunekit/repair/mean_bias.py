"""Mean bias: the mean of what a narrowed sub-layer no longer adds, folded into its bias."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prunekit.core.errors import PlanError
from prunekit.core.progress import NULL_PROGRESS, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.calibrate.stack import Stack
    from prunekit.repair._fit import Repaired
    from prunekit.structure.view import ModelView

_NARROWED = {"neurons": "ffn", "query_heads": "attention", "kv_groups": "attention"}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class MeanBias:
    """Adds to the bias of an output projection what its removed inputs gave on average.

    With x the outputs of the neurons or heads that go and W their columns of the output projection, the bias grows by
    W mean(x), the mean over the tokens of the calibration data in the dense model. Weights and shapes stay as the cut
    leaves them. What goes only varies around its mean is lost. Families whose output projections have no bias, such as
    llama, are refused; so are steps that narrow nothing.
    """

    needs: ClassVar[tuple[str, ...]] = ("projection",)
    paper: ClassVar[str] = (
        "FLAP: Fluctuation-based Adaptive Structured Pruning for Large Language Models, "
        "https://arxiv.org/abs/2312.11983"
    )
    evidence: ClassVar[str] = "text: the bias compensation, without the paper's score"
    deviations: ClassVar[str] = "a family without a bias gets none, since its stock class would not load it"
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def require(view: ModelView, kinds: Collection[str]) -> None:
        """Fails before any work where there is no bias to fold into; arguments as for `LeastSquares.require`.

        Raises:
            PlanError: where no step narrows a sub-layer, or one that is narrowed has no bias.
        """
        narrowed = {_NARROWED[kind] for kind in kinds if kind in _NARROWED}
        if not narrowed:
            raise PlanError(
                "`repair: mean_bias` has nothing to fold",
                why=f"the steps remove {', '.join(sorted(set(kinds)))}, and it is for {', '.join(_NARROWED)}",
                hint="use `method: linear_patch`, or `method: least_squares`",
            )
        for sublayer in view.sublayers:
            name = view.output(sublayer).name if sublayer.address.rpartition(".")[2] in narrowed else ""
            if name and name.removesuffix("weight") + "bias" not in view.checkpoint.tensors:
                raise PlanError(
                    f"`repair: mean_bias` does not go with `{view.model_type}`",
                    why=f"the output projection of `{sublayer.address}` has no bias",
                    hint="use `method: least_squares`, which needs none",
                )

    def fit(
        self,
        stack: Stack,
        inputs: Mapping[str, Tensor],
        drop: frozenset[str],
        kept: Mapping[str, Tensor],
        progress: Progress = NULL_PROGRESS,
    ) -> Repaired:
        """The narrowed output projections with new biases; arguments as for `LeastSquares.fit`."""
        import torch

        from prunekit.calibrate.collect import collect
        from prunekit.repair._fit import Projection, Repaired, error_of

        means = collect(stack, inputs, self.needs, progress)
        found: dict[str, Projection] = {}
        for i, address in enumerate(stack.addresses):
            if address not in kept or address in drop:
                continue
            weight, bias = stack.projection(i)
            if bias is None:
                raise PlanError(f"the output projection of `{address}` has no bias")
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[kept[address]] = False
            wide = weight.double().cpu()
            folded = bias.double().cpu() + wide[:, gone] @ means[f"projection/mean/{address}"][gone].double()
            found[address] = Projection(wide[:, kept[address]].float(), folded.detach().float())
        return Repaired(found, error_of(stack, inputs, drop, kept, found))
