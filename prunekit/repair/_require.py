"""What a family must be for a repair, checked before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit.core.errors import PlanError

if TYPE_CHECKING:
    from prunekit.structure.view import ModelView


def require_pre_norm(view: ModelView, method: str) -> None:
    """Fails where a norm stands between an output projection and the residual stream's next reader.

    Raises:
        PlanError: naming the method and the family.
    """
    if view.norm == "post":
        raise PlanError(
            f"`repair: {method}` does not go with `{view.model_type}`",
            why="a norm follows each sum, so what is missing is not a matter of the last matrix",
            hint="leave `repair` out",
        )
