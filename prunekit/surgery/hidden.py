"""What a narrower residual stream computes: factors that keep the norms of the wider one."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from prunekit.plan.cost import kept_hidden
from prunekit.structure.parts import HIDDEN

if TYPE_CHECKING:
    from prunekit.plan.plan import Plan
    from prunekit.structure.parts import SubLayer, TensorRef
    from prunekit.structure.view import ModelView


def scale(view: ModelView, plan: Plan, ref: TensorRef, sublayer: SubLayer | None = None) -> float:
    """Factor of a tensor's values in a model whose residual stream a plan narrows from d to d' channels.

    The masked model sets channels of the stream to 0. A root mean square over d channels of which d - d' are 0 is
    s = sqrt(d' / d) times that over the d' that stay. So what writes into the stream is multiplied by s, which gives
    the narrow stream the wide one's root mean square, with the same epsilon; norms that read it are divided by s. Any
    other norm of the model that shares the epsilon, such as that of queries and keys, stays as it is. A head that
    shares the embedding gets s along with it, so the last norm is divided by it once more. Layer norms normalise over
    the channels that stay, in the masked model too, and need no factor.

    Args:
        view: the model before the cut.
        plan: the cuts.
        ref: one of its tensors.
        sublayer: that it belongs to, None for a tensor outside blocks.
    """
    if HIDDEN not in plan.keep:
        return 1.0
    rule = view.hidden_rule()
    if rule.norm != "rms":
        return 1.0
    s = math.sqrt(kept_hidden(view, plan) / view.hidden)
    if writes(view, ref, sublayer):
        return s
    if sublayer is None:
        return 1 / (s * s if view.tied else s) if re.fullmatch(rule.last, ref.name) else 1.0
    return 1 / s if ref.layout == ((HIDDEN,),) else 1.0


def writes(view: ModelView, ref: TensorRef, sublayer: SubLayer | None = None) -> bool:
    """Whether a tensor's hidden channels are added to the residual stream; in post-norm models its norms write it."""
    if sublayer is None:
        return any(re.fullmatch(pattern, ref.name) for pattern in view.hidden_rule().writes)
    output = view.output(sublayer).name
    ends = ref.name in (output, output.removesuffix("weight") + "bias")
    return not ends and ref.layout == ((HIDDEN,),) if view.norm == "post" else ends
