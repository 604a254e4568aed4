"""Every error that prunekit raises on purpose.

PrunekitError                 1  the work failed
├── CheckpointError           1  a checkpoint is missing, damaged or of an unknown kind
├── StructureError            1  tensors and architecture do not fit each other
├── PlanError                 1  a plan asks for what the model does not have
├── SurgeryError              1  a cut could not be carried out
├── ExportError               1  a format could not be written
├── HealError                 1  training after the cut cannot go on
├── EvaluationError           1  a measurement could not be made
├── RuntimePolicyError        1  a run-time pattern cannot be used
├── UsageError                2  the command or a call was wrong
├── RecipeError               2  a recipe is wrong
└── ExpectationError          3  the work is done and a limit was missed
"""

from __future__ import annotations


class PrunekitError(Exception):
    """An error with a way out.

    Args:
        what: lower case, one sentence, no full stop, backticks round what the user typed.
        why: the rule or the cause behind it.
        hint: what to do.
        at: file, line or key.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", hint: str = "", at: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.hint = hint
        self.at = at


class CheckpointError(PrunekitError):
    """A checkpoint is missing, damaged or of an unknown kind."""


class StructureError(PrunekitError):
    """Tensors and architecture do not fit each other."""


class PlanError(PrunekitError):
    """A plan asks for what the model does not have."""


class SurgeryError(PrunekitError):
    """A cut could not be carried out."""


class ExportError(PrunekitError):
    """A format could not be written."""


class HealError(PrunekitError):
    """Training after the cut cannot go on."""


class EvaluationError(PrunekitError):
    """A measurement could not be made."""


class RuntimePolicyError(PrunekitError):
    """A run-time pattern cannot be used."""


class UsageError(PrunekitError):
    """The command or a call was wrong."""

    exit_code = 2


class RecipeError(PrunekitError):
    """A recipe is wrong."""

    exit_code = 2


class ExpectationError(PrunekitError):
    """The work is done and a limit was missed."""

    exit_code = 3
